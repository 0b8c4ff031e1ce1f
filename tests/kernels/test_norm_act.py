"""The normalise-and-activate passes and reductions of `kernels/norm_act.py`, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.kernels import norm_act as kernels
from fastdcgan.kernels.elementwise import PassConfig, dense, matrices_of, reduction_config
from fastdcgan.spec import Operand
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import DEVICE, examples

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")
REFERENCE = ReferenceBackend()
DTYPES = st.sampled_from([torch.float32, torch.float16])
FORMATS = st.sampled_from([torch.channels_last, torch.contiguous_format])
ACTS = st.sampled_from(sorted(ACTIVATIONS))
# (images of a group, groups, channels, height, width)
SHAPES = st.tuples(
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([1, 2, 3, 5, 16, 33, 64, 100]),
    st.integers(1, 9),
    st.integers(1, 9),
)
Shape = tuple[int, int, int, int, int]


def draw(shape: Shape, dtype: torch.dtype, layout: torch.memory_format, shift: float = 0.5) -> Tensor:
    n, groups, c, h, w = shape
    x = torch.randn(n * groups, c, h, w) + shift
    return x.to(DEVICE, dtype).contiguous(memory_format=layout)


def draw_coef(shape: Shape, rows: int) -> Tensor:
    """(s, t, mean, rstd) or (s, t, p, q): any numbers do. An odd number of rows ends with leaky_relu's slopes."""
    coef = torch.rand(rows, shape[1], shape[2]) + 0.5
    if rows % 2:
        coef[-1] = coef[-1, :1] - 1
    return coef.to(DEVICE)


def assert_map(got: Tensor, operand: Operand) -> None:
    wide = operand._replace(
        x=operand.x.double(), y=None if operand.y is None else operand.y.double(), coef=operand.coef.double()
    )
    assert_as_accurate(got, REFERENCE.norm_act(operand), REFERENCE.norm_act(wide), f"{operand.act}")
    assert got.stride() == operand.x.stride()


@settings(max_examples=examples(12))
@given(shape=SHAPES, dtype=DTYPES, layout=FORMATS, act=ACTS)
@example(shape=(2, 2, 64, 6, 6), dtype=torch.float16, layout=torch.channels_last, act="relu")
def test_activate(shape: Shape, dtype: torch.dtype, layout: torch.memory_format, act: str) -> None:
    operand = Operand(draw(shape, dtype, layout), None, draw_coef(shape, 4), act, 0.3)
    assert_map(kernels.norm_act(operand), operand)


@settings(max_examples=examples(12))
@given(shape=SHAPES, dtype=DTYPES, layout=FORMATS, rows=st.sampled_from([3, 5]))
def test_slopes_for_each_channel(shape: Shape, dtype: torch.dtype, layout: torch.memory_format, rows: int) -> None:
    da, y, coef = draw(shape, dtype, layout, 0.0), draw(shape, dtype, layout, 0.0), draw_coef(shape, rows)
    for operand in (Operand(y, None, coef, "leaky_relu"), Operand(da, y, coef, "leaky_relu")):
        assert_map(kernels.norm_act(operand), operand)
    assert_sums(kernels.norm_act_reduce(da, y, coef, "leaky_relu", 0.3), da, y, coef, "leaky_relu")


