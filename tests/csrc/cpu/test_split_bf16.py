"""float32 on AMX tiles as three products of split bfloat16, where less than float32's precision was asked for: on an
emulation of the instructions."""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.dispatch import autotune, router
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Epilogue, Operand
from tests.csrc.cpu import amx_library
from tests.csrc.cpu.test_contractions import BLOCKS, K4, REFERENCE, Case, Kernels, block
from tests.helpers.contractions import conv_call, run, why_not

REASON = amx_library.why_not() or (backends.status()["cpu"] if backends.status()["cpu"] != "available" else None)
pytestmark = [pytest.mark.compiles, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
F32 = torch.float32
UNIT, LEAST = 2.0**-24, 2.0**-126
# Of each product: what the two terms leave of a float, and the product of the low terms (csrc/cpu/split_bf16.h).
LEFT_OUT = 2.0**-15


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def high(emulated: ctypes.CDLL, precision: Callable[[str], None]) -> Callable[[str], None]:
    """float32 products may be of less precision; `precision`, which may take that back."""
    precision("high")
    return precision


def split() -> Kernels:
    """The backend with products of split floats, on AMX tiles as all of bfloat16."""
    return Kernels("split_bf16", "amx_col2im", "amx")


def magnitudes(case: Case) -> dict[str, Tensor]:
    """The sums of the absolute products."""
    positive = copy.copy(case)
    positive.x, positive.weight, positive.dy = case.x.abs(), case.weight.abs(), case.dy.abs()
    return positive.run(REFERENCE, wide=True)


def check(case: Case, on: Kernels) -> None:
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
def test_blocks(high: Callable[[str], None], name: str) -> None:
    check(block(name, F32), split())


@settings(max_examples=60)
@given(data=st.data())
def test_drawn_geometries(high: Callable[[str], None], data: st.DataObject) -> None:
    def axis() -> tuple[int, int, int, int, int]:
        kernel, stride, dilation = (data.draw(st.integers(1, most)) for most in (5, 4, 3))
        reach = dilation * (kernel - 1)
        padding = data.draw(st.integers(0, min(4, reach)))
        least = max(1, reach + 1 - 2 * padding)
        return kernel, stride, padding, dilation, data.draw(st.integers(least, least + 8))

    *numbers, size = zip(axis(), axis(), strict=True)
    channels = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 270]))
    batch, gathered, linear = data.draw(st.integers(1, 5)), data.draw(channels), data.draw(channels)
    check(Case(batch, gathered, size, linear, Geometry(*numbers), F32), split())


def test_the_norm_of_the_error(high: Callable[[str], None]) -> None:
    """More than float32's and a hundred times less than bfloat16's."""
    case, low = block("wide", F32), block("wide", torch.bfloat16)
    truth, got, bf16 = case.run(REFERENCE, wide=True), case.run(split()), low.run(split())
    exact = case.run(Kernels())
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
def test_whole_numbers_of_two_terms_are_exact(high: Callable[[str], None], name: str, left: int, right: int) -> None:
    """15 bits fit two terms, and sums stay below 2**24: each of the three products has to be there, once."""
    case, cpu = block(name, F32), split()
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
def test_what_two_terms_can_not_say_is_float32(high: Callable[[str], None], name: str, value: float) -> None:
    """The bits of the float32 kernels: nothing finite becomes infinite or NaN, and the other way round."""
    for operand in ("x", "weight", "dy"):
        case = block(name, F32)
        changed = getattr(case, operand)
        changed *= 2.0**-12  # products with what is huge are not all too large
        ordinary = case.run(Kernels())
        changed[-1, 0, 0, -1] = value
        expected = case.run(Kernels())
        for op, result in case.run(split()).items():
            reads = not torch.equal(expected[op], ordinary[op])
            if reads and (math.isnan(value) or abs(value) in (math.inf, HUGE)):  # all of it by the float32 kernels
                torch.testing.assert_close(result, expected[op], rtol=0, atol=0, equal_nan=True)
                assert math.isfinite(value) or not result.isfinite().all()
            assert torch.equal(result.isfinite(), expected[op].isfinite())


def test_a_high_term_that_rounds_to_infinity(high: Callable[[str], None]) -> None:
    """The largest float32 times 1 is finite; so are sums of products that rounding up would take over the limit."""
    cpu, g = split(), Geometry((1, 1))
    for x, w, expected in (
        (HUGE, 1.0, HUGE),
        (2.0**64 * 1.00390619, 2.0**64 * (1 - 2.0**-8), None),
        (-HUGE, 0.5, -HUGE / 2),
    ):
        image, weight = torch.full((2, 32, 2, 2), 0.0), torch.zeros(32, 32, 1, 1)
        image, weight = (t.contiguous(memory_format=torch.channels_last) for t in (image, weight))
        image[:, 5], weight[:, 5] = x, w
        out = run(cpu, conv_call(Operand(image), weight, g))[0]
        truth = float(torch.tensor(x).double() * torch.tensor(w).double()) if expected is None else expected
        assert bool(out.isfinite().all())
        assert float((out.double() - truth).abs().max()) <= LEFT_OUT * abs(truth)


def test_statistics_of_what_is_not_finite(high: Callable[[str], None]) -> None:
    case, e = block("wide", F32), Epilogue("stats")
    case.x[0, 3, 2, 2] = math.inf
    (out, stats), expected = case.contract(split(), "conv", e), case.contract(Kernels(), "conv", e)
    assert torch.equal(out.nan_to_num(), expected[0].nan_to_num())
    assert torch.equal(stats.isfinite(), expected[1].isfinite())


