"""The transposed convolution to 1 to 4 channels; `image_side.py` says why it is built so."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.kernels import contraction, launch
from fastdcgan.kernels.activations import activation
from fastdcgan.kernels.launch import dot
from fastdcgan.kernels.partials import combined
from fastdcgan.kernels.prologues import PrologueOperand, load_tile
from fastdcgan.spec import Algorithm, Call, in_format_of_torch

MAX_IMAGE_CHANNELS = 4
_MAX_COLUMNS = 256  # taps x phases x channels


@dataclass(frozen=True)
class ImageSideConfig:
    """Launch knobs: pixels and wide channels of a tile, parts of a weight gradient (0: enough to fill the chip)."""

    pixels: int
    channels: int
    num_warps: int
    num_stages: int = 1
    splits: int = 0


_CONV_TRANSPOSE = ImageSideConfig(128, 32, 8, num_stages=2)  # two programs fit on a multiprocessor


@dataclass(frozen=True)
class Axis:
    """How a tile of `conv_transpose` lies along rows or columns (a `constexpr` of the kernel).

    Output pixel `s*i + f` (f < s: the phase) of a tile has `taps` taps `(f + phase) % s + s*j`, and reads from pixel
    `i + lead + (f + phase)//s - j` of the tile's window of the input.
    """

    kernel: int
    stride: int
    taps: int
    padded_taps: int
    window: int  # input pixels of a tile, a power of two
    owned: int  # a tile writes `stride * owned` output pixels
    input_offset: int  # of tile 0: the first pixel of its window
    output_offset: int  # and the first one that it writes
    phase: int
    lead: int


@triton.jit
def conv_transpose_kernel(
    x, x_y, x_coef, x_slope, x_groups, weight, out, e_coef, e_slope, e_groups,
    batch, tiles_y, tiles_x, height, width, c_in, out_height, out_width, w_i, w_o, w_h, w_w, o_n, o_h, o_w, o_c,
    Y: tl.constexpr, X: tl.constexpr, CO: tl.constexpr, BLOCK_CO: tl.constexpr, PROLOGUE: tl.constexpr,
    EPILOGUE_KIND: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one image: products of all taps, [window pixels, taps x phases x channels], shifted and added up."""
    image = tl.program_id(0) // (tiles_y * tiles_x)
    tile_y = tl.program_id(0) // tiles_x % tiles_y
    tile_x = tl.program_id(0) % tiles_x
    group = image // batch
    ROWS: tl.constexpr = Y.window * X.window
    OUTPUTS: tl.constexpr = Y.stride * X.stride * BLOCK_CO
    COLUMNS: tl.constexpr = Y.padded_taps * X.padded_taps * OUTPUTS

    # Column ((ty, tx), (fy, fx, co)) of the products holds one tap of output phase (fy, fx).
    k = tl.arange(0, COLUMNS)
    ty = k // (X.padded_taps * OUTPUTS)
    tx = k // OUTPUTS % X.padded_taps
    co = k % BLOCK_CO
    ky = (k // (X.stride * BLOCK_CO) % Y.stride + Y.phase) % Y.stride + Y.stride * ty
    kx = (k // BLOCK_CO % X.stride + X.phase) % X.stride + X.stride * tx
    exists = (ky < Y.kernel) & (kx < X.kernel) & (co < CO)
    of_column = ky * w_h + kx * w_w + co * w_o

    i = tl.arange(0, ROWS)
    q = tile_y * Y.owned + Y.input_offset + i // X.window
    r = tile_x * X.owned + X.input_offset + i % X.window
    rows = (image + tl.zeros_like(i), q, r, i >= 0)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for channel in range(0, c_in, PROLOGUE.block_c):
        c = channel + tl.arange(0, PROLOGUE.block_c)
        mask = (c < c_in)[:, None] & exists[None, :]
        b = tl.load(weight + (c * w_i)[:, None] + of_column[None, :], mask=mask, other=0.0)
        a = load_tile(
            x, x_y, x_coef, x_groups, x_slope, group, rows, (0, 0, 0), (0, 0), channel, (height, width, c_in),
            b.dtype, PROLOGUE,
        )  # fmt: skip
        acc = dot(a, b, acc, PRECISION)

    # Shift along x and add the taps (tx), then along y (ty).
    acc = acc.reshape(Y.window, X.window, COLUMNS)
    carry = (k // BLOCK_CO % X.stride + X.phase) // X.stride
    at = tl.arange(0, X.window)[None, :, None] + (X.lead + carry - tx)[None, None, :] + tl.zeros_like(acc).to(tl.int32)
    # A tap that does not exist has weight 0, and 0 times infinity is not 0.
    found = (at >= 0) & (at < X.window) & (kx < X.kernel)[None, None, :]
    acc = tl.where(found, tl.gather(acc, tl.where(found, at, 0), 1), 0.0)
    acc = tl.sum(acc.reshape(Y.window, X.window, Y.padded_taps, X.padded_taps, OUTPUTS), 3)
    acc = acc.reshape(Y.window, X.window, Y.padded_taps * OUTPUTS)
    k = tl.arange(0, Y.padded_taps * OUTPUTS)
    phase = k // (X.stride * BLOCK_CO) % Y.stride + Y.phase
    ty = k // OUTPUTS
    carry = phase // Y.stride
    at = tl.arange(0, Y.window)[:, None, None] + (Y.lead + carry - ty)[None, None, :]
    at += tl.zeros_like(acc).to(tl.int32)
    found = (at >= 0) & (at < Y.window) & (phase % Y.stride + Y.stride * ty < Y.kernel)[None, None, :]
    acc = tl.where(found, tl.gather(acc, tl.where(found, at, 0), 0), 0.0)
    acc = tl.sum(acc.reshape(Y.window, X.window, Y.padded_taps, OUTPUTS), 2).reshape(ROWS, OUTPUTS)

    k = tl.arange(0, OUTPUTS)
    co = k % BLOCK_CO
    if EPILOGUE_KIND == "bias":
        acc += tl.load(e_coef + co, mask=co < CO, other=0.0).to(tl.float32)[None, :]
    elif EPILOGUE_KIND == "activate":
        s = tl.load(e_coef + (group % e_groups) * CO + co, mask=co < CO, other=0.0)
        t = tl.load(e_coef + (e_groups + group % e_groups) * CO + co, mask=co < CO, other=0.0)
        acc = activation(acc * s[None, :] + t[None, :], e_slope, ACT)
    qy = (i // X.window)[:, None]
    qx = (i % X.window)[:, None]
    out_y = (tile_y * Y.owned + qy) * Y.stride + (k // (X.stride * BLOCK_CO))[None, :] + Y.output_offset
    out_x = (tile_x * X.owned + qx) * X.stride + (k // BLOCK_CO % X.stride)[None, :] + X.output_offset
    mask = (qy < Y.owned) & (qx < X.owned) & (co < CO)[None, :]
    mask = mask & (out_y >= 0) & (out_y < out_height) & (out_x >= 0) & (out_x < out_width)
    to = out + image * o_n + out_y * o_h + out_x * o_w + co[None, :] * o_c
    tl.store(to, acc.to(out.dtype.element_ty), mask=mask)


def why_not(call: Call) -> str | None:
    """None if `conv_transpose` can run this call, else the reason."""
    geometry, channels = call.geometry, call.b.shape[1]
    if channels > MAX_IMAGE_CHANNELS:
        return f"{channels} channels on the image's side, more than {MAX_IMAGE_CHANNELS}"
    if geometry.dilation != (1, 1):
        return f"dilation {geometry.dilation}"
    if any(s not in (1, 2, 4) for s in geometry.stride):
        return f"stride {geometry.stride}, other than 1, 2 or 4"
    if call.epilogue.kind not in ("none", "bias", "activate"):
        return f"epilogue {call.epilogue.kind!r} to an image"
    columns = _product_columns(channels, geometry)
    if columns > _MAX_COLUMNS:
        return f"{columns} products for each pixel, more than {_MAX_COLUMNS}"
    return contraction.why_not(call)


def _taps(kernel: int, stride: int) -> int:
    """Taps of an output pixel, at most."""
    return -(-kernel // stride)


def _product_columns(channels: int, geometry: Geometry) -> int:
    power = triton.next_power_of_2
    (ky, kx), (sy, sx) = geometry.kernel, geometry.stride
    return power(_taps(ky, sy)) * power(_taps(kx, sx)) * sy * sx * power(channels)


def _axis(size: int, out: int, window: int, kernel: int, stride: int, padding: int) -> Axis | None:
    """A tile along one axis, or None if a window of so few pixels owns no output."""
    taps, quads = _taps(kernel, stride), -(-out // stride)
    fixed = (kernel, stride, taps, triton.next_power_of_2(taps), window)
    if max(size, quads) <= window:  # one tile has it all, and needs no neighbours
        return Axis(*fixed, window, 0, 0, padding % stride, padding // stride)
    owned = window - taps + 1
    if owned < 1:
        return None
    return Axis(*fixed, owned, padding // stride - taps + 1, -(padding % stride), 0, taps - 1)


def tiles_along(axis: Axis, out: int) -> int:
    """Tiles along one axis."""
    return triton.cdiv(out - axis.output_offset, axis.stride * axis.owned)


def tile_of(pixels: int, size: Pair, out: Pair, geometry: Geometry) -> tuple[Axis, Axis]:
    """The tile of `pixels` input pixels with which the fewest tiles cover the output; of equal ones, the widest."""
    g, best = geometry, None
    for across in (64, 32, 16, 8, 4):
        if not 1 <= pixels // across <= 64:
            continue
        y = _axis(size[0], out[0], pixels // across, g.kernel[0], g.stride[0], g.padding[0])
        x = _axis(size[1], out[1], across, g.kernel[1], g.stride[1], g.padding[1])
        if y is None or x is None:
            continue
        count = tiles_along(y, out[0]) * tiles_along(x, out[1])
        if best is None or count < best[0]:
            best = (count, y, x)
    assert best is not None, f"no tile of {pixels} pixels for {geometry}"
    return best[1:]


def conv_transpose(call: Call, config: ImageSideConfig | None = None) -> tuple[Tensor, Tensor]:
    """The transposed convolution to 1 to 4 channels; the output's memory format is PyTorch's."""
    a, weight, e, size = call.a, call.b, call.epilogue, call.size
    config, wide = config or _CONV_TRANSPOSE, PrologueOperand.of(a)
    n, c_in, height, width = wide.x.shape
    c_out = weight.shape[1]
    y, x = tile_of(config.pixels, (height, width), size, call.geometry)
    out = in_format_of_torch(launch.empty_nhwc((n, c_out, *size), weight), a.x, weight)
    block_c = min(config.channels, max(16, triton.next_power_of_2(c_in)))
    e_groups = 1 if e.coef is None or e.coef.dim() == 1 else e.coef.shape[1]
    tiles = (tiles_along(y, size[0]), tiles_along(x, size[1]))
    launch.start(
        conv_transpose_kernel, (n * tiles[0] * tiles[1],),
        wide.x, wide.y, wide.coef, float(a.slope), wide.groups, weight, out,
        None if e.coef is None else e.coef.contiguous(), float(e.slope), e_groups,
        n // max(wide.groups, e_groups), *tiles, height, width, c_in, *size, *weight.stride(),
        out.stride(0), *out.stride()[2:], out.stride(1),
        Y=y, X=x, CO=c_out, BLOCK_CO=triton.next_power_of_2(c_out),
        PROLOGUE=wide.tile("pointer", (1, 1), (0, 0), config.pixels, block_c, False),
        EPILOGUE_KIND=e.kind, ACT=ACTIVATIONS[e.act].id, PRECISION=launch.dot_precision(weight.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, combined(out, None, e)


CONV_TRANSPOSE = Algorithm("triton image-side", why_not, conv_transpose)
