"""float32 on AMX tiles as three products of bfloat16 halves, where less than float32's precision was asked for: on an
emulation of the instructions."""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.backends import cpu as cpu_backend
from fastdcgan.backends.cpu import CPUBackend, Route
from fastdcgan.dispatch import autotune
from fastdcgan.geometry import Geometry
from fastdcgan.spec import STORE, Epilogue, Operand
from tests.csrc.cpu import amx_library
from tests.csrc.cpu.test_contractions import BLOCKS, K4, REFERENCE, Case, Kernels, block

REASON = amx_library.why_not() or (backends.status()["cpu"] if backends.status()["cpu"] != "available" else None)
pytestmark = [pytest.mark.compiles, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
F32 = torch.float32
UNIT, LEAST = 2.0**-24, 2.0**-126
# Of each product: what two halves leave of a float, and the product of the low halves (csrc/cpu/halves.h).
LEFT_OUT = 2.0**-15


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def halves(
    emulated: ctypes.CDLL, precision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Every contraction of float32 that can be is of halves; `precision`, which may take that back."""
    monkeypatch.setattr(CPUBackend, "compared_halves", lambda *_: Route(None, halves=True))
    precision("high")
    return precision


def magnitudes(case: Case) -> dict[str, Tensor]:
    """The sums of the absolute products."""
    positive = copy.copy(case)
    positive.x, positive.weight, positive.dy = case.x.abs(), case.weight.abs(), case.dy.abs()
    return positive.run(REFERENCE, wide=True)


def check(case: Case, on: CPUBackend) -> None:
    """Each element: what is left out of its products, and the rounding of a sum of three times as many terms."""
    truth, size = case.run(REFERENCE, wide=True), magnitudes(case)
    for op, result in case.run(on).items():
        bound = (LEFT_OUT + 4 * UNIT * math.sqrt(3 * case.terms(op))) * size[op]
        error = (result.double() - truth[op]).abs()
        assert result.dtype == F32
        assert bool((error <= bound).all()), f"{op}: {float((error / bound).nan_to_num().max()):.2f} of the bound"
        # In the norm two errors of opposite sign make up for each other.
        assert error.norm() <= 2.0**-16 * size[op].norm(), op


# --- accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(halves: Callable[[str], None], name: str) -> None:
    check(block(name, F32), CPUBackend())


@settings(max_examples=60)
@given(data=st.data())
def test_drawn_geometries(halves: Callable[[str], None], data: st.DataObject) -> None:
    def axis() -> tuple[int, int, int, int, int]:
        kernel, stride, dilation = (data.draw(st.integers(1, most)) for most in (5, 4, 3))
        reach = dilation * (kernel - 1)
        padding = data.draw(st.integers(0, min(4, reach)))
        least = max(1, reach + 1 - 2 * padding)
        return kernel, stride, padding, dilation, data.draw(st.integers(least, least + 8))

    *numbers, size = zip(axis(), axis(), strict=True)
    channels = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 270]))
    batch, gathered, linear = data.draw(st.integers(1, 5)), data.draw(channels), data.draw(channels)
    check(Case(batch, gathered, size, linear, Geometry(*numbers), F32), CPUBackend())


def test_the_norm_of_the_error(halves: Callable[[str], None]) -> None:
    """More than float32's and a hundred times less than bfloat16's."""
    case, low = block("wide", F32), block("wide", torch.bfloat16)
    truth, got, bf16 = case.run(REFERENCE, wide=True), case.run(CPUBackend()), low.run(CPUBackend())
    halves("highest")
    exact = case.run(CPUBackend())
    for op, expected in truth.items():
        error, least, most = (float((r[op].double() - expected).norm() / expected.norm()) for r in (got, exact, bf16))
        assert 2 * least < error < 2.0**-17, op
        assert 100 * error < most, op


def integers(shape: torch.Size, most: int, seed: int) -> Tensor:
    n, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most, (n, height, width, channels), generator=generator).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("left", "right"), [(2**14, 4), (4, 2**14), (100, 100)])
def test_whole_numbers_of_two_halves_are_exact(halves: Callable[[str], None], name: str, left: int, right: int) -> None:
    """15 bits fit two halves, and sums stay below 2**24: each of the three products has to be there, once."""
    case, cpu = block(name, F32), CPUBackend()
    case.x, case.weight = integers(case.x.shape, left, 1), integers(case.weight.shape, right, 2)
    case.dy = integers(case.dy.shape, right, 3)
    case.x[case.x.abs() < left // 2] = 0  # sums of few terms
    if left * right * case.terms("conv") > 2**24:
        keep = torch.rand(case.x.shape, generator=torch.Generator().manual_seed(4))
        case.x *= keep < 2**24 / (left * right * case.terms("conv"))
    got, truth = case.run(cpu), case.run(REFERENCE, wide=True)
    ours = [op for op in ("conv", "weight_grad") if magnitudes(case)[op].max() < 2**24]
    assert ours
    for op in ours:
        assert torch.equal(got[op].double(), truth[op]), op
    case.dy, case.weight = integers(case.dy.shape, left, 5), integers(case.weight.shape, right, 6)
    case.dy *= torch.rand(case.dy.shape, generator=torch.Generator().manual_seed(7)) < 128 / case.terms(
        "conv_transpose"
    )
    assert magnitudes(case)["conv_transpose"].max() < 2**24
    assert torch.equal(case.run(cpu)["conv_transpose"].double(), case.run(REFERENCE, wide=True)["conv_transpose"])


# --- the ends of the range -------------------------------------------------------------------------------------------

HUGE = torch.finfo(F32).max


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, HUGE, -HUGE, 3.3896e38])
@pytest.mark.parametrize("name", ["wide", "image", "logit", "projection", "odd"])
def test_what_halves_can_not_say_is_float32(halves: Callable[[str], None], name: str, value: float) -> None:
    """The bits of the float32 kernels: nothing finite becomes infinite or NaN, and the other way round."""
    for operand in ("x", "weight", "dy"):
        halves("highest")
        case = block(name, F32)
        changed = getattr(case, operand)
        changed *= 2.0**-12  # products with what is huge are not all too large
        ordinary = case.run(Kernels())
        changed[-1, 0, 0, -1] = value
        expected = case.run(Kernels())
        halves("high")
        for op, result in case.run(CPUBackend()).items():
            reads = not torch.equal(expected[op], ordinary[op])
            if reads and (math.isnan(value) or abs(value) in (math.inf, HUGE)):  # all of it by the float32 kernels
                torch.testing.assert_close(result, expected[op], rtol=0, atol=0, equal_nan=True)
                assert math.isfinite(value) or not result.isfinite().all()
            assert torch.equal(result.isfinite(), expected[op].isfinite())


def test_a_high_half_that_rounds_to_infinity(halves: Callable[[str], None]) -> None:
    """The largest float32 times 1 is finite; so are sums of products that rounding up would take over the limit."""
    cpu, g = CPUBackend(), Geometry((1, 1))
    for x, w, expected in (
        (HUGE, 1.0, HUGE),
        (2.0**64 * 1.00390619, 2.0**64 * (1 - 2.0**-8), None),
        (-HUGE, 0.5, -HUGE / 2),
    ):
        image, weight = torch.full((2, 32, 2, 2), 0.0), torch.zeros(32, 32, 1, 1)
        image, weight = (t.contiguous(memory_format=torch.channels_last) for t in (image, weight))
        image[:, 5], weight[:, 5] = x, w
        out = cpu.conv(Operand(image), weight, g, STORE)[0]
        truth = float(torch.tensor(x).double() * torch.tensor(w).double()) if expected is None else expected
        assert bool(out.isfinite().all())
        assert float((out.double() - truth).abs().max()) <= LEFT_OUT * abs(truth)


def test_statistics_of_what_is_not_finite(halves: Callable[[str], None]) -> None:
    case, e = block("wide", F32), Epilogue("stats")
    case.x[0, 3, 2, 2] = math.inf
    out, stats = CPUBackend().conv(Operand(case.x), case.weight, case.g, e)
    halves("highest")
    expected = Kernels().conv(Operand(case.x), case.weight, case.g, e)
    assert torch.equal(out.nan_to_num(), expected[0].nan_to_num())
    assert torch.equal(stats.isfinite(), expected[1].isfinite())


@pytest.mark.parametrize("power", [-110, -118, -122, -128])
def test_small_numbers(halves: Callable[[str], None], power: int) -> None:
    """A low half below the smallest normal number counts as zero, and so does a product: an absolute error."""
    case, ones = block("wide", F32), block("wide", F32)
    case.x = case.x * 2.0**power
    case.dy = case.dy * 2.0**power
    ones.x, ones.dy = torch.ones_like(case.x), torch.ones_like(case.dy)
    truth, size, lost = case.run(REFERENCE, wide=True), magnitudes(case), magnitudes(ones)
    got = case.run(CPUBackend())
    for op in ("conv", "conv_transpose"):
        bound = (LEFT_OUT + 4 * UNIT * math.sqrt(3 * case.terms(op))) * size[op]
        bound += LEAST * (lost[op] + 3 * case.terms(op))
        assert bool(((got[op].double() - truth[op]).abs() <= bound).all()), op
    assert not got["weight_grad"].any()  # products of 2**-220


# --- everything around the products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_and_activations(halves: Callable[[str], None], groups: int) -> None:
    case, cpu = Case(4, 24, (16, 16), 50, K4, F32), CPUBackend()
    for op, a, extra in (("conv", case.x, ()), ("conv_transpose", case.dy, (case.size,))):
        run = getattr(cpu, op)
        plain = run(Operand(a), case.weight, case.g, *extra, STORE)[0]
        out, stats = run(Operand(a), case.weight, case.g, *extra, Epilogue("stats", stat_groups=groups))
        assert torch.equal(out, plain)
        truth = REFERENCE.batch_stats(plain.double(), groups)
        assert (stats[0] - truth[0]).abs().max() < 1e-5 * truth[1].mean().sqrt()
        assert (stats[1:] - truth[1:]).abs().max() < 1e-5 * truth[1].mean()
        coef = torch.rand(4, 1, plain.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
        activated = run(Operand(a), case.weight, case.g, *extra, Epilogue("activate", None, coef, "relu", 0.0))[0]
        expected = (plain * coef[0].view(1, -1, 1, 1) + coef[1].view(1, -1, 1, 1)).relu()
        torch.testing.assert_close(activated, expected)


@pytest.mark.parametrize("name", ["wide", "image", "projection", "one sample"])
def test_same_bits_whatever_the_threads_and_strides(halves: Callable[[str], None], name: str) -> None:
    case, cpu = block(name, F32), CPUBackend()
    expected = case.check_threads(cpu)
    plain = case.weight.contiguous(memory_format=torch.contiguous_format)
    apart = torch.zeros(*plain.shape, 2)[..., 0].copy_(plain)
    for case.weight in (plain, apart):
        assert all(torch.equal(a, b) for a, b in zip(case.run(cpu).values(), expected[:-1], strict=True))


def test_kept_weights(halves: Callable[[str], None]) -> None:
    """The packed halves are others than the packed floats of the same weight, and change with it."""
    case, cpu = block("one sample", F32), CPUBackend()
    kept = torch.ops.fastdcgan_cpu_amx.kept_weights
    before = kept()[0]
    results = []
    for _ in range(2):
        for asked in ("high", "highest"):
            halves(asked)
            results.append(cpu.conv(Operand(case.x), case.weight, case.g, STORE)[0])
    assert kept()[0] >= before + 1
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    case.weight.data.neg_()
    halves("high")
    assert torch.equal(cpu.conv(Operand(case.x), case.weight, case.g, STORE)[0], -results[0])


def network() -> nn.Sequential:
    torch.manual_seed(2)
    net = nn.Sequential(nn.ConvTranspose2d(10, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())  # fmt: skip
    return net.to(memory_format=torch.channels_last)


def test_networks(halves: Callable[[str], None]) -> None:
    """Output and gradients of a generator."""
    net, x = network(), torch.randn(6, 10, 1, 1)
    results = []
    for model in (net.double(), fastdcgan.fuse(copy.deepcopy(net).float())):
        with fastdcgan.backend("auto" if model is net else "cpu"):
            out = model(x.double() if model is net else x)
            out.square().sum().backward()
        results.append([out.double(), *(p.grad.double() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 9
    for truth, got in zip(*results, strict=True):
        assert (got - truth).norm() < 2e-4 * truth.norm()


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_tiles(
    precision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[CPUBackend, dict[str, float]]:
    """A processor with AMX where nothing was measured, and the times that will be."""
    amx_library.library()
    monkeypatch.setattr(cpu_backend, "CONTRACTIONS", "fastdcgan_cpu_amx")
    monkeypatch.setenv("FASTDCGAN_MEASURED", str(tmp_path / "measured.json"))
    monkeypatch.setattr(autotune, "_files", {})
    monkeypatch.setattr(autotune, "_in_process", {})
    backends.get("cpu")
    times = {"halves": 1.0, "float32": 2.0}

    def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: times[name] for name in calls}

    monkeypatch.setattr(autotune, "_cpu_milliseconds", milliseconds)
    return CPUBackend(), times


def runs(case: Case) -> list[tuple]:
    return [
        ("conv", Operand(case.x), case.weight, case.g, STORE),
        ("conv_transpose", Operand(case.dy), case.weight, case.g, case.size, STORE),
        ("weight_grad", Operand(case.x), Operand(case.dy), case.g),
    ]


def test_only_what_was_asked_for(with_tiles: tuple, precision: Callable[[str], None]) -> None:
    cpu, _ = with_tiles
    case = block("wide", F32)
    for asked, expected in (("highest", False), ("high", True), ("medium", True), ("highest", False)):
        precision(asked)
        assert [cpu._choose(*run).halves for run in runs(case)] == [expected] * 3
    precision("high")
    for dtype in (torch.bfloat16, torch.float16):
        assert not any(cpu._choose(*run).halves for run in runs(block("logit", dtype)))
    grouped = cpu._choose("conv", Operand(case.x), case.weight[:, :32], Geometry((4, 4), (2, 2), groups=2), STORE)
    assert not grouped.halves and "groups" in (grouped.pytorch or "")


def test_the_faster_one_is_measured_once(with_tiles: tuple, precision: Callable[[str], None]) -> None:
    cpu, times = with_tiles
    precision("high")
    wide, image = runs(block("wide", F32)), runs(block("image", F32))
    assert all(cpu._choose(*run).halves for run in wide)
    times["halves"] = 3.0
    assert all(cpu._choose(*run).halves for run in wide)  # it is known
    for run in image:
        route = cpu._choose(*run)
        assert not route.halves
        assert "halves on AMX tiles take 3.0000 ms, float32 2.0000 ms" in (route.pytorch or route.beside)
    assert len(autotune._in_process) == 6
    torch.use_deterministic_algorithms(True)
    try:
        assert all(cpu._choose(*run).halves for run in image)
    finally:
        torch.use_deterministic_algorithms(False)


def test_explain_shows_it(with_tiles: tuple, precision: Callable[[str], None]) -> None:
    net = fastdcgan.fuse(network())
    precision("high")
    with fastdcgan.backend("cpu"):
        shown = str(fastdcgan.explain(net, torch.randn(4, 10, 1, 1)))
        assert shown.count("three products of bfloat16 halves on AMX tiles: 1.0000 ms") == 3
        precision("highest")
        assert "halves" not in str(fastdcgan.explain(net, torch.randn(4, 10, 1, 1)))


def test_without_tiles_high_is_highest(precision: Callable[[str], None]) -> None:
    backends.get("cpu")
    if torch.ops.fastdcgan_cpu.bfloat16_on_tiles():
        pytest.skip("this processor has AMX")
    case, cpu = block("wide", F32), CPUBackend()
    expected = case.run(cpu)
    precision("high")
    assert all(torch.equal(result, expected[op]) for op, result in case.run(cpu).items())
    with pytest.raises(
        ValueError, match=r"expected tensors of Float, AMX and no minimal filtering .* got Float, no AMX"
    ):
        cpu._weight_grad(Operand(case.x), Operand(case.dy), K4, halves=True)


def test_halves_of_what_is_none(emulated: ctypes.CDLL) -> None:
    case, wide, cpu = block("wide", torch.bfloat16), block("wide", F32), CPUBackend()
    case.run(cpu)
    with pytest.raises(ValueError, match="got BFloat16, AMX, no filtering"):
        cpu._conv(Operand(case.x), case.weight, K4, STORE, halves=True)
    with pytest.raises(ValueError, match="got Float, AMX, filtering"):
        cpu._conv(Operand(wide.x), wide.weight, K4, STORE, filters=True, halves=True)
