"""The contractions of bfloat16 whose products are of pairs, on emulations of the instructions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Epilogue
from tests.csrc.cpu import amx_library
from tests.csrc.cpu.test_contractions import BLOCKS, K4, REFERENCE, Case, Kernels, block
from tests.helpers.tolerance import assert_as_accurate

REASON = amx_library.why_not() or (backends.status()["cpu"] if backends.status()["cpu"] != "available" else None)
pytestmark = [pytest.mark.compiles, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
BF16 = torch.bfloat16


@pytest.fixture(params=["amx", "avx512_bf16"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Those of one extension alone."""
    request.getfixturevalue("emulated" if request.param == "amx" else "emulated_operators")
    return Kernels(f"{request.param}_col2im", request.param)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(kernels: Kernels, name: str) -> None:
    block(name, BF16).check(kernels)


@settings(max_examples=100)
@given(data=st.data())
def test_drawn_geometries(kernels: Kernels, data: st.DataObject) -> None:
    def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(low, high), st.integers(low, high))

    g = Geometry(data.draw(pair(1, 5)), data.draw(pair(1, 4)), data.draw(pair(0, 4)), data.draw(pair(1, 3)))
    size = data.draw(pair(1, 9))
    assume(min(g.conv_size(*size)) >= 1)
    # PyTorch 2.13's own crashes on some where taps read nothing but padding.
    assume(all(p <= d * (k - 1) for p, d, k in zip(g.padding, g.dilation, g.kernel, strict=True)))
    channels = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 270]))
    Case(data.draw(st.integers(1, 5)), data.draw(channels), size, data.draw(channels), g, BF16).check(kernels)


@pytest.mark.parametrize(("out", "channels"), [(64, 3), (64, 64)])
def test_more_rows_than_fit_a_block(kernels: Kernels, out: int, channels: int) -> None:
    Case(5, channels, (32, 32), out, K4, BF16).check(kernels)


@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_activated_outputs(kernels: Kernels, act: str) -> None:
    for name in ("wide", "image"):
        case = block(name, BF16)
        for op, channels in (("conv", case.dy.shape[1]), ("conv_transpose", case.x.shape[1])):
            coef = torch.randn(4, 1, channels, generator=torch.Generator().manual_seed(4)) * 0.1
            e = Epilogue("activate", None, coef, act, ACTIVATIONS[act].default_slope)
            results = [found[0] for found in case.three(kernels, op, e)]
            assert_as_accurate(*results, f"{op} of {name} with {act}", reduction=case.terms(op), scale=1.0)


@pytest.mark.parametrize("groups", [1, 2])
def test_statistics(kernels: Kernels, groups: int) -> None:
    case = Case(4, 24, (16, 16), 50, K4, BF16)
    for op in ("conv", "conv_transpose"):
        e = Epilogue("stats", stat_groups=groups)
        out, stats = case.contract(kernels, op, e)
        assert torch.equal(out, case.contract(kernels, op)[0])
        truth = REFERENCE.batch_stats(out.double(), groups)  # of what is stored
        scale = float(truth[1].mean().sqrt())
        assert (stats[0] - truth[0]).abs().max() < 1e-5 * scale
        assert (stats[1:] - truth[1:]).abs().max() < 1e-5 * scale**2


def test_a_weight_may_lie_as_it_likes(kernels: Kernels) -> None:
    for name in ("wide", "wide, few pixels", "image", "logit", "projection", "odd"):
        case = block(name, BF16)
        expected = case.run(kernels)
        plain = case.weight.contiguous(memory_format=torch.contiguous_format)
        reversed_ = plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        apart = torch.zeros(*plain.shape, 2, dtype=BF16)[..., 0].copy_(plain)
        for case.weight in (plain, reversed_, apart):
            assert all(torch.equal(result, expected[op]) for op, result in case.run(kernels).items())


@pytest.mark.parametrize("name", ["wide", "image", "projection", "one sample", "odd"])
def test_float32_weights_are_rounded(kernels: Kernels, name: str) -> None:
    """As autocast has them: the bits of a weight that was cast."""
    case = block(name, BF16)
    weight = case.weight + torch.randn_like(case.weight, dtype=torch.float32) * 2.0**-9
    before = {op: case.contract(kernels, op)[0] for op in ("conv", "conv_transpose")}
    for op in before:
        case.weight = weight.to(BF16)
        expected = case.contract(kernels, op)[0]
        case.weight = weight
        assert torch.equal(case.contract(kernels, op)[0], expected)
        assert not torch.equal(before[op], expected)


@pytest.mark.parametrize("name", ["wide", "image", "projection", "one sample"])
def test_same_bits_whatever_the_threads(kernels: Kernels, name: str) -> None:
    block(name, BF16).check_threads(kernels)


@pytest.mark.parametrize("name", ["wide", "projection", "one sample"])
def test_what_is_not_finite_stays_where_it_is(kernels: Kernels, name: str) -> None:
    case = block(name, BF16)
    case.x[-1, 1, 2, 3] = math.nan
    height, width = case.dy.shape[2:]
    case.dy[0, 0, height // 2, width // 2] = math.inf
    got, expected = case.run(kernels), case.run(REFERENCE, wide=True)
    for op in got:
        assert torch.equal(got[op].isnan(), expected[op].isnan()), op
        assert torch.equal(got[op].isinf(), expected[op].isinf()), op
