"""Elementwise passes and reductions of csrc/cuda on a CPU: under the sanitizers, and against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.base import Backend
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.spec import Operand
from tests.cuda_on_cpu.host_library import ORDERS, HostCUDABackend, set_multiprocessors, set_order
from tests.cuda_on_cpu.host_programs import MODES, assert_passes, needs_compiler
from tests.helpers.elementwise import check_elementwise, check_sums, coefficients, random
from tests.helpers.tolerance import assert_as_accurate

pytestmark = needs_compiler

REFERENCE = ReferenceBackend()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(scope="module")
def cuda() -> Backend:
    backend = HostCUDABackend()
    backend.require()
    return backend


@pytest.mark.parametrize("mode", MODES)
def test_kernels(mode: str) -> None:
    assert_passes("elementwise_tests", mode)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], int, torch.dtype, torch.memory_format]:
    """(shape, groups, dtype, layout)"""
    groups = draw(st.integers(1, 3))
    channels = draw(st.one_of(st.integers(1, 20), st.sampled_from([24, 32, 63, 64, 65, 72])))
    shape = (groups * draw(st.integers(1, 4)), channels, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return shape, groups, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))


@settings(max_examples=60)
@given(case=cases(), act=st.sampled_from(list(ACTIVATIONS)), rows=st.integers(2, 5), size=st.integers(1, 3))
@example(case=((2, 64, 9, 9), 1, torch.bfloat16, torch.channels_last), act="relu", rows=4, size=1)
@example(case=((2, 64, 9, 9), 2, torch.bfloat16, torch.channels_last), act="leaky_relu", rows=5, size=2)
@example(case=((2, 64, 9, 9), 2, torch.float32, torch.contiguous_format), act="leaky_relu", rows=3, size=2)
def test_passes_are_as_accurate_as_pytorch(cuda: Backend, case: tuple, act: str, rows: int, size: int) -> None:
    shape, groups, dtype, layout = case
    set_multiprocessors(size)
    y, da = (random(shape, dtype, layout, seed) for seed in (0, 1))
    coef, act = coefficients(rows, groups, shape[1]), "leaky_relu" if rows % 2 else act
    check_elementwise(cuda, y, da, coef, act, ACTIVATIONS[act].default_slope)
    check_sums(cuda, y, da, coef, act, ACTIVATIONS[act].default_slope)


@settings(max_examples=60)
@given(case=cases(), mean=st.sampled_from([0.0, 30.0]), size=st.integers(1, 3))
def test_statistics_are_as_accurate_as_pytorch(cuda: Backend, case: tuple, mean: float, size: int) -> None:
    shape, groups, dtype, layout = case
    set_multiprocessors(size)
    y = (random(shape, torch.float32, layout) + mean).to(dtype)
    truth, vanilla = (REFERENCE.batch_stats(x, groups) for x in (y.double(), y.float()))
    got = cuda.batch_stats(y, groups)
    for row, name in enumerate(["mean", "biased variance", "unbiased variance"]):
        if row == 2 and y.numel() == groups * shape[1]:
            assert got[row].isnan().all()  # of one value
            continue
        # PyTorch's variance is computed in double on a CPU; this one rounds in float as it goes.
        assert_as_accurate(got[row], vanilla[row], truth[row], name, reduction=y.numel() // shape[1], scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation(cuda: Backend, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """With vectors and without."""
    for act, row in ACTIVATIONS.items():
        for shape in ((2, 8, 4, 4), (1, 3, 3, 3)):
            y, da = (random(shape, dtype, layout, seed) for seed in (0, 1))
            check_elementwise(cuda, y, da, coefficients(4, 1, shape[1]), act, row.default_slope)
            check_sums(cuda, y, da, coefficients(4, 1, shape[1]), act, row.default_slope)


def results(cuda: Backend, y: Tensor, da: Tensor, groups: int) -> list[Tensor]:
    stats = cuda.batch_stats(y, groups)
    coef = cuda.coefficients(stats[0], stats[1], None, None, None, 1e-5)
    sums = cuda.norm_act_reduce(da, y, coef, "leaky_relu", 0.2)
    grad_coef = cuda.grad_coefficients(sums, coef, y.numel() // groups)
    out = [cuda.norm_act(Operand(y, None, coef, "tanh")), cuda.norm_act(Operand(da, y, grad_coef, "leaky_relu", 0.2))]
    return [stats, coef, sums, grad_coef, *out, *cuda.grad_stats(da, y, coef, "silu", 0.0)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_the_same_bits_in_every_order_of_threads(cuda: Backend, layout: torch.memory_format) -> None:
    for shape in ((4, 24, 6, 6), (2, 5, 7, 3)):
        y, da = (random(shape, torch.bfloat16, layout, seed) for seed in (0, 1))
        try:
            found = []
            for order in ORDERS:
                set_order(order)
                found.append(results(cuda, y, da, 2))
        finally:
            set_order("forward")
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("given", [False, True])
def test_coefficients_and_running_statistics(cuda: Backend, given: bool) -> None:
    """Bit for bit those of the C++ CPU backend, which has PyTorch's roundings."""
    from fastdcgan.backends.cpu import CPUBackend

    cpu = CPUBackend()
    cpu.require()
    stats = torch.rand(3, 2, 37) + 0.5
    vectors = [torch.randn(37).bfloat16() if given else None for _ in range(3)]
    coef = cuda.coefficients(stats[0], stats[1], *vectors, 1e-5)
    torch.testing.assert_close(coef, cpu.coefficients(stats[0], stats[1], *vectors, 1e-5), rtol=2e-7, atol=1e-7)
    sums = torch.randn(2, 2, 37)
    torch.testing.assert_close(
        cuda.grad_coefficients(sums, coef, 48.0), cpu.grad_coefficients(sums, coef, 48.0), rtol=2e-7, atol=1e-7
    )
    for factor in (None, torch.tensor([0.3, 0.7])):
        running = torch.randn(37), torch.rand(37)
        again = tuple(t.clone() for t in running)
        cuda.update_running(*running, stats, vectors[0], factor, 0.1)
        cpu.update_running(*again, stats, vectors[0], factor, 0.1)
        assert torch.equal(running[0], again[0]) and torch.equal(running[1], again[1])


