"""Blocks and chains against vanilla modules: outputs, gradients and buffers, in float64 and in the training dtypes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fastdcgan
from fastdcgan import functional
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.engine import planner
from fastdcgan.spec import Boundaries, Plan
from tests.helpers.twins import (
    KINKS,
    assert_as_good,
    assert_same,
    away_from_kinks,
    block,
    channels_last,
    discriminator,
    generator,
    in_dtype,
    numbers,
    outcome,
    subsets,
    twin,
    without_kinks,
)
from tests.machine import DEVICE, backends_here, examples

KINDS = [(transposed, norm) for transposed in (False, True) for norm in ("train", "eval", None)]
INPUT = (3, 4, 6, 5)


@pytest.mark.parametrize("act", [*ACTIVATIONS, "prelu", "prelu of one"])
@pytest.mark.parametrize(("transposed", "norm"), KINDS)
def test_block_is_vanilla_in_float64(transposed: bool, norm: str | None, act: str) -> None:
    x = numbers(*INPUT)
    for bias in (False, True):
        for affine, track in [(True, True)] if norm is None else [(True, True), (False, True), (True, False)]:
            model = block(transposed, norm, act, bias=bias, affine=affine, track=track)
            assert_same(outcome(twin(model), x, steps=2), outcome(model, x, steps=2))


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0, 1.7, -0.5])
@pytest.mark.parametrize("act", ["leaky_relu", "elu"])
def test_any_slope(act: str, slope: float) -> None:
    model = block(False, "train", act, slope=slope)
    assert_same(outcome(twin(model), numbers(*INPUT)), outcome(model, numbers(*INPUT)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "tanh", "identity", "relu6", "hardswish", "mish", "prelu"])
@pytest.mark.parametrize(("transposed", "norm"), KINDS)
def test_block_is_as_accurate_as_vanilla(
    transposed: bool, norm: str | None, act: str, dtype: torch.dtype, backend: str
) -> None:
    for layout in (torch.Tensor.contiguous, channels_last):
        low = in_dtype(block(transposed, norm, act, (8, 12)), dtype)
        x = layout(numbers(6, 8, 8, 8, dtype=dtype))
        upstream = away_from_kinks(low, x) if type(low[-1]) in KINKS else None
        truth = outcome(in_dtype(low, torch.float64), x.double(), upstream=upstream)
        vanilla, found = outcome(low, x, upstream=upstream), outcome(twin(low), x, upstream=upstream)
        assert_as_good(found, vanilla, truth, reduction=6 * 16 * 16 * 16)
        assert found["output"].stride() == vanilla["output"].stride()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [generator, discriminator])
def test_network_is_as_accurate_as_vanilla(make: type, dtype: torch.dtype, backend: str) -> None:
    low = in_dtype(make(width=8) if dtype == torch.float32 else without_kinks(make(width=8)), dtype)
    x = channels_last(numbers(*((16, 5, 1, 1) if make is generator else (16, 3, 16, 16)), dtype=dtype))
    truth = outcome(in_dtype(low, torch.float64), x.double())
    assert_as_good(outcome(twin(low), x), outcome(low, x), truth, reduction=16 * 16 * 16 * 16)


# --- geometry --------------------------------------------------------------------------------------------------------

AXIS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.integers(1, 7))
BATCH_AND_CHANNELS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))


@settings(max_examples=examples(100))
@given(
    st.booleans(), st.sampled_from(["train", "eval", None]), st.sampled_from(["relu", "leaky_relu", "tanh", "prelu"]),
    AXIS, AXIS, BATCH_AND_CHANNELS, st.integers(0, 2), st.integers(0, 2), st.booleans(), st.booleans(),
)  # fmt: skip
def test_drawn_geometry_is_vanilla_in_float64(
    transposed: bool, norm: str | None, act: str, rows: tuple, columns: tuple, sizes: tuple, extra_h: int, extra_w: int,
    bias: bool, last: bool,
) -> None:  # fmt: skip
    model, x = drawn(transposed, norm, act, rows, columns, sizes, extra_h, extra_w, bias)
    x = channels_last(x) if last else x
    assert_same(outcome(twin(model), x), outcome(model, x), tolerance=1e-8)


@settings(max_examples=examples(50))
@given(
    st.booleans(), st.sampled_from(["train", "eval", None]), st.sampled_from(["relu", "leaky_relu", "tanh", "prelu"]),
    AXIS, AXIS, BATCH_AND_CHANNELS, st.integers(0, 2), st.integers(0, 2), st.booleans(), st.booleans(),
)  # fmt: skip
def test_drawn_geometry_is_as_accurate_as_vanilla(
    transposed: bool, norm: str | None, act: str, rows: tuple, columns: tuple, sizes: tuple, extra_h: int, extra_w: int,
    bias: bool, last: bool,
) -> None:  # fmt: skip
    model, x = drawn(transposed, norm, act, rows, columns, sizes, extra_h, extra_w, bias)
    values = model(x).numel() // model[0].out_channels
    assume(norm != "train" or values >= 8)  # of few values, a batch norm's gradient is but rounding
    x = (channels_last(x) if last else x).float()
    low = in_dtype(model, torch.float32)
    truth = outcome(in_dtype(low, torch.float64), x.double())
    for name in backends_here():
        with fastdcgan.backend(name):
            found, vanilla = outcome(twin(low), x), outcome(low, x)
        for key, right in truth.items():
            if right is None or not right.dtype.is_floating_point:
                continue
            got, usual = found[key], vanilla[key]
            assert got is not None and usual is not None
            # Tiny tensors have no statistics of errors: a bound on the largest, at the magnitude of the gradients.
            scale = max(1.0, float(right.abs().max()))
            error, allowed = float((got - right).abs().max()), float((usual - right).abs().max())
            assert error <= 2 * allowed + 64 * torch.finfo(torch.float32).eps * scale, (name, key, error, allowed)


def drawn(
    transposed: bool, norm: str | None, act: str, rows: tuple, columns: tuple, sizes: tuple, extra_h: int, extra_w: int,
    bias: bool,
) -> tuple[nn.Sequential, torch.Tensor]:  # fmt: skip
    kernel, stride, padding, dilation, size = zip(rows, columns, strict=True)
    n, ci, co, groups = sizes
    geometry = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        extra = extra_h % max(stride[0], dilation[0]), extra_w % max(stride[1], dilation[1])
        geometry["output_padding"] = extra
    model = block(transposed, norm, act, (ci * groups, co * groups), bias=bias, **geometry)
    x = numbers(n, ci * groups, *size)
    try:
        with torch.no_grad():
            values = copy.deepcopy(model)[0](x).numel() // (co * groups)
    except RuntimeError:  # the kernel is larger than the input
        assume(False)
    assume(values > (3 if norm == "train" else 0))
    return model, x


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("make", [generator, discriminator])
def test_no_choice_of_the_plan_changes_the_result(make: type, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().train(train)
    x = numbers(*((4, 5, 1, 1) if make is generator else (4, 3, 16, 16)))
    expected = outcome(model, x)
    n = sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in model)
    seen = []
    some = [(False,) * (n - 1), (True,) * (n - 1), tuple(i % 2 == 0 for i in range(n - 1))]
    lazy = [(False,) * n, (True,) * n, tuple(i % 2 == 1 for i in range(n))]
    for choice in itertools.starmap(Boundaries, itertools.product(some, some, lazy)):
        with monkeypatch.context() as patch:
            real = planner.plan

            def plan(*args: Any, choice: Boundaries = choice, real: Callable = real) -> Plan:
                seen.append(choice)
                return dataclasses.replace(real(*args), boundaries=choice)

            patch.setattr(planner, "plan", plan)
            assert_same(outcome(twin(model), x), expected)
    assert len(set(seen)) == 27


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [generator, discriminator])
def test_deferred_boundaries_are_as_accurate(make: type, dtype: torch.dtype, backend: str) -> None:
    low = in_dtype(make(width=8) if dtype == torch.float32 else without_kinks(make(width=8)), dtype)
    x = numbers(*((16, 5, 1, 1) if make is generator else (16, 3, 16, 16)), dtype=dtype)
    truth = outcome(in_dtype(low, torch.float64), x.double())
    deferred, finished = twin(low), twin(low)
    deferred.boundaries, finished.boundaries = "deferred", "finished"
    found = outcome(deferred, x)
    assert_as_good(found, outcome(low, x), truth, reduction=16**4)
    assert_as_good(outcome(finished, x), found, truth, reduction=16**4)


@pytest.mark.parametrize("make", [generator, discriminator])
def test_two_statistics_groups_are_two_passes(make: type) -> None:
    model = make()
    model[1 if make is generator else 3].momentum = None
    x = numbers(*((6, 5, 1, 1) if make is generator else (6, 3, 16, 16)))
    once, twice = twin(model), copy.deepcopy(model)
    found = outcome(once, x, stat_groups=2)
    halves = x.clone().requires_grad_()
    outs = [twice(half) for half in halves.chunk(2)]
    out = torch.cat(outs)
    out.backward(numbers(*out.shape, seed=7))
    expected = {"output": out.detach(), "input gradient": halves.grad}
    expected |= {f"gradient of {name}": p.grad for name, p in twice.named_parameters()} | dict(twice.named_buffers())
    assert_same(found, expected)


@pytest.mark.parametrize("groups", [2, 3])
def test_statistics_groups_of_the_fast_backends(groups: int, backend: str) -> None:
    low = discriminator(8).float()
    x = numbers(6, 3, 16, 16, dtype=torch.float32)
    with fastdcgan.backend("reference"):
        truth = outcome(twin(in_dtype(low, torch.float64)), x.double(), stat_groups=groups)
        vanilla = outcome(twin(low), x, stat_groups=groups)
    assert_as_good(outcome(twin(low), x, stat_groups=groups), vanilla, truth, reduction=6 * 256 * 64)


# --- which gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["train", "eval", None])
@pytest.mark.parametrize("transposed", [False, True])
def test_exactly_the_gradients_that_are_asked_for(transposed: bool, norm: str | None) -> None:
    model = block(transposed, norm, "leaky_relu")
    names = [name for name, _ in model.named_parameters()]
    for asked in subsets(["x", *names]):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in asked)
        found = outcome(twin(model), numbers(*INPUT), needs_input="x" in asked)
        assert_same(found, outcome(model, numbers(*INPUT), needs_input="x" in asked))
        assert (found["input gradient"] is not None) == ("x" in asked)


@pytest.mark.parametrize("boundaries", ["finished", "deferred"])
@pytest.mark.parametrize("make", [generator, discriminator])
def test_frozen_parts_of_a_chain(make: type, boundaries: str) -> None:
    model = make()
    x = numbers(*((3, 5, 1, 1) if make is generator else (3, 3, 16, 16)))
    names = [name for name, _ in model.named_parameters()]
    last_weight = [name for name in names if name.endswith("weight")][-1]
    cases = [
        names[:0],
        names[:1],
        names[-1:],
        names[len(names) // 2 :],
        names[: len(names) // 2],
        [last_weight],
        names[2:3],
    ]
    for asked in cases:
        for needs_input in (False, True):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in asked)
            fused = twin(model)
            fused.boundaries = boundaries
            found = outcome(fused, x, needs_input)
            assert_same(found, outcome(model, x, needs_input))


def test_without_gradients_nothing_is_saved() -> None:
    model = twin(discriminator())
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.no_grad():
        assert model(numbers(2, 3, 16, 16)).grad_fn is None
    assert kept == []


# --- shapes and strides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["train", "eval", None])
@pytest.mark.parametrize("transposed", [False, True])
def test_empty_batch(transposed: bool, norm: str | None) -> None:
    model = block(transposed, norm, "relu")
    x = numbers(0, 4, 6, 5)
    for groups in (1, 2):
        fused, vanilla = twin(model), copy.deepcopy(model)
        found, expected = outcome(fused, x, stat_groups=groups), outcome(vanilla, x)
        if groups == 2 and norm == "train":
            expected["1.num_batches_tracked"] += 1  # type: ignore[operator]
        assert_same(found, expected)


@pytest.mark.parametrize("norm", ["train", "eval", None])
def test_batch_of_one(norm: str | None) -> None:
    for transposed in (False, True):
        model = block(transposed, norm, "relu")
        assert_same(outcome(twin(model), numbers(1, 4, 6, 5)), outcome(model, numbers(1, 4, 6, 5)))


@pytest.mark.parametrize("layout", ["every second column", "permuted", "expanded", "channels_last"])
def test_any_strides_of_the_input(layout: str, backend: str) -> None:
    x = numbers(4, 4, 6, 12, dtype=torch.float32)[..., ::2]
    if layout == "permuted":
        x = x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    elif layout == "expanded":
        x = x[:, :1].expand(4, 4, 6, 6)
    elif layout == "channels_last":
        x = channels_last(x)
    for transposed, norm in KINDS:
        low = block(transposed, norm, "leaky_relu").float()
        truth = outcome(in_dtype(low, torch.float64), x.double())
        vanilla, found = outcome(low, x), outcome(twin(low), x)
        assert_as_good(found, vanilla, truth, reduction=4 * 144 * 64)
        assert found["output"].stride() == vanilla["output"].stride()  # type: ignore[union-attr]


def test_an_expanded_gradient(backend: str) -> None:
    for transposed, norm in KINDS:
        low = block(transposed, norm, "tanh").float()
        x = numbers(4, 4, 6, 6, dtype=torch.float32)
        results = {}
        for name, model in (("truth", in_dtype(low, torch.float64)), ("vanilla", low), ("fused", twin(low))):
            leaf = (x.double() if name == "truth" else x.clone()).requires_grad_()
            model(leaf).sum().backward()  # the gradient is one number, expanded
            grads = {f"gradient of {k}": p.grad for k, p in model.named_parameters()}
            results[name] = {"input gradient": leaf.grad} | grads
        assert_as_good(results["fused"], results["vanilla"], results["truth"], reduction=4 * 144 * 64)


@pytest.mark.parametrize("last", [False, True])
def test_memory_formats_are_vanillas(last: bool, backend: str) -> None:
    format_ = torch.channels_last if last else torch.contiguous_format
    for transposed, norm in KINDS:
        low = block(transposed, norm, "relu", (4, 6)).float().to(memory_format=format_)
        x = numbers(4, 4, 8, 8, dtype=torch.float32).contiguous(memory_format=format_)
        vanilla, found = outcome(low, x), outcome(twin(low), x)
        for name, usual in vanilla.items():
            got = found[name]
            if usual is not None and got is not None:
                assert got.stride() == usual.stride(), (name, transposed, norm, got.stride(), usual.stride())


def test_a_second_backward_needs_retain_graph() -> None:
    model, x = twin(block(False, "train", "relu")), numbers(*INPUT)
    out = model(x).sum()
    out.backward(retain_graph=True)
    first = model[0].weight.grad.clone()
    out.backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("make", [generator, discriminator], ids=["generator", "discriminator"])
def test_a_backward_writes_over_nothing_but_its_own(make: Callable[..., nn.Sequential], backend: str) -> None:
    """Gradients between blocks take each other's place: not the one that comes in, nor anything that was saved."""
    model = twin(make(width=16).float()).to(memory_format=torch.channels_last)
    shape = (4, 5, 1, 1) if make is generator else (4, 3, 16, 16)
    for bias in (False, True):
        if bias:  # without BatchNorm: a bias and an activation
            model = twin(nn.Sequential(*(m for m in model if not isinstance(m, nn.BatchNorm2d))))
            for m in model:
                if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                    m.bias = nn.Parameter(numbers(m.out_channels, dtype=torch.float32))
        x = numbers(*shape, dtype=torch.float32).requires_grad_()
        out = model(x)
        saved = out.detach().clone()
        gradient = channels_last(numbers(*out.shape, dtype=torch.float32))
        before, inputs = gradient.clone(), [x, *model.parameters()]
        first = torch.autograd.grad(out, inputs, gradient, retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(out, inputs, gradient)
        assert torch.equal(gradient, before) and torch.equal(out, saved)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, kept, second, strict=True))


