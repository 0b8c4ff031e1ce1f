"""The C++ kernels of csrc/cpu against the reference in float64, for this processor and for older ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.base import Backend
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.spec import Operand
from tests.helpers.elementwise import check_elementwise, check_sums, coefficients, random, wide
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import run_capped

STATUS = backends.status()["cpu"]
pytestmark = pytest.mark.skipif(STATUS != "available", reason=STATUS)

REFERENCE = ReferenceBackend()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# (channels, height, width): whole vectors and not, planes of less than a vector and of many
SHAPES = [(1, 1, 1), (3, 1, 1), (3, 33, 31), (17, 7, 5), (17, 16, 17), (64, 4, 4), (64, 16, 16), (100, 2, 2), (1, 9, 9)]


@pytest.fixture
def cpu() -> Backend:
    return backends.get("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(cpu: Backend, act: str, dtype: torch.dtype) -> None:
    slope = ACTIVATIONS[act].default_slope
    for layout in LAYOUTS:
        y, da = (random((4, 19, 12, 11), dtype, layout, seed) for seed in (0, 1))
        for rows in (2, 4):
            coef = coefficients(rows, 2, 19)
            check_elementwise(cpu, y, da, coef, act, slope)
            check_sums(cpu, y, da, coef, act, slope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 5])
def test_slopes_for_each_channel(cpu: Backend, rows: int, dtype: torch.dtype) -> None:
    for layout, shape in itertools.product(LAYOUTS, SHAPES):
        y, da = (random((6, *shape), dtype, layout, seed) for seed in (0, 1))
        coef = coefficients(rows, 2, shape[0])
        check_elementwise(cpu, y, da, coef, "leaky_relu", 0.0)
        check_sums(cpu, y, da, coef, "leaky_relu", 0.0)
    with pytest.raises(ValueError, match=f"unknown activation id 3 for {rows} rows"):
        cpu.norm_act(Operand(y, None, coef, "tanh"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(cpu: Backend, shape: tuple[int, int, int], layout: torch.memory_format) -> None:
    for dtype in DTYPES:
        for groups in (1, 2):
            y, da = (random((6, *shape), dtype, layout, seed) for seed in (0, 1))
            coef = coefficients(4, groups, shape[0])
            check_elementwise(cpu, y, da, coef, "leaky_relu", 0.2)
            check_sums(cpu, y, da, coef, "leaky_relu", 0.2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [*SHAPES, (2100, 2, 1), (2, 100, 120)], ids=str)
def test_statistics(cpu: Backend, shape: tuple[int, int, int], layout: torch.memory_format) -> None:
    for dtype in DTYPES:
        y = random((6, *shape), dtype, layout)
        for groups in (1, 2):
            truth = REFERENCE.batch_stats(y.double(), groups)
            vanilla = REFERENCE.batch_stats(y.float(), groups)
            for row, name in enumerate(["mean", "biased variance", "unbiased variance"]):
                got = cpu.batch_stats(y, groups)[row]
                assert_as_accurate(got, vanilla[row], truth[row], name, scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("first", [0.0, 1000.0])
def test_statistics_of_a_large_mean(cpu: Backend, layout: torch.memory_format, first: float) -> None:
    """A mean of 1000 deviations; also where the values that a chunk starts with are nothing like the rest."""
    y = 1000 + torch.randn(8, 20, 32, 33, generator=torch.Generator().manual_seed(1))
    y[0, :, :2] += first - 1000
    y = y.contiguous(memory_format=layout)
    truth = REFERENCE.batch_stats(y.double(), 1)
    error = ((cpu.batch_stats(y, 1).double() - truth) / truth).abs().amax(dim=(1, 2))
    bound = 5e-7 if first == 1000 else 1e-5  # PyTorch's own: up to 5e-6 for both
    assert error[0] < 2e-7
    assert error[1:].max() < bound
    naive = y.square().mean(dim=(0, 2, 3)) - y.mean(dim=(0, 2, 3)).square()
    naive_error = float(((naive.double() - truth[1, 0]) / truth[1, 0]).abs().max())
    assert naive_error > bound or first == 0  # what this test catches


def test_nan_stays_where_it_is(cpu: Backend) -> None:
    for layout in LAYOUTS:
        y, da = (random((4, 5, 6, 7), torch.float32, layout, seed) for seed in (0, 1))
        y[1, 2, 3, 4] = da[2, 3, 1, 1] = math.nan
        coef = coefficients(4, 1, 5)
        assert cpu.batch_stats(y, 2).isnan().nonzero().tolist() == [[row, 0, 2] for row in range(3)]
        for act, row in ACTIVATIONS.items():
            slope = row.default_slope
            for a in (Operand(y, None, coef, act, slope), Operand(da, y, coef, act, slope)):
                assert torch.equal(cpu.norm_act(a).isnan(), REFERENCE.norm_act(a).isnan()), act
            sums, expected = (b.norm_act_reduce(da, y, coef, act, slope) for b in (cpu, REFERENCE))
            assert torch.equal(sums.isnan(), expected.isnan()), act
        learned = coefficients(5, 1, 5)
        for a in (Operand(y, None, learned, "leaky_relu"), Operand(da, y, learned, "leaky_relu")):
            assert torch.equal(cpu.norm_act(a).isnan(), REFERENCE.norm_act(a).isnan())
        sums, expected = (b.norm_act_reduce(da, y, learned, "leaky_relu", 0.0) for b in (cpu, REFERENCE))
        assert torch.equal(sums.isnan(), expected.isnan())


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivative_at_special_points(cpu: Backend, act: str) -> None:
    """At 0, far out and at NaN: exactly what the reference says, where that is exact."""
    z = torch.tensor([0.0, -0.0, -1e-30, 1e-30, -200.0, 200.0, math.nan]).reshape(1, 1, 1, -1)
    coef = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
    slope = ACTIVATIONS[act].default_slope
    for a in (Operand(z, None, coef, act, slope), Operand(torch.ones_like(z), z, coef, act, slope)):
        torch.testing.assert_close(cpu.norm_act(a), REFERENCE.norm_act(a), rtol=1e-6, atol=0, equal_nan=True)


def test_tanh_is_within_two_units_of_the_last_place(cpu: Backend) -> None:
    x = torch.cat([torch.linspace(-11, 11, 200_001), torch.logspace(-38, 1, 50_001)]).reshape(1, 1, 1, -1)
    got = cpu.norm_act(Operand(x, None, torch.tensor([1.0, 0.0]).reshape(2, 1, 1), "tanh")).double()
    truth = torch.tanh(x.double())
    error = ((got - truth) / truth).abs()[truth != 0].max()
    assert error < 2 * torch.finfo(torch.float32).eps


def test_per_channel_arithmetic(cpu: Backend) -> None:
    vectors = torch.randn(6, 2, 37, generator=torch.Generator().manual_seed(2))
    mean, var = vectors[0], vectors[1].square()
    weight, bias, shift = vectors[2:5, 0]
    for w, b, s in [(weight, bias, shift), (weight, None, None), (None, None, shift), (None, bias, None)]:
        given64 = [None if v is None else v.double() for v in (w, b, s)]
        got, vanilla = (backend.coefficients(mean, var, w, b, s, 1e-5) for backend in (cpu, REFERENCE))
        assert_as_accurate(got, vanilla, REFERENCE.coefficients(*wide(mean, var), *given64, 1e-5), "coefficients")
    half = [v.bfloat16() for v in (weight, bias, shift)]
    torch.testing.assert_close(cpu.coefficients(mean, var, *half, 1e-5), REFERENCE.coefficients(mean, var, *half, 1e-5))
    coef, sums = cpu.coefficients(mean, var, weight, bias, None, 1e-5), vectors[4:6]
    got, vanilla = (backend.grad_coefficients(sums, coef, 50.0) for backend in (cpu, REFERENCE))
    assert_as_accurate(
        got, vanilla, REFERENCE.grad_coefficients(*wide(sums, coef), 50.0), "coefficients of the gradient"
    )


def test_one_value_per_channel(cpu: Backend) -> None:
    y = random((1, 5, 1, 1), torch.float32, torch.contiguous_format)
    stats = cpu.batch_stats(y, 1)
    assert torch.equal(stats[0], y[None, 0, :, 0, 0]) and torch.equal(stats[1], torch.zeros(1, 5))
    assert not stats[2].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4), (4, 0, 3, 3)], ids=str)
def test_nothing(cpu: Backend, shape: tuple[int, ...]) -> None:
    y, coef = torch.empty(shape), coefficients(4, 1, shape[1])
    for a in (Operand(y, None, coef, "relu"), Operand(y, y, coef, "relu")):
        assert cpu.norm_act(a).shape == shape
    assert torch.equal(cpu.norm_act_reduce(y, y, coef, "relu", 0.0), torch.zeros(2, 1, shape[1]))
    for backend in (cpu, REFERENCE):
        with pytest.raises(RuntimeError, match="at least one element"):
            backend.batch_stats(y, 1)


def test_layouts_mix(cpu: Backend) -> None:
    """A gradient in another memory format than y, and tensors that are not dense."""
    y = random((4, 17, 8, 18), torch.float32, torch.channels_last)
    da = random((4, 17, 8, 18), torch.float32, torch.contiguous_format, 1)
    coef = coefficients(4, 1, 17)
    for y_, da_ in [(y, da), (da, y), (y[..., ::2], da[..., ::2]), (y, da[:, :1].expand_as(y))]:
        a = Operand(da_, y_, coef, "tanh")
        torch.testing.assert_close(cpu.norm_act(a), REFERENCE.norm_act(a), rtol=1e-5, atol=1e-5)
        expected, expected_sums = REFERENCE.grad_stats(da_, y_, coef, "tanh", 0.0)
        for grad_stats, given in ((cpu.grad_stats, da_), (cpu.grad_stats_, da_.clone())):
            g, sums = grad_stats(given, y_, coef, "tanh", 0.0)
            torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=1e-3)
    assert cpu.norm_act(Operand(y, None, coef, "relu")).is_contiguous(memory_format=torch.channels_last)
    assert cpu.norm_act(Operand(da, None, coef, "relu")).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 70])
def test_large_results(cpu: Backend, channels: int, dtype: torch.dtype) -> None:
    """From 4 MiB on, what is stored past the caches (rows of whole vectors) is what small tensors get, to the bit."""
    samples, coef = 40 * 4 // dtype.itemsize, coefficients(4, 2, channels)
    y = random((samples, channels, 21, 23), dtype, torch.channels_last)
    assert y.nbytes >= 4 << 20
    got = cpu.norm_act(Operand(y, None, coef, "leaky_relu", 0.2))
    assert torch.equal(cpu.norm_act_(Operand(y.clone(), None, coef, "leaky_relu", 0.2)), got)
    for n in range(samples):
        part = coef[:, 2 * n // samples][:, None].contiguous()
        assert torch.equal(cpu.norm_act(Operand(y[n : n + 1], None, part, "leaky_relu", 0.2)), got[n : n + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_in_place(cpu: Backend, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """The same bits as out of place, in the memory of the first tensor."""
    y, da = (random((4, 19, 12, 11), dtype, layout, seed) for seed in (0, 1))
    for rows in (2, 4):
        coef = coefficients(rows, 2, 19)
        for a in (Operand(y, None, coef, "tanh"), Operand(da, y, coef, "tanh")):
            given = a._replace(x=a.x.clone())
            got = cpu.norm_act_(given)
            assert got is given.x and torch.equal(got, cpu.norm_act(a))
    given_da = da.clone()
    (dy, sums), expected = (
        cpu.normalize_backward_(given_da, y, coef, 264, "relu", 0.0),
        cpu.normalize_backward(da, y, coef, 264, "relu", 0.0),
    )
    assert dy is given_da and torch.equal(dy, expected[0]) and torch.equal(sums, expected[1])


def test_in_place_only_where_it_lies_alike(cpu: Backend) -> None:
    y = random((4, 17, 8, 18), torch.float32, torch.channels_last)
    da = random((4, 17, 8, 18), torch.float32, torch.contiguous_format, 1)
    coef = coefficients(4, 1, 17)
    for y_, da_ in [(y, da), (da, y), (y, da[:, :1].expand_as(y)), (y[..., ::2], da[..., ::2])]:
        before = da_.clone()
        a = Operand(da_, y_, coef, "tanh")
        assert torch.equal(cpu.norm_act_(a), cpu.norm_act(a))
        got, expected = (f(da_, y_, coef, 576, "tanh", 0.0) for f in (cpu.normalize_backward_, cpu.normalize_backward))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(da_, before)
        if not y_.is_contiguous(memory_format=torch.channels_last):
            forward = Operand(y_[..., ::2], None, coef, "tanh")
            assert torch.equal(cpu.norm_act_(forward), cpu.norm_act(forward))
    with pytest.raises(ValueError, match="expected tensors in memory format ChannelsLast"):
        torch.ops.fastdcgan_cpu.norm_act_backward_(da, y, coef, 0, 0.0)
    with pytest.raises(ValueError, match="expected tensors in memory format"):
        torch.ops.fastdcgan_cpu.norm_act_(y[..., ::2], coef, 0, 0.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_same_bits_whatever_the_threads(cpu: Backend, layout: torch.memory_format) -> None:
    y, da = (random((16, 67, 33, 32), torch.float32, layout, seed) for seed in (0, 1))
    coef = coefficients(4, 2, 67)

    def everything() -> list[Tensor]:
        a, b = Operand(y, None, coef, "tanh"), Operand(da, y, coef, "tanh")
        return [cpu.batch_stats(y, 2), cpu.norm_act_reduce(da, y, coef, "tanh", 0.0), cpu.norm_act(a), cpu.norm_act(b)]

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            assert torch.ops.fastdcgan_cpu.threads() == count
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_bad_calls(cpu: Backend) -> None:
    y, coef = torch.zeros(4, 3, 2, 2), torch.zeros(4, 1, 3)
    with pytest.raises(ValueError, match=r"N, C, H, W.*got 2 dimensions"):
        torch.ops.fastdcgan_cpu.batch_stats(y[0, 0], 1)
    with pytest.raises(ValueError, match="a batch of 4 can't have 3"):
        cpu.batch_stats(y, 3)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got Double"):
        cpu.batch_stats(y.double(), 1)
    with pytest.raises(ValueError, match=r"groups, 3\], got \[4, 1, 2\]"):
        cpu.norm_act(Operand(y, None, coef[:, :, :2], "relu"))
    with pytest.raises(TypeError, match="float32 coefficients, got Double"):
        cpu.norm_act(Operand(y, None, coef.double(), "relu"))
    with pytest.raises(TypeError, match="dtype Float, got Half"):
        cpu.norm_act_reduce(y.half(), y, coef, "relu", 0.0)
    with pytest.raises(ValueError, match=r"shape \[4, 3, 2, 2\], got \[4, 3, 2, 1\]"):
        cpu.norm_act_reduce(y[..., :1], y, coef, "relu", 0.0)
    with pytest.raises(ValueError, match="unknown activation id 99"):
        torch.ops.fastdcgan_cpu.norm_act(y, coef, 99, 0.0)


def test_what_it_takes(cpu: Backend) -> None:
    assert all(cpu.why_not("cpu", dtype) is None for dtype in DTYPES)
    assert cpu.why_not("cpu", torch.float64) == "it takes float32, bfloat16, float16, not float64"
    assert "not 'cuda'" in (cpu.why_not("cuda", torch.float32) or "")


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_vector_widths(capability: str) -> None:
    """The same tests on the library for an older processor."""
    tests = "test_shapes or test_activations or test_statistics or test_nan or test_derivative or test_tanh"
    run_capped(__file__, capability, tests)
