"""Networks in plain PyTorch, their fused twins, what passes through one leave behind, and whether it is the same."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastdcgan
from fastdcgan.activations import to_module
from tests.helpers.tolerance import SLACK, assert_as_accurate, assert_same_float64, rounding
from tests.machine import DEVICE

Outcome = dict[str, Tensor | None]


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


def in_dtype(model: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    """A copy with convolutions in `dtype` and norms in float32, as under autocast."""
    low = copy.deepcopy(model).to(dtype)
    for module in low:
        if isinstance(module, nn.BatchNorm2d) and dtype != torch.float64:
            module.float()
    return low


def block(
    transposed: bool,
    norm: str | None,
    act: str,
    channels: tuple[int, int] = (4, 6),
    *,
    slope: float | None = None,
    bias: bool = True,
    affine: bool = True,
    track: bool = True,
    momentum: float | None = 0.1,
    **geometry: Any,
) -> nn.Sequential:
    """conv [+ BatchNorm2d] [+ activation]; `norm` is "train", "eval" or None. float64, on the test device."""
    geometry = {"kernel_size": 4, "stride": 2, "padding": 1} | geometry
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(*channels, bias=bias, **geometry)
    modules: list[nn.Module | None] = [conv]
    if norm is not None:
        modules.append(nn.BatchNorm2d(channels[1], momentum=momentum, affine=affine, track_running_stats=track))
    learned = {"prelu": nn.PReLU(channels[1]), "prelu of one": nn.PReLU()}
    modules.append(learned[act] if act in learned else to_module(act, slope))
    model = nn.Sequential(*(m for m in modules if m is not None))
    return prepared(model).train(norm != "eval")


def prepared(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 on the test device, with norms and biases that are not the identity."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.weight[:, 0].numel()
            fill(module.weight, g, 1.5 / fan_in**0.5)
            fill(module.bias, g, 0.5)
        elif isinstance(module, nn.PReLU):
            fill(module.weight, g, 0.2, 0.7)  # whose kink is not so sharp that a rounding across it shows
        elif isinstance(module, nn.BatchNorm2d):
            fill(module.weight, g, 0.3, 1.0)
            fill(module.bias, g, 0.3)
            fill(module.running_mean, g, 0.3)
            fill(module.running_var, g, 0.1, 1.0)
    return model.double().to(DEVICE)


@torch.no_grad()
def fill(tensor: Tensor | None, g: torch.Generator, deviation: float, mean: float = 0.0) -> None:
    if tensor is not None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=g))


def generator(nz: int = 5, width: int = 4) -> nn.Sequential:
    """16x16 pixels, 3 channels."""
    return prepared(
        nn.Sequential(
            nn.ConvTranspose2d(nz, 2 * width, 4, 1, 0, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )
    )  # fmt: skip


def discriminator(width: int = 4) -> nn.Sequential:
    """Of 16x16 pixels, 3 channels."""
    return prepared(
        nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4, 1, 0),
        )
    )  # fmt: skip


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """Normal numbers, the same in every dtype up to its rounding: float32 numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """`draw` on the test device."""
    return draw(shape, dtype, DEVICE, seed)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def twin(model: nn.Module) -> nn.Module:
    """A fused copy."""
    return fastdcgan.fuse(copy.deepcopy(model))


KINKS: dict[type[nn.Module], tuple[int, ...]] = {  # where derivatives jump
    nn.ReLU: (0,), nn.LeakyReLU: (0,), nn.PReLU: (0,), nn.ReLU6: (0, 6), nn.Hardtanh: (-1, 1), nn.Hardswish: (-3, 3),
}  # fmt: skip
FUNCTIONAL_KINKS = {F.relu: (0,), F.leaky_relu: (0,)}  # as forwards of networks in tests/models call them


@contextlib.contextmanager
def functional_kinks(
    instead: Callable[[Callable[..., Tensor], tuple[int, ...]], Callable[..., Tensor]],
) -> Iterator[None]:
    """While it lasts, forwards call what `instead` makes of each function with a kink, and of where it has them."""
    with contextlib.ExitStack() as patches:
        for function, kinks in FUNCTIONAL_KINKS.items():
            patches.enter_context(mock.patch.object(F, function.__name__, instead(function, kinks)))
        yield


def without_functional_kinks() -> contextlib.AbstractContextManager[None]:
    """Tanh in place of them: what `without_kinks` does to modules."""
    return functional_kinks(lambda function, kinks: lambda z, *args, **kwargs: torch.tanh(z))


