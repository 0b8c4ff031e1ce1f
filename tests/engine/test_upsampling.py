"""Nearest upsampling by 2 and a convolution, run as one transposed convolution, give what the two modules give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import fastdcgan
from fastdcgan.engine import choice, match, planner, upsampling
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Block, BlockTensors, says_channels_last, strides_in
from tests.helpers.networks import Halved
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.twins import (
    assert_as_good,
    assert_same,
    numbers,
    one_thread,
    outcome,
    prepared,
    results,
    twin,
)  # fmt: skip
from tests.machine import DEVICE

KERNELS = [((3, 3), (1, 1)), ((5, 5), (2, 2)), ((3, 3), (0, 2)), ((1, 3), (0, 1)), ((2, 4), (1, 0))]


@pytest.mark.parametrize(("kernel", "padding"), KERNELS)
def test_one_contraction_does_both(kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    plain = Block(False, Geometry(kernel, padding=padding), (0, 0), None, "identity", 0.0, "reference")
    x, w, b = numbers(2, 3, 5, 6), numbers(4, 3, *kernel, seed=2), numbers(4, seed=3)
    block = plain.upsampling()
    g = block.geometry
    assert block.after_upsampling() == plain
    assert g.kernel[0] * g.kernel[1] < 4 * kernel[0] * kernel[1]  # products per output, times 4
    expected = F.conv2d(F.interpolate(x, scale_factor=2), w, b, padding=padding)
    found = F.conv_transpose2d(x, upsampling.weight(w), b, g.stride, g.padding)
    assert found.shape[2:] == block.output_size(5, 6)
    torch.testing.assert_close(found, expected)
    as_modules = choice.modules([block], lambda x: x, 1, x, [BlockTensors(w, b)], [None])
    assert torch.equal(as_modules, expected)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((1, 1)), Geometry((3, 3), (2, 2), (1, 1)), Geometry((3, 3), (1, 1), (2, 2), (2, 2)),
        Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2), Geometry((3, 3), (1, 1), (3, 3)),
    ],
)  # fmt: skip
def test_what_no_contraction_does(geometry: Geometry) -> None:
    assert geometry.of_upsampled() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    w = numbers(4, 3, 3, 3, dtype=dtype).requires_grad_()
    made = upsampling.weight(w)
    exact = upsampling.weight(w.detach().double())
    assert made.dtype == dtype and torch.equal(made, exact.float().to(dtype))
    (found,) = torch.autograd.grad(made, w, made)
    wide = w.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(upsampling.weight(wide), wide, made.detach().double())
    assert found.dtype == dtype and torch.equal(found, expected.float().to(dtype))


def test_its_derivatives() -> None:
    w = numbers(2, 3, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(upsampling.weight, w, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(upsampling.weight, w)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 1, 3, 3), (1, 4, 3, 3), (1, 1, 3, 3)])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_it_keeps_the_memory_format(shape: tuple[int, ...], format: torch.memory_format) -> None:
    w = numbers(*shape).as_strided(shape, strides_in(shape, format)).requires_grad_()
    made = upsampling.weight(w)
    (dw,) = torch.autograd.grad(made, w, made)
    assert says_channels_last(made) == says_channels_last(w)
    assert made.stride() == strides_in(made.shape, format) and dw.stride() == w.stride()


def generator(wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> nn.Sequential:
    """A convolution of pixels as they are, two of upsampled ones, of which the last makes an image."""
    return prepared(
        nn.Sequential(
            nn.Conv2d(8, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.Tanh(),
            nn.Upsample(scale_factor=2), wrap(nn.Conv2d(12, 16, 3, 1, 1, bias=False)), nn.BatchNorm2d(16), nn.Tanh(),
            nn.UpsamplingNearest2d(scale_factor=2), wrap(nn.Conv2d(16, 3, 3, 1, 1)), nn.Tanh(),
        )
    )  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@one_thread()
def test_as_accurate_as_modules(dtype: torch.dtype, train: bool, backend: str) -> None:
    """Sums of weights, which are rounded in 16 bits, cost no more than the bound leaves."""
    low, x = generator().to(dtype).train(train), numbers(4, 8, 6, 6).to(dtype)
    ours, usual = outcome(twin(low), x), outcome(low, x)
    assert_as_good(ours, usual, outcome(copy.deepcopy(low).double(), x.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@one_thread()
def test_as_accurate_where_taps_cancel(dtype: torch.dtype, backend: str) -> None:
    """Differences of neighbours in a smooth image: far less comes out than each tap gives."""
    model = prepared(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 32, 3, 1, 1, bias=False)))
    with torch.no_grad():
        model[1].weight.sub_(model[1].weight.flip(3))  # type: ignore[index, union-attr, operator]
    low, x = model.to(dtype), 4 + F.interpolate(numbers(2, 32, 3, 3), scale_factor=4, mode="bilinear")
    ours, usual = (outcome(m, x.to(dtype)) for m in (twin(low), low))
    assert_as_good(ours, usual, outcome(copy.deepcopy(low).double(), x.to(dtype).double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@one_thread()
def test_as_accurate_under_autocast(dtype: torch.dtype) -> None:
    """Their sums are of the weights before they are cast."""
    model, x = generator().float(), numbers(4, 8, 6, 6).float()
    truth = outcome(copy.deepcopy(model).double(), x.double())
    with torch.autocast(DEVICE.type, dtype):
        ours, usual = outcome(twin(model), x), outcome(model, x)
    assert ours["output"].dtype == usual["output"].dtype  # type: ignore[union-attr]
    for name in ("output", "input gradient", "gradient of 4.weight", "gradient of 8.weight"):
        found, vanilla, right = (d[name] for d in (ours, usual, truth))
        assert found is not None and vanilla is not None and right is not None
        assert_as_accurate(found, vanilla, right, name, reduction=1000, terms=dtype)


@one_thread()
def test_gradients_of_gradients() -> None:
    found = []
    for model in (generator(), twin(generator())):
        x = numbers(4, 8, 3, 3).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append({"x": x.grad} | {name: p.grad for name, p in model.named_parameters()})
    assert_same(found[1], found[0], 1e-9)


@pytest.mark.parametrize("batched", [False, True])
def test_several_gradients_at_once(batched: bool) -> None:
    found = []
    for model in (generator(), twin(generator())):
        x, da = numbers(2, 8, 3, 3).requires_grad_(), numbers(3, 2, 3, 12, 12)
        given = {"x": x} | dict(model.named_parameters())
        grads = torch.autograd.grad(model(x), list(given.values()), da if batched else da[0], is_grads_batched=batched)
        found.append(dict(zip(given, grads, strict=True)))
    assert_same(found[1], found[0])


def halved(conv: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(conv, "weight", Halved())


WRAPS = [parametrizations.spectral_norm, parametrizations.weight_norm, nn.utils.spectral_norm, halved]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("wrap", WRAPS, ids=["spectral norm", "weight norm", "spectral norm, old", "parametrization"])
@one_thread()
def test_computed_weights(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A weight that is computed at each call, and the weight that is made of that."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = generator(wrap)
        found.append(results(fastdcgan.fuse(model) if fused else model, numbers(4, 8, 3, 3)))
    assert_same(found[1], found[0])


# --- what is found ----------------------------------------------------------------------------------------------------


class Shifted(nn.Upsample):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def hooked() -> nn.Module:
    up = nn.Upsample(scale_factor=2)
    up.register_forward_hook(lambda module, args, out: out * 2)
    return up


FOUND: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], bool]] = {
    "nearest": (lambda: nn.Upsample(scale_factor=2), {}, True),
    "exact": (lambda: nn.Upsample(scale_factor=(2, 2), mode="nearest-exact"), {}, True),
    "recomputed": (lambda: nn.Upsample(scale_factor=2, recompute_scale_factor=True), {}, True),
    "of its own class": (lambda: nn.UpsamplingNearest2d(scale_factor=2.0), {}, True),
    "5x5": (lambda: nn.Upsample(scale_factor=2), {"kernel_size": 5, "padding": "same"}, True),
    "size": (lambda: nn.Upsample((12, 12)), {}, False),
    "by 3": (lambda: nn.Upsample(scale_factor=3), {}, False),
    "one way": (lambda: nn.Upsample(scale_factor=(2, 1)), {}, False),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), {}, False),
    "aligned": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), {}, False),
    "hook": (hooked, {}, False),
    "forward of its own": (lambda: Shifted(scale_factor=2), {}, False),
    "1x1": (lambda: nn.Upsample(scale_factor=2), {"kernel_size": 1, "padding": 0}, False),
    "stride": (lambda: nn.Upsample(scale_factor=2), {"stride": 2}, False),
    "dilation": (lambda: nn.Upsample(scale_factor=2), {"dilation": 2}, False),
    "groups": (lambda: nn.Upsample(scale_factor=2), {"groups": 2}, False),
    "padding": (lambda: nn.Upsample(scale_factor=2), {"padding": 3}, False),
    "padding mode": (lambda: nn.Upsample(scale_factor=2), {"padding_mode": "reflect"}, False),
}


@pytest.mark.parametrize("name", FOUND)
@one_thread()
def test_what_is_found(name: str) -> None:
    up, changes, found = FOUND[name]
    conv = nn.Conv2d(4, 6, **{"kernel_size": 3, "padding": 1} | changes)
    plain = prepared(nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), up(), conv, nn.BatchNorm2d(6), nn.Tanh()))
    fused, x = twin(plain), numbers(2, 3, 6, 6)
    assert_same(outcome(fused, x), outcome(plain, x))
    rows = {row.name: row.pattern for row in fastdcgan.explain(fused)}
    assert list(rows) == ["0", "3"]
    assert rows["3"].startswith(type(plain[2]).__name__ if found else "Conv2d")
    assert rows["3"].endswith("Conv2d + BatchNorm2d + Tanh")
    assert len(match.segments(fused)) == (1 if found else 3)


CHANGES: dict[str, Callable[[nn.Upsample], object]] = {
    "scale": lambda up: setattr(up, "scale_factor", 3.0),
    "size": lambda up: [setattr(up, "scale_factor", None), setattr(up, "size", (5, 5))],
    "mode": lambda up: setattr(up, "mode", "bicubic"),
    "hook": lambda up: up.register_forward_hook(lambda module, args, out: out * 2),
    "forward": lambda up: setattr(up, "forward", lambda x: torch.cat([x, x], 2)),
}


@pytest.mark.parametrize("change", CHANGES)
@one_thread()
def test_a_change_is_noticed(change: str) -> None:
    plain, x = generator().eval(), numbers(2, 8, 4, 4)
    fused = twin(plain)
    fused(x)
    for model in (plain, fused):
        CHANGES[change](model[3])  # type: ignore[index, arg-type]
    assert_same(outcome(fused, x), outcome(plain, x))


@pytest.mark.parametrize("shape", [(8, 4, 4), (0, 8, 4, 4), (2, 8, 1, 1)], ids=str)
def test_other_inputs(shape: tuple[int, ...]) -> None:
    """Of three dimensions the first is a batch to an upsampling, and a channel to a convolution."""
    plain = prepared(nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3)))
    plain[3].padding = (1, 1)
    assert_same(outcome(twin(plain), numbers(*shape)), outcome(plain, numbers(*shape)))


def test_statistics_of_groups() -> None:
    plain, x = generator(), numbers(4, 8, 3, 3)
    fused = twin(plain)
    found = fused(x, stat_groups=2)
    torch.testing.assert_close(found, torch.cat([plain(part) for part in x.chunk(2)]))
    assert_same(dict(fused.named_buffers()), dict(plain.named_buffers()))


class Resizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.image = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, 1, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(F.interpolate(x, scale_factor=2))))
        return torch.tanh(self.image(self.up(x)))


def test_in_a_forward_of_its_own() -> None:
    """As one chain, whose records `explain` has by their convolutions."""
    rows = {row.name: row for row in fastdcgan.explain(fastdcgan.fuse(Resizing()), numbers(2, 3, 4, 4).float())}
    assert rows["conv"].pattern == "Upsample + Conv2d + BatchNorm2d + ReLU"
    assert rows["image"].pattern == "Upsample + Conv2d + Tanh"


@pytest.mark.parametrize("compiler", ["fastdcgan", "fastdcgan_inductor"])
@one_thread()
def test_in_a_graph(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = planner.plan
    monkeypatch.setattr(planner, "plan", lambda blocks, *args: made.append(len(blocks)) or real(blocks, *args))
    plain = prepared(Resizing())
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(plain), backend=compiler)
    found = [results(model, numbers(2, 3, 4, 4)) for model in (plain, compiled)]
    assert_same({name.replace("_orig_mod.", ""): t for name, t in found[1].items()}, found[0])
    assert made and set(made) == {2}
    torch._dynamo.reset()
