"""The torch package's own test cases for convolutions and batch norm, through the fused forms.

A convolution becomes a block with LeakyReLU of slope 1, a batch norm a block behind a depthwise 1x1 convolution of
ones: both change nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastdcgan
from fastdcgan import functional
from tests.helpers.tolerance import assert_same_float64
from tests.machine import DEVICE

pytest.importorskip("expecttest", reason="torch's own test cases need expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

OPS = {(op.name.rpartition(".")[2], op.variant_test_name): op for op in op_db if op.name.startswith("nn.functional.")}
MODULES = {info.module_cls: info for info in module_db}
CONVS = {"conv2d": nn.Conv2d, "conv_transpose2d": nn.ConvTranspose2d}
FORMS = {"conv2d": functional.conv_act, "conv_transpose2d": functional.conv_transpose_act}


def samples(name: str, variant: str = "") -> list:
    found = list(OPS[name, variant].sample_inputs(DEVICE, torch.float64, requires_grad=True))
    assert len(found) > 5
    return found


def leaf(x: Any) -> Any:
    """A copy to differentiate with respect to."""
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def assert_same_call(ours: Any, theirs: Any, arguments: list) -> None:
    """Two functions of the same arguments: outputs, gradients, and what they did to the arguments."""
    results = []
    for function in (ours, theirs):
        given = [leaf(a) for a in arguments]
        out = function(*given)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=DEVICE).reshape(out.shape)
        out.backward(upstream)
        tensors = [a for a in given if isinstance(a, Tensor)]
        results.append([out.detach(), *tensors, *(a.grad for a in tensors)])
    for found, expected in zip(*results, strict=True):
        assert_same_float64(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("name", CONVS)
def test_convolution_samples(name: str) -> None:
    """Through a layer all of them run, also unbatched input and padding in words; the functional forms take 4-d input
    and numbers, and refuse the rest."""
    taken = 0
    for sample in samples(name):
        weight, bias = [*sample.args, None][:2]
        bias = sample.kwargs.get("bias", bias)
        settings = {k: v for k, v in sample.kwargs.items() if k != "bias"}
        theirs = getattr(F, name)
        assert_same_call(
            lambda x, w, b: through_a_layer(name, x, w, b, settings),  # noqa: B023
            lambda x, w, b: theirs(x, w, b, **settings),  # noqa: B023
            [sample.input, weight, bias],
        )

        def form(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return FORMS[name](x, w, b, activation="identity", **settings)  # noqa: B023

        if sample.input.dim() == 4 and not isinstance(settings.get("padding"), str):
            assert_same_call(form, lambda x, w, b: theirs(x, w, b, **settings), [sample.input, weight, bias])  # noqa: B023
            taken += 1
        else:
            with pytest.raises((TypeError, ValueError)):
                form(sample.input, weight, bias)
    assert taken > 5


def through_a_layer(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, settings: dict[str, Any]) -> Tensor:
    groups = settings.get("groups", 1)
    first, second = weight.shape[0], weight.shape[1] * groups
    channels = (second, first) if name == "conv2d" else (first, second)
    conv = CONVS[name](*channels, tuple(weight.shape[2:]), bias=bias is not None, **settings)
    net = fastdcgan.FusedSequential(conv, nn.LeakyReLU(1.0)).to(x.device)
    alone = any(extra >= stride for extra, stride in zip(conv.output_padding, conv.stride, strict=True))
    assert [row.fused for row in fastdcgan.explain(net)] == ([False, False] if alone else [True])
    return functional_call(net, {"0.weight": weight} if bias is None else {"0.weight": weight, "0.bias": bias}, (x,))


@pytest.mark.parametrize("variant", ["", "without_cudnn"])
def test_batch_norm_samples(variant: str) -> None:
    for sample in samples("batch_norm", variant):
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        settings = dict(zip(names, sample.args, strict=False)) | sample.kwargs
        vectors = [settings.pop(k, None) for k in ("weight", "bias", "running_mean", "running_var")]
        if sample.input.dim() < 2:
            continue  # there is no channel dimension
        channels = sample.input.shape[1]
        if not settings.get("training", False) and vectors[2] is None:
            settings["training"] = True

        def ours(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            ones = torch.ones(channels, 1, 1, 1, dtype=x.dtype, device=DEVICE)  # noqa: B023
            four = x.reshape(x.shape[0], channels, -1, 1)  # noqa: B023
            out = functional.conv_bn_act(
                four, ones, None, bn_weight=w, bn_bias=b, running_mean=mean, running_var=var, groups=channels,  # noqa: B023
                activation="identity", **settings,  # noqa: B023
            )  # fmt: skip
            return out.reshape(x.shape)

        def theirs(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return F.batch_norm(x, mean, var, w, b, **settings)  # noqa: B023

        assert_same_call(ours, theirs, [sample.input, *vectors])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d])
def test_module_samples(kind: type, training: bool) -> None:
    info = MODULES[kind]
    cases = info.module_inputs_func(info, DEVICE, torch.float64, requires_grad=True, training=training)
    assert len(cases) > 1
    for case in cases:
        arguments = case.constructor_input
        module = kind(*arguments.args, **arguments.kwargs).to(DEVICE, torch.float64).train(training)
        x = case.forward_input.args[0]
        assert_same_module(in_a_block(module), copy.deepcopy(module), x, module)


def in_a_block(module: nn.Module) -> nn.Sequential:
    """A copy of the module, made part of a fused block that changes nothing else."""
    module = copy.deepcopy(module)
    if isinstance(module, nn.BatchNorm2d):
        channels = module.num_features
        conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False).to(DEVICE, torch.float64)
        nn.init.ones_(conv.weight).requires_grad_(False)
        return fastdcgan.FusedSequential(conv, module)
    return fastdcgan.FusedSequential(module, nn.LeakyReLU(1.0))


def assert_same_module(ours: nn.Sequential, theirs: nn.Module, x: Tensor, module: nn.Module) -> None:
    part = ours[1] if isinstance(module, nn.BatchNorm2d) else ours[0]
    if x.dim() == 4:
        assert all(row.fused for row in fastdcgan.explain(ours))
    assert_same_call(ours, theirs, [x])
    pairs = zip(part.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, found), (_, expected) in pairs:
        assert_same_float64(found.grad, expected.grad, f"gradient of {name}", 1e-9)
    for (name, found), (_, expected) in zip(part.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)


# --- what has to raise -----------------------------------------------------------------------------------------------


def test_error_inputs_of_conv2d() -> None:
    errors = list(OPS["conv2d", ""].error_inputs(DEVICE))
    assert errors
    for error in errors:
        sample = error.sample_input
        with pytest.raises(Exception):  # noqa: B017, PT011 (that vanilla raises)
            F.conv2d(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises((TypeError, ValueError)):
            functional.conv_act(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("training", [True, False])
def test_error_inputs_of_batch_norm(training: bool) -> None:
    """What vanilla refuses is refused, with the same type of exception; in eval mode it takes these cases."""
    info = MODULES[nn.BatchNorm2d]
    cases = list(info.module_error_inputs_func(info, DEVICE, torch.float64, requires_grad=False, training=training))
    assert cases
    for case in cases:
        arguments = case.module_error_input.constructor_input
        norm = nn.BatchNorm2d(*arguments.args, **arguments.kwargs).to(DEVICE, torch.float64).train(training)
        x, results = case.module_error_input.forward_input.args[0], []
        for model in (in_a_block(norm), copy.deepcopy(norm)):
            try:
                results.append(model(x))
            except (RuntimeError, TypeError, ValueError) as error:
                results.append(type(error))
        if isinstance(results[1], Tensor):
            assert not training
            torch.testing.assert_close(*results, equal_nan=True)
        else:
            assert results == [case.error_type] * 2