def without_kinks(model: nn.Module) -> nn.Module:
    """The model with Tanh in place of activations with a kink, and mean in place of maximum in its pooling.

    Where rounding decides on which side of a kink a pre-activation lies, a derivative is simply another, and 16 bits
    decide so for a hundredth of all: then two right gradients of a network differ by more than any bound from rounding.
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():  # one that is used twice has two names
            if type(child) in KINKS:
                setattr(module, name, nn.Tanh())
            elif type(child) is nn.MaxPool2d:
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride))
    return model


@torch.no_grad()
def settled_input(model: nn.Module, shape: tuple[int, ...], device: torch.device, steps: int = 2) -> Tensor:
    """Float64 numbers for which no pre-activation lies so near to a kink that float32 might take it for one of the
    other side: the first that `draw` gives. The model, in float64, goes through `steps` passes."""
    settled: list[bool] = []

    def watch(z: Tensor, kinks: tuple[int, ...]) -> None:
        away = torch.stack([(z - kink).abs() for kink in kinks])
        settled.append(not (away[away != 0] < 1e-5 * z.square().mean().sqrt()).any())  # float32 errs by 1e-7 per layer

    def watched(function: Callable[..., Tensor], kinks: tuple[int, ...]) -> Callable[..., Tensor]:
        def call(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            watch(z, kinks)
            return function(z, *args, **kwargs)

        return call

    hooks = [
        m.register_forward_pre_hook(lambda module, args: watch(args[0], KINKS[type(module)]))
        for m in model.modules()
        if type(m) in KINKS
    ]
    for seed in range(1, 100):
        x = draw(shape, torch.float64, device, seed)
        settled.clear()
        for step in range(steps):
            torch.manual_seed(step)  # dropout, as in `results`
            with functional_kinks(watched):
                model(x * 1)
        if all(settled):
            for hook in hooks:
                hook.remove()
            return x
    raise AssertionError("no input keeps away from kinks")


def away_from_kinks(model: nn.Sequential, x: Tensor) -> Tensor:
    """A gradient for the block's output, zero where rounding decides on which side of a kink a pre-activation lies."""
    with torch.no_grad():
        z = in_dtype(model, torch.float64)[:-1](x.double())
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS[type(model[-1])]:
        near |= (z - kink).abs() < 8 * torch.finfo(x.dtype).eps * (z.abs().mean() + abs(kink))
    return numbers(*z.shape, dtype=x.dtype, seed=7).masked_fill(near, 0)


@one_thread()
def results(model: nn.Module, x: Tensor, steps: int = 2) -> Outcome:
    """What `steps` passes forward and backward through the model itself leave behind, by name."""
    found: Outcome = {}
    for step in range(steps):
        torch.manual_seed(step)  # dropout
        leaf = x.clone().requires_grad_()
        given = leaf * 1  # an in-place first module may change it
        out = model(given)
        (out * draw(tuple(out.shape), out.dtype, out.device, step)).sum().backward()
        found |= {f"output {step}": out.detach(), f"input gradient {step}": leaf.grad, f"input {step}": given.detach()}
    return found | state_of(model)


def outcome(
    model: nn.Module,
    x: Tensor,
    needs_input: bool = True,
    stat_groups: int = 1,
    steps: int = 1,
    upstream: Tensor | None = None,
) -> Outcome:
    """What passes forward and backward through a copy of the model leave behind, by name: the last output, and the
    sums of the gradients over all `steps`."""
    model = copy.deepcopy(model)
    x = x.detach().requires_grad_(needs_input)
    for _ in range(steps):
        out = model(x) if stat_groups == 1 else model(x, stat_groups=stat_groups)
        if out.requires_grad:
            given = numbers(*out.shape, dtype=out.dtype, seed=7) if upstream is None else upstream
            out.backward(given.to(out.dtype))
    return {"output": out.detach(), "input gradient": x.grad} | state_of(model)


def state_of(model: nn.Module) -> Outcome:
    """Gradients of parameters (None where there is none) and buffers, by name."""
    found: Outcome = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return found | dict(model.named_buffers())


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def assert_same(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: float = 1e-10
) -> None:
    """float64 agrees to `tolerance`, integers exactly, None only with None."""
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    for name, value in expected.items():
        other = found[name]
        if value is not None and not value.dtype.is_floating_point:
            assert other is not None and torch.equal(other, value), f"{name} is {other}, expected {value}"
        else:
            assert_same_float64(other, value, name, tolerance)