def test_a_weight_changed_between_forward_and_backward_is_an_error() -> None:
    model, x = twin(block(False, "train", "relu")), numbers(*INPUT).requires_grad_()
    out = model(x).sum()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("act", [*ACTIVATIONS, "prelu"])
@pytest.mark.parametrize("norm", ["train", "eval", None])
def test_an_output_may_be_written_to_where_vanilla_lets_it(norm: str | None, act: str) -> None:
    """A module after the block may work in place: the block keeps its own output for no activation but ReLU."""
    vanilla = nn.Sequential(*block(False, norm, act), nn.Hardtanh(-0.5, 0.5, inplace=True)).train(norm != "eval")
    if act in ("relu", "tanh", "sigmoid"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outcome(vanilla, numbers(*INPUT))
        if not (act == "relu" and norm is None):
            outcome(twin(vanilla), numbers(*INPUT))
    else:
        assert_same(outcome(twin(vanilla), numbers(*INPUT)), outcome(vanilla, numbers(*INPUT)))


def test_an_output_padding_beyond_the_stride() -> None:
    """PyTorch takes it where the dilation is larger still."""
    geometry = {
        "kernel_size": (2, 3),
        "stride": (1, 2),
        "padding": (0, 3),
        "output_padding": (1, 2),
        "dilation": (2, 3),
    }
    model = block(True, "train", "relu", bias=False, **geometry)
    expected = outcome(model, numbers(*INPUT))
    assert_same(outcome(twin(model), numbers(*INPUT)), expected)
    x, weight = numbers(*INPUT).requires_grad_(), model[0].weight.detach().clone().requires_grad_()
    del geometry["kernel_size"]
    out = functional.conv_transpose_bn_act(
        x, weight, bn_weight=model[1].weight, bn_bias=model[1].bias, training=True, **geometry
    )
    out.backward(numbers(*out.shape, seed=7))
    assert_same(
        {"output": out.detach(), "input gradient": x.grad, "gradient of 0.weight": weight.grad},
        {name: expected[name] for name in ("output", "input gradient", "gradient of 0.weight")},
    )


def test_a_bias_does_not_move_a_pre_activation_across_zero() -> None:
    """In low precision it has to be added before the convolution is rounded, as vanilla does on most CPUs: on a GPU
    cuDNN's caller adds it afterwards, as PyTorch's own code for CPUs with AVX2, and ours may err so where that runs."""
    low = in_dtype(block(True, None, "relu", (8, 12)), torch.bfloat16)
    x = numbers(6, 8, 8, 8, dtype=torch.bfloat16).requires_grad_()
    right = in_dtype(low, torch.float64)(x.double()) > 0
    ours, vanilla = (int(((model(x) > 0) != right).sum()) for model in (twin(low), low))
    assert ours <= vanilla
    assert DEVICE.type != "cpu" or "cpu" not in backends_here() or ours == 0


def test_functional_equals_pytorchs_functions() -> None:
    x, weight = numbers(*INPUT), numbers(6, 4, 3, 3, seed=2)
    out = functional.conv_bn_act(x, weight, padding=1, training=True, activation="relu")
    torch.testing.assert_close(out, F.relu(F.batch_norm(F.conv2d(x, weight, None, 1, 1), None, None, training=True)))
