"""Image-side layers of stride 1 through their adjoints' kernels (`kernels/flipped.py`)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdcgan.backends import get
from fastdcgan.geometry import Geometry
from fastdcgan.kernels import flipped, image_side, image_side_transpose
from fastdcgan.spec import Epilogue, Operand
from tests.helpers.contractions import conv_call, conv_transpose_call, reference, weight_grad_call, wide
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import DEVICE, examples

LAST = torch.channels_last
FORMATS = st.sampled_from([LAST, torch.contiguous_format])
GEOMETRIES = st.sampled_from(
    [Geometry((3, 3), (1, 1), (1, 1)), Geometry((4, 4), (1, 1), (1, 1)), Geometry((3, 5), (1, 1), (0, 2))]
)
SIDES = st.integers(4, 11)
# A PatchGAN's last layer (Isola et al., 2017, section 6.1.2) and the 3x3 end of many generators.
PATCH, LAST_3X3 = Geometry((4, 4), (1, 1), (1, 1)), Geometry((3, 3), (1, 1), (1, 1))


def draw(*shape: int, layout: torch.memory_format = LAST, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout)


def prologue(x: Tensor, act: str = "leaky_relu") -> Operand:
    y, coef = torch.randn(x.shape).to(x), torch.rand(4, 2, x.shape[1]).to(DEVICE) + 0.5
    return Operand(x, y.contiguous(memory_format=LAST), coef, act, 0.2)


@settings(max_examples=examples(10))
@given(
    n=st.integers(1, 2), c=st.sampled_from([5, 17, 64]), out=st.integers(1, 4), h=SIDES, w=SIDES, geometry=GEOMETRIES,
    layout=FORMATS,
)  # fmt: skip
@example(n=2, c=64, out=1, h=7, w=7, geometry=PATCH, layout=LAST)
def test_conv(n, c, out, h, w, geometry, layout) -> None:
    x, weight = draw(n, c, h, w, layout=layout), draw(out, c, *geometry.kernel, layout=layout)
    call = conv_call(Operand(x), weight, geometry)
    assume(image_side.why_not(call) is not None)
    assert flipped.CONV.why_not(call) is None
    (got, _), (usual, _) = flipped.CONV.run(call, None), reference(call)
    assert_as_accurate(got, usual, reference(wide(call))[0], reduction=c * 16)
    assert got.stride() == usual.stride() or out == 1


@pytest.mark.parametrize("geometry", [PATCH, LAST_3X3], ids=["4x4", "3x3"])
def test_conv_with_prologue_and_epilogue(geometry: Geometry) -> None:
    a, weight = prologue(draw(2, 20, 9, 6)), draw(3, 20, *geometry.kernel)
    epilogue = Epilogue("activate", None, torch.rand(2, 1, 3, device=DEVICE) + 0.5, "tanh")
    call = conv_call(a, weight, geometry, epilogue)
    (got, _), (usual, _) = flipped.CONV.run(call, None), reference(call)
    assert_as_accurate(got, usual, reference(wide(call))[0], reduction=320)


@settings(max_examples=examples(10))
@given(
    n=st.integers(1, 2), c=st.integers(1, 4), out=st.sampled_from([5, 17, 64]), h=SIDES, w=SIDES, geometry=GEOMETRIES,
    layout=FORMATS,
)  # fmt: skip
def test_conv_transpose(n, c, out, h, w, geometry, layout) -> None:
    size = geometry.conv_transpose_size(h, w)
    x, weight = draw(n, c, h, w, layout=layout), draw(c, out, *geometry.kernel, layout=layout)
    call = conv_transpose_call(Operand(x), weight, geometry, size)
    assert image_side_transpose.why_not(call) is not None
    assert flipped.CONV_TRANSPOSE.why_not(call) is None
    (got, _), (usual, _) = flipped.CONV_TRANSPOSE.run(call, None), reference(call)
    assert_as_accurate(got, usual, reference(wide(call))[0], reduction=c * 16)
    assert got.stride() == usual.stride() or c == 1


@settings(max_examples=examples(10))
@given(
    n=st.integers(1, 2), c=st.sampled_from([5, 17, 64]), out=st.integers(1, 4), h=SIDES, w=SIDES, geometry=GEOMETRIES,
    layout=FORMATS, lazy=st.booleans(),
)  # fmt: skip
def test_weight_grad(n, c, out, h, w, geometry, layout, lazy) -> None:
    n *= 2
    x = Operand(draw(n, c, h, w, layout=layout))
    dy = draw(n, out, *geometry.conv_size(h, w), layout=layout)
    linear = prologue(dy) if lazy else Operand(dy)
    call = weight_grad_call(x, linear, geometry)
    assert flipped.WEIGHT_GRAD.why_not(call) is None
    got, usual = flipped.WEIGHT_GRAD.run(call, None), reference(call)
    assert_as_accurate(got, usual, reference(wide(call)), reduction=n * h * w)
    assert got.stride() == usual.stride() or 1 in (c, out)


def test_what_can_not_be_flipped() -> None:
    x, weight = Operand(draw(1, 8, 8, 8)), draw(3, 8, 4, 4)
    strided, padded = Geometry((4, 4), (2, 2), (1, 1)), Geometry((4, 4), (1, 1), (4, 4))
    for geometry in (strided, padded):
        assert "can't be flipped" in flipped.CONV.why_not(conv_call(x, weight, geometry))
        gradient = weight_grad_call(x, Operand(draw(1, 3, *geometry.conv_size(8, 8))), geometry)
        assert "can't be flipped" in flipped.WEIGHT_GRAD.why_not(gradient)
    assert flipped.flip(Geometry((3, 3), (1, 1), (1, 1), (2, 2))) == Geometry((3, 3), (1, 1), (3, 3), (2, 2))
    output_padding = conv_transpose_call(x, draw(8, 3, 4, 4), PATCH, (8, 8))
    assert "can't be flipped" in flipped.CONV_TRANSPOSE.why_not(output_padding)
    assert "channels" in flipped.CONV.why_not(conv_call(x, draw(8, 8, 4, 4), PATCH))


@pytest.mark.parametrize("out", [1, 3])
def test_these_are_the_first_that_can_run(out: int) -> None:
    x, weight, y = Operand(draw(1, 16, 8, 8)), draw(out, 16, 4, 4), Operand(draw(1, out, 7, 7))
    for call in (
        conv_call(x, weight, PATCH),
        conv_transpose_call(y, weight, PATCH, (8, 8)),
        weight_grad_call(x, y, PATCH),
    ):
        able = [algorithm.name for algorithm in get("triton").algorithms(call.op) if algorithm.why_not(call) is None]
        assert able == ["triton flipped", "triton"]
