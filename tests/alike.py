"""Comparing a fused model with the vanilla one: output, gradients, buffers, and what happened to the input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastdcgan
from tests.tolerance import assert_as_accurate, assert_same_float64


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny networks are quicker so, and much quicker on a machine that is busy. (A decorator, too.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(factory: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """The model with the same parameters at every call, and norms that are not the identity."""
    torch.manual_seed(seed)
    model = factory()
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                continue
            if module.affine:
                nn.init.uniform_(
                    module.get_parameter("weight") if "weight" in module._parameters else module.bias, 0.5, 1.5
                )
                if "bias" in module._parameters:
                    nn.init.normal_(module.bias, 0.0, 0.3)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.to(device, dtype)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """Normal numbers that are float32 numbers in either dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@one_thread()
def results(model: nn.Module, x: Tensor, steps: int = 2) -> dict[str, Tensor]:
    """What `steps` passes forward and backward leave behind, by name."""
    found: dict[str, Tensor] = {}
    for step in range(steps):
        torch.manual_seed(step)  # dropout
        leaf = x.clone().requires_grad_()
        given = leaf * 1  # an in-place first module may change it
        out = model(given)
        (out * draw(tuple(out.shape), out.dtype, out.device, step)).sum().backward()
        assert leaf.grad is not None
        found |= {f"output {step}": out.detach(), f"input gradient {step}": leaf.grad, f"input {step}": given.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return found | dict(model.named_buffers())


def assert_alike(vanilla: dict[str, Tensor], fused: dict[str, Tensor], truth: dict[str, Tensor] | None = None) -> None:
    """The same tensors: in float64 to 1e-10, in other dtypes (where `truth` is given) as accurate as vanilla's."""
    assert vanilla.keys() == fused.keys(), set(vanilla) ^ set(fused)
    for name, value in vanilla.items():
        if not value.dtype.is_floating_point:
            assert torch.equal(fused[name], value), f"{name} is {fused[name]}, expected {value}"
        elif truth is None:
            assert_same_float64(fused[name], value, name)
        else:
            # Through several layers an error is a sum over about as many terms as a layer has.
            assert_as_accurate(fused[name], value, truth[name], name, reduction=1000, scale=_scale(name, truth))


def _scale(name: str, truth: dict[str, Tensor]) -> float | None:
    """A bias in front of a batch norm has no gradient but rounding, which is relative to what was summed."""
    if not (name.startswith("gradient of") and name.endswith("bias")):
        return None
    module = name.removesuffix("bias")
    return max(float(value.square().mean().sqrt()) for key, value in truth.items() if key.startswith(module))


def assert_fuses_right(
    factory: Callable[[], nn.Module], shape: tuple[int, ...], device: torch.device, train: bool = True
) -> None:
    """Exactly the vanilla results in float64, and as good ones in float32."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        x = draw(shape, dtype, device)
        vanilla = results(build(factory, dtype, device).train(train), x)
        fused = results(fastdcgan.fuse(build(factory, dtype, device)).train(train), x)
        found[dtype] = vanilla
        assert_alike(vanilla, fused, None if dtype == torch.float64 else found[torch.float64])