def assert_as_good(
    found: Mapping[str, Tensor | None],
    vanilla: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    reduction: int = 1000,
) -> None:
    """Every tensor is as accurate as vanilla's, in the same dtype. (Through several layers an error is a sum over about
    as many terms as a layer has: hence the default.)"""
    assert found.keys() == vanilla.keys() == truth.keys()
    largest = max((rms(v) for k, v in truth.items() if k.startswith("gradient of") and v is not None), default=0.0)
    for name, usual in vanilla.items():
        got, right = found[name], truth[name]
        assert (got is None) == (usual is None), f"{name}: {got}, vanilla {usual}"
        if got is None or usual is None or right is None:
            continue
        if not usual.dtype.is_floating_point:
            assert torch.equal(got, usual), f"{name} is {got}, expected {usual}"
            continue
        scale = None
        if name.startswith("gradient of") and usual.dim() == 1 and rms(right) < 1e-3 * largest:
            # A norm behind leaves nothing but rounding of it, which is relative to what is summed up.
            scale = largest
        assert_as_accurate(got, usual, right, name, reduction=reduction, scale=scale)


def assert_within_spread(
    found: Mapping[str, Tensor | None],
    vanilla: Sequence[Mapping[str, Tensor | None]],
    truth: Mapping[str, Tensor | None],
    dtype: torch.dtype,
) -> None:
    """Every tensor errs at most twice as much as vanilla's own in `dtype`, of which several are given whose rounding
    differs: where gradients cancel, a single one may be right by chance. (Of few elements an error is one draw.)"""
    for name, right in truth.items():
        got, others = found[name], [v[name] for v in vanilla]
        assert all((got is None) == (other is None) for other in [*others, right]), name
        if got is None or right is None or not right.is_floating_point():
            continue
        assert got.dtype == others[0].dtype and got.shape == right.shape, name  # type: ignore[union-attr]
        error, *usual = (rms(t.double() - right) for t in (got, *others) if t is not None)
        allowed = SLACK * max(usual) * (1 + 2 / max(1, right.numel()) ** 0.5) + rounding(dtype) * rms(right)
        assert error <= allowed, f"{name} errs by {error:.3e}, vanilla by {usual}, so at most {allowed:.3e}"


def nudged(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Every number one rounding of `dtype` up or down, by chance."""
    signs = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).sign().to(x.device)
    return x * (1 + rounding(dtype) * signs)


def worst(vanilla: Sequence[Outcome], truth: Outcome) -> Outcome:
    """Of each tensor the one that errs most: a gradient that is a sum of what cancels may be right by chance."""

    def error(of: Outcome, name: str) -> float:
        t, right = of[name], truth[name]
        return 0.0 if t is None or right is None or not right.is_floating_point() else rms(t.double() - right)

    return {name: max(vanilla, key=lambda of: error(of, name))[name] for name in truth}


def assert_fuses_right(
    factory: Callable[[], nn.Module], shape: tuple[int, ...], device: torch.device, train: bool = True
) -> None:
    """Exactly the vanilla results in float64, and as good ones in float32 and under autocast; the same state_dict."""
    found: list[tuple[Outcome, Outcome]] = []
    settled = settled_input(build(factory, torch.float64, device).train(train), shape, device)
    for dtype in (torch.float64, torch.float32):
        x = settled.to(dtype)
        plain, fused = (build(factory, dtype, device).train(train) for _ in range(2))
        fastdcgan.fuse(fused)
        found.append((results(fused, x), results(plain, x)))
        assert list(fused.state_dict()) == list(plain.state_dict())
    (ours64, truth), (ours32, vanilla32) = found
    assert_same(ours64, truth)
    others = [results(build(factory, dtype, device).train(train), nudged(x, dtype, i)) for i in range(3)]
    assert_as_good(ours32, worst([vanilla32, *others], truth), truth)

    def smooth(dtype: torch.dtype = torch.float32) -> nn.Module:
        return build(lambda: without_kinks(factory()), dtype, device).train(train)

    x, low = settled.float(), torch.bfloat16
    with without_functional_kinks():
        with torch.autocast(device.type, low):
            ours = results(fastdcgan.fuse(smooth()), x, steps=1)
            vanilla = [results(smooth(), inputs, steps=1) for inputs in (x, *(nudged(x, low, i) for i in range(3)))]
        truth = results(smooth(torch.float64), x.double(), steps=1)
    for outcome in (ours, *vanilla):
        del outcome["input 0"]
    del truth["input 0"]
    assert_within_spread(ours, vanilla, truth, low)


def subsets(items: list[str]) -> list[tuple[str, ...]]:
    return [s for n in range(len(items) + 1) for s in itertools.combinations(items, n)]
