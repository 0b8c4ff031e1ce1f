"""The contractions of csrc/cpu between images and features, against float64, for this processor and for older ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Epilogue
from tests.csrc.cpu.test_contractions import DTYPES, K4, REFERENCE, STATUS, Case, Kernels
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import run_capped

pytestmark = pytest.mark.skipif(STATUS != "available", reason=STATUS)

K3, K5 = Geometry((3, 3), padding=(1, 1)), Geometry((5, 5), (2, 2), (2, 2))
# (batch, channels and size of the image, features, geometry): images of several bands of rows, rows of several tiles,
# whole and ragged vectors of features, and more of them than one tile has
IMAGES = {
    "64 features": (2, 3, (64, 64), 64, K4),
    "16 features": (5, 1, (32, 32), 16, K4),
    "ragged": (3, 3, (18, 42), 37, K4),
    "wide": (2, 4, (12, 20), 130, K4),
    "3x3": (2, 3, (19, 33), 48, K3),
    "5x5": (2, 1, (21, 65), 32, K5),
    "one row": (3, 2, (4, 50), 64, Geometry((4, 4), (2, 2), (0, 1))),
    "dilated": (2, 3, (20, 23), 24, Geometry((3, 4), (1, 2), (2, 3), (2, 3))),
}


@pytest.fixture
def cpu() -> Kernels:
    return Kernels()


def image(name: str, dtype: torch.dtype) -> Case:
    return Case(*IMAGES[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_images(cpu: Kernels, name: str, dtype: torch.dtype) -> None:
    image(name, dtype).check(cpu)


@settings(max_examples=150)
@given(data=st.data())
def test_drawn_geometries(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(low, high), st.integers(low, high))

    dilation = data.draw(st.one_of(st.just((1, 1)), pair(1, 3)))
    g = Geometry(data.draw(pair(1, 6)), data.draw(pair(1, 3)), data.draw(pair(0, 7)), dilation)
    size = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 40)))
    assume(min(g.conv_size(*size)) >= 1)
    features = st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 48, 64, 80, 128]))
    batch, channels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    Case(batch, channels, size, data.draw(features), g, data.draw(st.sampled_from(DTYPES))).check(Kernels())


def test_many_slices_of_pixels(cpu: Kernels) -> None:
    """As many of a weight's gradient as there ever are, of different lengths."""
    Case(36, 1, (128, 130), 16, K4, torch.float32).check(cpu)


@pytest.mark.parametrize("name", ["64 features", "ragged", "wide", "dilated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activated_outputs(cpu: Kernels, dtype: torch.dtype, name: str) -> None:
    case = image(name, dtype)
    for act in ("leaky_relu", "tanh"):
        for op, channels in (("conv", case.dy.shape[1]), ("conv_transpose", case.x.shape[1])):
            coef = torch.randn(4, 1, channels, generator=torch.Generator().manual_seed(4)) * 0.1
            e = Epilogue("activate", None, coef, act, ACTIVATIONS[act].default_slope)
            results = [found[0] for found in case.three(cpu, op, e)]
            assert_as_accurate(*results, f"{op} with {act}", reduction=case.terms(op), scale=1.0)


@pytest.mark.parametrize("name", ["64 features", "ragged", "wide", "one row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_statistics(cpu: Kernels, groups: int, dtype: torch.dtype, name: str) -> None:
    _, channels, size, features, g = IMAGES[name]
    case = Case(4, channels, size, features, g, dtype)
    (out, got), (_, vanilla), (_, truth) = case.three(cpu, "conv", Epilogue("stats", stat_groups=groups))
    assert torch.equal(out, case.run(cpu)["conv"])
    for row, what in enumerate(["mean", "biased variance", "unbiased variance"]):
        assert_as_accurate(
            got[row], vanilla[row].float(), truth[row], what, reduction=case.terms("conv"),
            scale=float(truth[1].mean().sqrt()),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["64 features", "ragged", "3x3"])
def test_what_is_not_finite_stays_where_it_is(cpu: Kernels, name: str) -> None:
    case = image(name, torch.float32)
    case.x[-1, 1, 2, 3] = math.nan
    case.x[0, 0, -3, -4] = -math.inf
    height, width = case.dy.shape[2:]
    case.dy[0, 0, height // 2, width // 2] = math.inf  # no tap reads padding there: PyTorch multiplies that with zeros
    case.dy[-1, -1, 1, -2] = math.nan
    got, expected = case.run(cpu), case.run(REFERENCE, wide=True)
    for op in got:
        assert torch.equal(got[op].isnan(), expected[op].isnan()), op
        assert torch.equal(got[op].isinf(), expected[op].isinf()), op


@pytest.mark.parametrize("name", ["64 features", "ragged"])
def test_denormal_numbers(cpu: Kernels, name: str) -> None:
    case = image(name, torch.float32)
    case.x *= 1e-39
    case.dy *= 1e-39
    case.weight.copy_(case.weight.sign())
    got, expected = case.run(cpu), case.run(REFERENCE, wide=True)
    for op in ("conv", "conv_transpose"):
        assert (got[op].double() - expected[op]).abs().max() <= 1e-5 * expected[op].abs().max(), op


@pytest.mark.parametrize("times", [1, 10])
@pytest.mark.parametrize("name", IMAGES)
def test_same_bits_whatever_the_threads(cpu: Kernels, name: str, times: int) -> None:
    batch, channels, size, features, g = IMAGES[name]
    case = Case(times * batch, channels, size, features, g, torch.float32 if times == 1 else torch.bfloat16)
    case.check_threads(cpu)


def test_avx2() -> None:
    """The same tests on the library for an older processor."""
    run_capped(__file__, "avx2", "test_images or test_drawn or test_statistics or test_activated or test_what_is_not")