@settings(max_examples=examples(12))
@given(shape=SHAPES, dtype=DTYPES, layout=FORMATS, act=ACTS, rows=st.sampled_from([2, 4]))
@example(shape=(2, 2, 64, 6, 6), dtype=torch.float16, layout=torch.channels_last, act="leaky_relu", rows=4)
def test_bn_backward(shape: Shape, dtype: torch.dtype, layout: torch.memory_format, act: str, rows: int) -> None:
    da, y = draw(shape, dtype, layout), draw(shape, dtype, layout)
    operand = Operand(da, y, draw_coef(shape, rows), act, 0.3)
    assert_map(kernels.norm_act(operand), operand)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_activations_at_every_kind_of_number(act: str) -> None:
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 100.0, -100.0, 1e-30, -1e-30, 1e30])
    z = torch.cat([special, torch.linspace(-12, 12, 246)]).reshape(1, 1, 16, 16).to(DEVICE)
    identity = torch.stack([torch.ones(1, 1), torch.zeros(1, 1)]).to(DEVICE)
    row = ACTIVATIONS[act]
    got = kernels.norm_act(Operand(z, None, identity, act, 0.3))
    derivative = kernels.norm_act(Operand(torch.ones_like(z), z, identity, act, 0.3))
    for found, expected in ((got, row.forward(z, 0.3)), (derivative, row.derivative(z, 0.3))):
        settled = expected.isfinite() | ~z.isinf()  # what inf - inf gives is nobody's convention
        torch.testing.assert_close(found[settled], expected[settled], rtol=5e-6, atol=1e-6, equal_nan=True)


def assert_sums(got: Tensor, da: Tensor, y: Tensor, coef: Tensor, act: str) -> None:
    truth = REFERENCE.norm_act_reduce(da.double(), y.double(), coef.double(), act, 0.3)
    usual = REFERENCE.norm_act_reduce(da.float(), y.float(), coef, act, 0.3)
    terms = da.numel() // coef[0].numel()
    assert_as_accurate(got, usual, truth, "sums", reduction=terms, scale=terms**0.5)


@settings(max_examples=examples(12))
@given(shape=SHAPES, dtype=DTYPES, layout=FORMATS, act=ACTS, rows=st.sampled_from([2, 4]))
@example(shape=(3, 2, 64, 6, 6), dtype=torch.float16, layout=torch.channels_last, act="relu", rows=4)
@example(shape=(1, 1, 3, 8, 8), dtype=torch.float32, layout=torch.channels_last, act="tanh", rows=2)
def test_gradient_sums(shape: Shape, dtype: torch.dtype, layout: torch.memory_format, act: str, rows: int) -> None:
    da, y, coef = draw(shape, dtype, layout, 0.0), draw(shape, dtype, layout), draw_coef(shape, rows)
    before = da.clone()
    g, sums = kernels.grad_stats(da, y, coef, act, 0.3)
    assert torch.equal(da, before)
    assert torch.equal(sums, kernels.norm_act_reduce(g, y, coef, "identity", 0.0)), "not the sums of what is stored"
    truth, _ = REFERENCE.grad_stats(da.double(), y.double(), coef.double(), act, 0.3)
    usual, _ = REFERENCE.grad_stats(da, y, coef, act, 0.3)
    assert_as_accurate(g, usual, truth, "g")
    assert g.stride() == y.stride()
    assert_sums(kernels.norm_act_reduce(da, y, coef, act, 0.3), da, y, coef, act)


def assert_stats(got: Tensor, y: Tensor, groups: int) -> None:
    truth = REFERENCE.batch_stats(y.double(), groups)
    usual = REFERENCE.batch_stats(y.float(), groups)
    names = ("mean", "biased variance", "unbiased variance")
    if y.numel() == groups * y.shape[1]:  # one value has no unbiased variance
        assert got[2].isnan().all()
        names = names[:1]
        assert not got[1].any()
    for row, name in enumerate(names):
        assert_as_accurate(got[row], usual[row], truth[row], name, reduction=16)