def test_running_statistics_that_are_not_float_vectors(cuda: Backend) -> None:
    stats = torch.rand(3, 1, 4)
    mean, var = torch.zeros(4, 2)[:, 0], torch.ones(4).bfloat16()
    cuda.update_running(mean, var, stats, None, None, 0.5)
    torch.testing.assert_close(mean, stats[0, 0] / 2)
    torch.testing.assert_close(var.float(), (1 + stats[2, 0]) / 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_are_taken(cuda: Backend, dtype: torch.dtype) -> None:
    base = random((4, 16, 6, 10), dtype, torch.contiguous_format)
    coef = coefficients(4, 2, 8)
    for y in (base[:, ::2], base[:, 1:9, :, 1:9], base[:, :8].permute(0, 1, 3, 2), base[:, 3:4].expand(4, 8, 6, 10)):
        got = cuda.norm_act(Operand(y, None, coef, "relu"))
        expected = REFERENCE.norm_act(Operand(y.double(), None, coef.double(), "relu"))
        torch.testing.assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        stats = REFERENCE.batch_stats(y.double(), 2).float()
        torch.testing.assert_close(cuda.batch_stats(y, 2), stats, rtol=1e-5, atol=1e-5)
        da = y.flip(0)
        sums = cuda.norm_act_reduce(da, y, coef, "relu", 0.0)
        expected = REFERENCE.norm_act_reduce(da.double(), y.double(), coef.double(), "relu", 0.0)
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-3)


