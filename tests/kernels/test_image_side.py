"""The image-side layers of `kernels/image_side.py` and `image_side_transpose.py`, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdcgan.geometry import Geometry
from fastdcgan.kernels import image_side, image_side_transpose
from fastdcgan.kernels.image_side_transpose import ImageSideConfig
from fastdcgan.spec import STORE, Epilogue, Operand
from tests.helpers.contractions import conv_call, conv_transpose_call, reference, weight_grad_call, wide
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import DEVICE, examples

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")
LAST = torch.channels_last
DTYPES = st.sampled_from([torch.float32, torch.float16])
FORMATS = st.sampled_from([LAST, torch.contiguous_format])
GEOMETRIES = st.sampled_from(
    [
        Geometry((4, 4), (2, 2), (1, 1)),
        Geometry((3, 3), (1, 1), (1, 1)),
        Geometry((5, 5), (2, 2), (2, 2)),
        Geometry((4, 4), (1, 1), (0, 0)),
        Geometry((2, 2), (2, 2)),
        Geometry((1, 1)),
        Geometry((3, 4), (2, 1), (1, 2)),
        Geometry((6, 5), (4, 2), (1, 0)),
    ]
)
DCGAN = Geometry((4, 4), (2, 2), (1, 1))
FEW, MANY = st.integers(1, 4), st.sampled_from([1, 8, 17, 64, 70])


def draw(*shape: int, dtype: torch.dtype, layout: torch.memory_format = LAST, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype).contiguous(memory_format=layout)


def coef(rows: int, groups: int, channels: int) -> Tensor:
    return (torch.rand(rows, groups, channels) + 0.5).to(DEVICE)


def prologue(kind: str, x: Tensor, groups: int, act: str = "leaky_relu") -> Operand:
    c = x.shape[1]
    if kind == "none":
        return Operand(x)
    if kind == "activate":
        return Operand(x, None, coef(2, groups, c), act, 0.2)
    y = torch.randn(x.shape).to(x)
    return Operand(x, y.contiguous(memory_format=LAST), coef(4 if kind == "bn_backward" else 2, groups, c), act, 0.2)


def compare(got: tuple[Tensor, Tensor], usual: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    assert_as_accurate(got[0], usual[0], truth[0], "output", reduction=usual[0].shape[1] * 16)
    assert got[1].shape == usual[1].shape
    if got[1].numel():
        terms = got[0].numel() // got[1][0].numel()
        for row in range(len(truth[1]) if terms > 1 else 1):
            scale = max(1.0, float(truth[1].abs().max()))
            assert_as_accurate(got[1][row], usual[1][row], truth[1][row], "vectors", reduction=64 * terms, scale=scale)


# --- conv -------------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(14))
@given(
    n=st.integers(1, 3), c=FEW, out=MANY, h=st.integers(3, 13), w=st.integers(3, 13), geometry=GEOMETRIES,
    dtype=DTYPES, layout=FORMATS,
)  # fmt: skip
@example(n=2, c=3, out=64, h=8, w=8, geometry=DCGAN, dtype=torch.float16, layout=LAST)
def test_conv(n, c, out, h, w, geometry, dtype, layout) -> None:
    assume(min(geometry.conv_size(h, w)) > 0)
    x, weight = draw(n, c, h, w, dtype=dtype, layout=layout), draw(out, c, *geometry.kernel, dtype=dtype, layout=layout)
    call = conv_call(Operand(x), weight, geometry)
    assert image_side.why_not(call) is None
    got, usual = image_side.conv(call), reference(call)
    compare(got, usual, reference(wide(call)))
    assert got[0].stride() == usual[0].stride() or c == 1


@pytest.mark.parametrize("kind", ["bias", "activate", "stats", "grad_stats", "grad_stats of two"])
@pytest.mark.parametrize("before", ["none", "activate", "bn_backward"])
def test_conv_with_prologue_and_epilogue(before: str, kind: str) -> None:
    """The padding stays 0 behind a prologue, where `act(t)` is not."""
    n, c, out, groups = 4, 3, 20, 2
    x, weight = draw(n, c, 10, 6, dtype=torch.float32), draw(out, c, 4, 4, dtype=torch.float32, scale=0.2)
    if kind == "bias":
        epilogue = Epilogue("bias", None, torch.randn(out, device=DEVICE))
    elif kind == "activate":
        epilogue = Epilogue("activate", None, coef(4, 1, out), "tanh")
    elif kind == "stats":
        epilogue = Epilogue("stats", stat_groups=groups)
    else:
        y = draw(n, out, 5, 3, dtype=torch.float32)
        rows = 4 if kind == "grad_stats" else 2
        epilogue = Epilogue("grad_stats", y, coef(rows, groups, out), "leaky_relu", 0.2, groups)
    a = prologue(before, x, groups, "tanh")
    call = conv_call(a, weight, DCGAN, epilogue)
    compare(image_side.conv(call), reference(call), reference(wide(call)))


# --- conv_transpose ---------------------------------------------------------------------------------------------------


@settings(max_examples=examples(14))
@given(
    n=st.integers(1, 2), c=MANY, out=FEW, h=st.integers(1, 13), w=st.integers(1, 13), geometry=GEOMETRIES,
    more=st.integers(0, 1), dtype=DTYPES, layout=FORMATS,
)  # fmt: skip
@example(n=1, c=64, out=3, h=16, w=16, geometry=DCGAN, more=0, dtype=torch.float16, layout=LAST)
@example(
    n=1, c=64, out=3, h=8, w=8, geometry=Geometry((5, 5), (2, 2), (2, 2)), more=1, dtype=torch.float32, layout=LAST
)
def test_conv_transpose(n, c, out, h, w, geometry, more, dtype, layout) -> None:
    size = geometry.conv_transpose_size(h, w, tuple(min(more, s - 1) for s in geometry.stride))
    assume(min(size) > 0)
    x, weight = draw(n, c, h, w, dtype=dtype, layout=layout), draw(c, out, *geometry.kernel, dtype=dtype, layout=layout)
    call = conv_transpose_call(Operand(x), weight, geometry, size)
    reason = image_side_transpose.why_not(call)
    if reason is not None:
        assert "products for each pixel" in reason
        assert geometry.kernel[0] * geometry.kernel[1] * out > 64
        return
    compare(image_side_transpose.conv_transpose(call), reference(call), reference(wide(call)))


@pytest.mark.parametrize("kind", ["none", "bias", "activate"])
@pytest.mark.parametrize("before", ["none", "activate", "bn_backward", "bn_backward of two"])
def test_conv_transpose_with_prologue_and_epilogue(before: str, kind: str) -> None:
    """Over tiles that share rows and columns of the input."""
    n, c, out, groups = 2, 20, 3, 2
    x, weight = draw(n, c, 9, 14, dtype=torch.float32), draw(c, out, 4, 4, dtype=torch.float32, scale=0.2)
    epilogue = STORE
    if kind == "bias":
        epilogue = Epilogue("bias", None, torch.randn(out, device=DEVICE))
    elif kind == "activate":
        epilogue = Epilogue("activate", None, coef(2, 1, out), "tanh")
    a = prologue(before, x, groups)
    call = conv_transpose_call(a, weight, DCGAN, (18, 28), epilogue)
    got = image_side_transpose.conv_transpose(call, ImageSideConfig(64, 16, 4))
    compare(got, reference(call), reference(wide(call)))


@given(
    h=st.integers(1, 70), w=st.integers(1, 70), kernel=st.integers(1, 7), stride=st.sampled_from([1, 2, 4]),
    padding=st.integers(0, 3), pixels=st.sampled_from([128, 256]),
)  # fmt: skip
def test_every_output_pixel_has_one_tile(h, w, kernel, stride, padding, pixels) -> None:
    geometry = Geometry((kernel, kernel), (stride, stride), (padding, padding))
    size = geometry.conv_transpose_size(h, w)
    assume(min(size) > 0)
    for axis, out, source in zip(
        image_side_transpose.tile_of(pixels, (h, w), size, geometry), size, (h, w), strict=True
    ):
        written = []
        for tile in range(image_side_transpose.tiles_along(axis, out)):
            for i in range(axis.owned):
                for phase in range(stride):
                    at = (tile * axis.owned + i) * stride + phase + axis.output_offset
                    if not 0 <= at < out:
                        continue
                    written.append(at)
                    for j in range(axis.taps):
                        # The rule in `Axis`, against the definition: output = stride*input - padding + tap.
                        tap = (phase + axis.phase) % stride + stride * j
                        place = i + axis.lead + (phase + axis.phase) // stride - j
                        pixel = tile * axis.owned + axis.input_offset + place
                        assert at == pixel * stride - padding + tap
                        assert tap >= kernel or not 0 <= pixel < source or 0 <= place < axis.window
        assert written == list(range(out))


def test_infinity_stays_where_the_taps_reach() -> None:
    """The tile has columns for taps that do not exist, too: three of four, or one of two for the odd phase."""
    for geometry in (Geometry((3, 3), (1, 1), (1, 1)), Geometry((3, 3), (2, 2), (1, 1))):
        x, weight = draw(1, 8, 6, 6, dtype=torch.float32), draw(8, 3, 3, 3, dtype=torch.float32)
        x[0, 3, 2, 3] = torch.inf
        call = conv_transpose_call(Operand(x), weight, geometry, geometry.conv_transpose_size(6, 6))
        got, usual = image_side_transpose.conv_transpose(call)[0], reference(call)[0]
        assert torch.equal(got.isfinite(), usual.isfinite())
        assert not usual.isfinite().all()


# --- weight_grad ------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(14))
@given(
    n=st.integers(1, 3), c=FEW, out=MANY, h=st.integers(3, 13), w=st.integers(3, 13), geometry=GEOMETRIES,
    dtype=DTYPES, layout=FORMATS,
)  # fmt: skip
@example(n=2, c=3, out=64, h=16, w=16, geometry=DCGAN, dtype=torch.float16, layout=LAST)
def test_weight_grad(n, c, out, h, w, geometry, dtype, layout) -> None:
    size = geometry.conv_size(h, w)
    assume(min(size) > 0)
    x, dy = Operand(draw(n, c, h, w, dtype=dtype, layout=layout)), Operand(draw(n, out, *size, dtype=dtype))
    call = weight_grad_call(x, dy, geometry)
    assert image_side.why_not(call) is None
    got, usual, truth = image_side.weight_grad(call), reference(call), reference(wide(call))
    assert_as_accurate(got, usual, truth, "weight gradient", reduction=n * size[0] * size[1])


@pytest.mark.parametrize("of_linear", ["none", "activate", "bn_backward", "bn_backward of two"])
@pytest.mark.parametrize("of_gathered", ["none", "activate", "bn_backward of two"])
def test_weight_grad_with_prologues(of_gathered: str, of_linear: str) -> None:
    x, dy = draw(4, 3, 10, 6, dtype=torch.float32), draw(4, 20, 5, 3, dtype=torch.float32)
    a, b = prologue(of_gathered, x, 1, "tanh"), prologue(of_linear, dy, 2)
    call = weight_grad_call(a, b, DCGAN)
    got = image_side.weight_grad(call, ImageSideConfig(16, 16, 4, splits=3))
    assert_as_accurate(got, reference(call), reference(wide(call)), "weight gradient", reduction=60)


# --- all --------------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bits() -> None:
    x, weight, dy = (draw(*s, dtype=torch.float16) for s in ((2, 3, 16, 16), (24, 3, 4, 4), (2, 24, 8, 8)))
    small = ImageSideConfig(16, 16, 4, splits=5)

    def run() -> list[Tensor]:
        return [
            *image_side.conv(conv_call(Operand(x), weight, DCGAN, Epilogue("stats")), small),
            image_side.weight_grad(weight_grad_call(Operand(x), Operand(dy), DCGAN), small),
            image_side_transpose.conv_transpose(conv_transpose_call(Operand(dy), weight, DCGAN, (16, 16)))[0],
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_bfloat16_is_multiplied_as_bfloat16() -> None:
    x, weight, dy = (draw(*s, dtype=torch.bfloat16) for s in ((1, 3, 8, 8), (16, 3, 4, 4), (1, 16, 4, 4)))
    a, b = Operand(x), Operand(dy)
    forward, adjoint = conv_call(a, weight, DCGAN), conv_transpose_call(b, weight, DCGAN, (8, 8))
    gradient = weight_grad_call(a, b, DCGAN)
    results = [
        (image_side.conv(forward)[0], reference(wide(forward))[0]),
        (image_side.weight_grad(gradient), reference(wide(gradient))),
        (image_side_transpose.conv_transpose(adjoint)[0], reference(wide(adjoint))[0]),
    ]
    for got, truth in results:
        assert got.dtype == torch.bfloat16
        # Up to one unit in the last place: the interpreter truncates where a GPU rounds.
        torch.testing.assert_close(got.double(), truth, rtol=2**-7, atol=1e-4)


def test_what_can_not_run_says_why() -> None:
    image, features = draw(1, 3, 8, 8, dtype=torch.float32), draw(1, 8, 8, 8, dtype=torch.float32)
    weight, up = draw(8, 3, 4, 4, dtype=torch.float32), draw(8, 3, 3, 3, dtype=torch.float32)
    for call, expected in (
        (conv_call(Operand(features), weight, DCGAN), "8 channels on the image's side, more than 4"),
        (conv_call(Operand(image), weight, Geometry((7, 7))), "patches of 147 values, more than 128"),
        (conv_call(Operand(image.double()), weight, DCGAN), "take float32, float16, bfloat16, not torch.float64"),
        (conv_call(Operand(image), weight, Geometry((4, 4), groups=3)), "no groups, and here are 3"),
        (weight_grad_call(Operand(features), Operand(features), DCGAN), "8 channels on the image's side, more than 4"),
    ):
        assert expected in image_side.why_not(call)
    for geometry, epilogue, expected in (
        (Geometry((3, 3), dilation=(2, 2)), STORE, "dilation (2, 2)"),
        (Geometry((3, 3), (3, 3)), STORE, "stride (3, 3), other than 1, 2 or 4"),
        (Geometry((3, 3)), Epilogue("stats"), "epilogue 'stats' to an image"),
    ):
        size = geometry.conv_transpose_size(8, 8)
        call = conv_transpose_call(Operand(features), up, geometry, size, epilogue)
        assert image_side_transpose.why_not(call) == expected