@settings(max_examples=examples(12))
@given(shape=SHAPES, dtype=DTYPES, layout=FORMATS)
@example(shape=(3, 2, 64, 8, 8), dtype=torch.float16, layout=torch.channels_last)
@example(shape=(1, 1, 3, 8, 8), dtype=torch.float32, layout=torch.channels_last)
def test_batch_statistics(shape: Shape, dtype: torch.dtype, layout: torch.memory_format) -> None:
    y = draw(shape, dtype, layout)
    assert_stats(kernels.batch_stats(y, shape[1]), y, shape[1])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_statistics_where_the_mean_is_far_above_the_deviation(layout: torch.memory_format) -> None:
    y = torch.randn(4, 20, 8, 8).mul(0.01).add(torch.linspace(-1000, 1000, 20)[:, None, None])
    y = y.to(DEVICE).contiguous(memory_format=layout)
    mean, var, _ = kernels.batch_stats(y, 2, PassConfig(16, 8, 2))
    truth = REFERENCE.batch_stats(y.double(), 2)
    torch.testing.assert_close(mean.double(), truth[0], rtol=2e-7, atol=0)
    # float32 has the partials' means to 3e-3 deviations; a sum of squares about 0 would be off by 1000 variances.
    torch.testing.assert_close(var.double(), truth[1], rtol=3e-3, atol=0)


def test_a_channel_with_a_nan_leaves_the_others_alone() -> None:
    y = draw((2, 1, 20, 4, 4), torch.float32, torch.channels_last)
    y[1, 3, 2, 2] = torch.nan
    got, truth = kernels.batch_stats(y, 1), REFERENCE.batch_stats(y, 1)
    assert torch.equal(got.isnan(), truth.isnan())
    assert got.isnan().sum() == 3


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_many_programs_and_many_steps_agree_with_one(layout: torch.memory_format) -> None:
    shape = (2, 2, 24, 5, 3)
    y, da, coef = draw(shape, torch.float32, layout), draw(shape, torch.float32, layout), draw_coef(shape, 4)
    for config in (PassConfig(8, 16, 1), PassConfig(4, 8, 5)):
        assert_stats(kernels.batch_stats(y, 2, config), y, 2)
        assert_sums(kernels.norm_act_reduce(da, y, coef, "relu", 0.3, config), da, y, coef, "relu")
        operand = Operand(da, y, coef, "relu", 0.3)
        assert torch.equal(kernels.norm_act(operand, config), kernels.norm_act(operand))


def test_the_same_input_gives_the_same_bits() -> None:
    shape = (2, 2, 24, 5, 3)
    da, y, coef = (draw(shape, torch.float16, torch.channels_last) for _ in range(2)), None, draw_coef(shape, 4)
    da, y = da
    config = PassConfig(8, 16, 1)
    assert torch.equal(kernels.batch_stats(y, 2, config), kernels.batch_stats(y, 2, config))
    first, second = (kernels.grad_stats(da, y, coef, "tanh", 0.0, config) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_any_strides_and_formats_that_differ() -> None:
    y = draw((2, 1, 6, 5, 4), torch.float32, torch.channels_last)
    da = draw((2, 1, 6, 5, 4), torch.float32, torch.contiguous_format)
    gaps = draw((2, 1, 12, 5, 4), torch.float32, torch.contiguous_format)[:, ::2]
    coef = draw_coef((2, 1, 6, 5, 4), 4)
    assert_sums(kernels.norm_act_reduce(da, y, coef, "relu", 0.3), da, y, coef, "relu")
    assert_sums(
        kernels.norm_act_reduce(da.sum().expand_as(y), y, coef, "relu", 0.3), da.sum().expand_as(y), y, coef, "relu"
    )
    assert_stats(kernels.batch_stats(gaps, 1), gaps, 1)
    assert_map(kernels.norm_act(Operand(da, y, coef, "relu", 0.3)), Operand(da, y, coef, "relu", 0.3))


def test_an_empty_batch() -> None:
    y, coef = torch.empty(0, 3, 4, 4, device=DEVICE), draw_coef((0, 1, 3, 4, 4), 4)
    assert kernels.norm_act(Operand(y, None, coef, "relu", 0.0)).shape == y.shape
    assert torch.equal(kernels.norm_act_reduce(y, y, coef, "relu", 0.0), torch.zeros(2, 1, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"at least one value for each channel, got a batch of \[0, 3, 4, 4\]"):
        kernels.batch_stats(y, 1)


def test_a_batch_that_groups_do_not_divide() -> None:
    with pytest.raises(ValueError, match="stat_groups=2 must divide the batch size, got a batch of 3"):
        kernels.batch_stats(torch.ones(3, 4, 2, 2, device=DEVICE), 2)


@pytest.mark.parametrize("slots", [1, 7, 2100])
def test_partials_are_combined(slots: int) -> None:
    """Also such that cover nothing, and more of them than one program merges."""
    groups, channels, each = 2, 3, 4
    values = torch.randn(groups, slots, each, channels, dtype=torch.double) + 50
    count = torch.full((groups, slots, channels), float(each), dtype=torch.double)
    if slots > 1:
        count[:, -1] = 0
    mean, m2 = values.mean(2), values.var(2, unbiased=False) * each
    mean[count == 0] = 0
    m2[count == 0] = 0
    partials = torch.stack([count, mean, m2], dim=2)
    got = kernels.combine_stats(partials.float().contiguous().to(DEVICE)).cpu().double()
    counted = values[:, : slots - 1] if slots > 1 else values
    counted = counted.reshape(groups, -1, channels)
    truth = torch.stack([counted.mean(1), counted.var(1, unbiased=False), counted.var(1)])
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=0)
    sums = kernels.combine_sums(partials[:, :, :2].float().contiguous().to(DEVICE)).cpu().double()
    torch.testing.assert_close(sums, partials[:, :, :2].sum(1).transpose(0, 1), rtol=1e-6, atol=0)


def assert_bits(got: Tensor, expected: Tensor) -> None:
    """The same bits in the interpreter. On a GPU a product and a sum are rounded once, and PyTorch divides by a number
    by way of its reciprocal: a few roundings, of terms that may cancel."""
    few = 0.0 if DEVICE.type == "cpu" else 8 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=few, atol=few * float(expected.abs().max()))