@pytest.mark.parametrize("power", [-110, -118, -122, -128])
def test_small_numbers(high: Callable[[str], None], power: int) -> None:
    """A low term below the smallest normal number counts as zero, and so does a product: an absolute error."""
    case, ones = block("wide", F32), block("wide", F32)
    case.x = case.x * 2.0**power
    case.dy = case.dy * 2.0**power
    ones.x, ones.dy = torch.ones_like(case.x), torch.ones_like(case.dy)
    truth, size, lost = case.run(REFERENCE, wide=True), magnitudes(case), magnitudes(ones)
    got = case.run(split())
    for op in ("conv", "conv_transpose"):
        bound = (LEFT_OUT + 4 * UNIT * math.sqrt(3 * case.terms(op))) * size[op]
        bound += LEAST * (lost[op] + 3 * case.terms(op))
        assert bool(((got[op].double() - truth[op]).abs() <= bound).all()), op
    assert not got["weight_grad"].any()  # products of 2**-220


# --- everything around the products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_and_activations(high: Callable[[str], None], groups: int) -> None:
    case, cpu = Case(4, 24, (16, 16), 50, K4, F32), split()
    for op in ("conv", "conv_transpose"):
        plain = case.contract(cpu, op)[0]
        out, stats = case.contract(cpu, op, Epilogue("stats", stat_groups=groups))
        assert torch.equal(out, plain)
        truth = REFERENCE.batch_stats(plain.double(), groups)
        assert (stats[0] - truth[0]).abs().max() < 1e-5 * truth[1].mean().sqrt()
        assert (stats[1:] - truth[1:]).abs().max() < 1e-5 * truth[1].mean()
        coef = torch.rand(4, 1, plain.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
        activated = case.contract(cpu, op, Epilogue("activate", None, coef, "relu", 0.0))[0]
        expected = (plain * coef[0].view(1, -1, 1, 1) + coef[1].view(1, -1, 1, 1)).relu()
        torch.testing.assert_close(activated, expected)


@pytest.mark.parametrize("name", ["wide", "image", "projection", "one sample"])
def test_same_bits_whatever_the_threads_and_strides(high: Callable[[str], None], name: str) -> None:
    case, cpu = block(name, F32), split()
    expected = case.check_threads(cpu)
    plain = case.weight.contiguous(memory_format=torch.contiguous_format)
    apart = torch.zeros(*plain.shape, 2)[..., 0].copy_(plain)
    for case.weight in (plain, apart):
        assert all(torch.equal(a, b) for a, b in zip(case.run(cpu).values(), expected[:-1], strict=True))


def test_packed_weights(high: Callable[[str], None]) -> None:
    """The packed terms are others than the packed floats of the same weight, and change with it."""
    case, cpu = block("one sample", F32), split()
    case.stays = True
    cached = torch.ops.fastdcgan_cpu_amx.packed_weights
    before = cached()[0]
    results = [case.contract(on, "conv")[0] for on in (cpu, Kernels(), cpu, Kernels())]
    assert cached()[0] >= before + 1
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    case.weight.data.neg_()
    assert torch.equal(case.contract(cpu, "conv")[0], -results[0])


def network() -> nn.Sequential:
    torch.manual_seed(2)
    net = nn.Sequential(nn.ConvTranspose2d(10, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())  # fmt: skip
    return net.to(memory_format=torch.channels_last)


def test_networks(high: Callable[[str], None]) -> None:
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


def test_only_what_was_asked_for(high: Callable[[str], None]) -> None:
    cpu, case = Kernels("split_bf16"), block("wide", F32)
    for asked, expected in (("highest", False), ("high", True), ("medium", True), ("highest", False)):
        high(asked)
        assert [bool(cpu.able(call)) for call in case.calls().values()] == [expected] * 3
    high("high")
    for dtype in (torch.bfloat16, torch.float16):
        assert not any(cpu.able(call) for call in block("logit", dtype).calls().values())
    case.run(cpu)


def test_it_is_compared_with_float32(high: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is faster no rule says; explain has the times, and where the precision was not asked for it isn't named."""
    times = {"cpu split_bf16": 1.0, "pytorch": 2.0}

    def milliseconds(calls: dict, firsts: dict | None = None) -> dict:
        for call in calls.values():
            call()
        return {(name, tile): times.get(name, 3.0) for name, tile in calls}

    monkeypatch.setattr(autotune, "_comparing", True)
    monkeypatch.setattr(autotune, "_cpu_milliseconds", milliseconds)
    call = block("wide", F32).calls()["conv"]
    assert router.route(call, "cpu").algorithm.name == "cpu split_bf16"
    times["pytorch"] = 0.5
    assert router.route(call, "cpu").algorithm.name == "cpu split_bf16"  # it is known
    assert router.route(block("one sample", F32).calls()["conv"], "cpu").algorithm.name == "pytorch"
    times["pytorch"] = 2.0
    net = fastdcgan.fuse(network())
    with fastdcgan.backend("cpu"):
        assert str(fastdcgan.explain(net, torch.randn(4, 10, 1, 1))).count("cpu split_bf16 1.0000 ms") == 3
        high("highest")
        assert "split_bf16 1.0000" not in str(fastdcgan.explain(net, torch.randn(4, 10, 1, 1)))


def test_without_amx_high_is_highest(precision: Callable[[str], None]) -> None:
    if torch.ops.fastdcgan_cpu.amx_usable():
        pytest.skip("this processor has AMX")
    precision("high")
    reason = why_not(Kernels("split_bf16"), block("wide", F32).calls()["conv"])
    assert "it is for float32 on AMX tiles" in (reason or "")
    with pytest.raises(ValueError, match="no algorithm 'split_bf16'"):
        torch.ops.fastdcgan_cpu.weight_grad(
            torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 2, 2), (4, 4), (2, 2), (1, 1), (1, 1), "split_bf16"
        )
