"""Output sizes, against PyTorch's own, and the rows that a transposed convolution adds."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastdcgan.geometry import Geometry, pair

SIDES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(1, 14))


def geometry_of(rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[Geometry, int, int]:
    kernel, stride, padding, dilation, size = zip(rows, columns, strict=True)
    return Geometry(kernel, stride, padding, dilation), size[0], size[1]  # type: ignore[arg-type]


def test_pair() -> None:
    assert pair(3) == (3, 3)
    assert pair((1, 2)) == (1, 2)
    assert pair([1, 2]) == (1, 2)  # type: ignore[arg-type]
    assert pair((4,)) == (4, 4)


@settings(max_examples=100)
@given(SIDES, SIDES)
def test_conv_size_is_pytorchs(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    g, height, width = geometry_of(rows, columns)
    size = g.conv_size(height, width)
    x, weight = torch.empty(1, 1, height, width, device="meta"), torch.empty(1, 1, *g.kernel, device="meta")
    if (
        min(
            height + 2 * g.padding[0] - g.dilation[0] * (g.kernel[0] - 1),
            width + 2 * g.padding[1] - g.dilation[1] * (g.kernel[1] - 1),
        )
        < 1
    ):
        assert min(size) < 1
        return
    assert size == F.conv2d(x, weight, None, g.stride, g.padding, g.dilation).shape[2:]


@settings(max_examples=100)
@given(SIDES, SIDES, st.integers(0, 3), st.integers(0, 3))
def test_conv_transpose_size_is_pytorchs(
    rows: tuple[int, ...], columns: tuple[int, ...], extra_h: int, extra_w: int
) -> None:
    g, height, width = geometry_of(rows, columns)
    extra = (extra_h % max(g.stride[0], g.dilation[0]), extra_w % max(g.stride[1], g.dilation[1]))
    size = g.conv_transpose_size(height, width, extra)
    assert g.output_padding(height, width, size) == extra
    if min(size) < 1:
        return
    x, weight = torch.empty(1, 1, height, width, device="meta"), torch.empty(1, 1, *g.kernel, device="meta")
    out = F.conv_transpose2d(x, weight, None, g.stride, g.padding, extra, 1, g.dilation)
    assert size == out.shape[2:]


@settings(max_examples=100)
@given(SIDES, SIDES)
def test_the_adjoint_of_a_convolution_needs_less_padding_than_a_stride(
    rows: tuple[int, ...], columns: tuple[int, ...]
) -> None:
    g, height, width = geometry_of(rows, columns)
    size = g.conv_size(height, width)
    if min(size) < 1:
        return
    extra = g.output_padding(*size, (height, width))
    assert all(0 <= e < s for e, s in zip(extra, g.stride, strict=True))


@settings(max_examples=100)
@given(SIDES, SIDES)
def test_taps_that_reach_the_image(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    g, *image = geometry_of(rows, columns)
    outputs = g.conv_size(*image)
    assume(min(outputs) >= 1)
    # The gradient of a weight is nonzero where its tap has read an image of ones.
    weight = torch.ones(1, 1, *g.kernel, requires_grad=True)
    F.conv2d(torch.ones(1, 1, *image), weight, None, g.stride, g.padding, g.dilation).sum().backward()
    assert g.reaches((image[0], image[1]), outputs) == bool(weight.grad.all())


@settings(max_examples=100)
@given(SIDES, SIDES)
def test_pixels_that_are_read(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    g, *image = geometry_of(rows, columns)
    outputs = g.conv_size(*image)
    assume(min(outputs) >= 1)
    ones = torch.ones(1, 1, *image), torch.ones(1, 1, *g.kernel)
    out = F.conv2d(*ones, None, g.stride, g.padding, g.dilation)
    assert g.reads((image[0], image[1]), outputs) == out.sum()