@pytest.mark.parametrize("affine", [True, False])
def test_vectors_have_the_bits_of_the_reference(affine: bool) -> None:
    groups, channels = 2, 37
    mean, var = torch.randn(groups, channels, device=DEVICE), torch.rand(groups, channels, device=DEVICE)
    weight, bias, shift = (torch.randn(channels, device=DEVICE) if affine else None for _ in range(3))
    coef = REFERENCE.coefficients(mean, var, weight, bias, shift, 1e-5)
    assert_bits(kernels.coefficients(mean, var, weight, bias, shift, 1e-5), coef)
    sums = torch.randn(2, groups, channels, device=DEVICE)
    expected = REFERENCE.grad_coefficients(sums, coef, 1234)
    assert_bits(kernels.grad_coefficients(sums, coef, 1234), expected)


@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_running_statistics_have_the_bits_of_the_reference(cumulative: bool, shifted: bool) -> None:
    groups, channels = 2, 37
    stats = torch.rand(3, groups, channels, device=DEVICE)
    shift = torch.randn(channels, device=DEVICE) if shifted else None
    factor = torch.tensor([0.5, 1 / 3], device=DEVICE) if cumulative else None
    mean, var = torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE)
    expected = mean.clone(), var.clone()
    REFERENCE.update_running(*expected, stats, shift, factor, 0.1)
    kernels.update_running(mean, var, stats, shift, factor, 0.1)
    assert_bits(mean, expected[0])
    assert_bits(var, expected[1])


@pytest.mark.parametrize(("channels", "size"), [(3, 64), (64, 32), (100, 16), (512, 4)])
def test_the_row_split_fills_the_chip_at_any_number_of_channels(channels: int, size: int) -> None:
    y = torch.empty(1024, channels, size, size, device="meta").contiguous(memory_format=torch.channels_last)
    matrices = matrices_of(dense(y), 1)
    config = reduction_config(matrices, 2048)
    down, across, _ = matrices.grid(config)
    assert 264 <= down * across <= 528 + across
    assert config.block_rows * config.block_columns == 2048
    assert config.fold == 1 or channels * config.fold % 64 == 0