def test_vectors_between_addresses_of_vectors(cuda: Backend) -> None:
    """Dense tensors whose first element is no vector's address."""
    flat = random((2, 16, 5, 5), torch.bfloat16, torch.contiguous_format).flatten()
    coef = coefficients(4, 1, 16)
    for offset in (0, 1):
        y = torch.as_strided(flat, (1, 16, 5, 5), (400, 1, 80, 16), offset)
        expected = REFERENCE.norm_act(Operand(y.double(), None, coef.double(), "tanh"))
        got = cuda.norm_act(Operand(y, None, coef, "tanh"))
        torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)


def test_nan_and_infinity_stay_in_their_channel(cuda: Backend) -> None:
    for layout in LAYOUTS:
        y, da = (random((4, 5, 6, 7), torch.float32, layout, seed) for seed in (0, 1))
        y[1, 2, 3, 4] = da[2, 3, 1, 1] = math.nan
        y[3, 0, 1, 1] = math.inf
        assert cuda.batch_stats(y, 2)[0].isfinite().logical_not().nonzero().tolist() == [[0, 2], [1, 0]]
        coef = coefficients(4, 1, 5)
        for act, row in ACTIVATIONS.items():
            for a in (Operand(y, None, coef, act, row.default_slope), Operand(da, y, coef[:2], act, row.default_slope)):
                assert torch.equal(cuda.norm_act(a).isnan(), REFERENCE.norm_act(a).isnan()), act


def test_empty_tensors(cuda: Backend) -> None:
    y = torch.empty(0, 5, 4, 4)
    coef = coefficients(4, 1, 5)
    assert cuda.norm_act(Operand(y, None, coef, "relu")).shape == y.shape
    assert cuda.norm_act(Operand(y, y, coef, "relu")).shape == y.shape
    g, sums = cuda.grad_stats(y, y, coef, "relu", 0.0)
    assert g.shape == y.shape and torch.equal(sums, torch.zeros(2, 1, 5))
    with pytest.raises(RuntimeError, match=r"expected at least one element, got a tensor \[0, 5, 4, 4\]"):
        cuda.batch_stats(y, 1)


def test_wrong_arguments_are_refused(cuda: Backend) -> None:
    y = torch.randn(4, 5, 3, 3)
    coef = coefficients(4, 1, 5)
    ops = torch.ops.fastdcgan_cuda_on_cpu
    for message, call in {
        r"expected a tensor \[N, C, H, W\], got \[5, 3, 3\]": lambda: ops.norm_act(y[0], coef, 0, 0.0),
        "expected float32, bfloat16 or float16": lambda: ops.norm_act(y.double(), coef, 0, 0.0),
        r"expected coefficients \[2 to 5, groups, 5\], got \[1, 1, 5\]": lambda: ops.norm_act(y, coef[:1], 0, 0.0),
        "expected leaky_relu with slopes, got id 0": lambda: ops.norm_act(y, coef[:3], 0, 0.0),
        "expected float32 coefficients": lambda: ops.norm_act(y, coef.double(), 0, 0.0),
        "a batch of 4 can't have 3 statistics groups": lambda: ops.batch_stats(y, 3),
        "can't have 0 statistics groups": lambda: ops.batch_stats(y, 0),
        "unknown activation id": lambda: ops.norm_act(y, coef, len(ACTIVATIONS), 0.0),
        "expected a gradient of the dtype and shape": lambda: ops.norm_act_backward(y[:2], y, coef, 0, 0.0),
        "expected a gradient of the dtype": lambda: ops.norm_act_reduce(y.half(), y, coef, 0, 0.0),
        r"expected a vector \[5\], got \[4\]": lambda: ops.coefficients(
            coef[0], coef[1], torch.ones(4), None, None, 1e-5
        ),
        "expected mean and variance": lambda: ops.coefficients(coef[0], coef[1, :, :4], None, None, None, 1e-5),
        "expected sums": lambda: ops.grad_coefficients(coef[:1], coef, 9.0),
        "expected contiguous float32 running statistics": lambda: ops.update_running_(
            torch.ones(5).half(), torch.ones(5), coef[:3], None, None, 0.1
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
