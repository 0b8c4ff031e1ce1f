"""The image-side layers: contractions with 1 to 4 channels on one side, bound by bytes and not by arithmetic.

The first layer of a 64x64 DCGAN at batch 128 (3 -> 64 channels, k4 s2 p1, bfloat16) reads 3.1 MB, writes 16.8 MB and
does 0.4 G multiply-adds. At an H100's 3 TB/s the bytes take 6.6 us; the plain cores would need 14 us for the products,
the tensor cores 1 us, even with a part of them idle. So all three kernels use `tl.dot`, and put the few channels of the
image where padding costs least:

- `conv` and `weight_grad` load whole patches of the image, kh*kw*c values a pixel (48 of 64 columns are used for k4 and
  3 channels, where a dot for each tap would use 3 of 16). The patches overlap, and so come from the first-level cache;
  the wide tensor is touched once, in 16-byte accesses.
- `conv_transpose` (`image_side_transpose.py`) reads each pixel of the wide tensor once, and again only those that
  neighbouring tiles share. It computes the products of all taps in one dot (48 of 64 columns again), and then shifts
  and adds them up, along the rows and along the columns, by about one shuffle for each product. Loading the pixels for
  every tap, as the general kernel does, would read each of them nine times, for 12 columns of 16.

In float32 bytes and products double, with TF32 or three TF32 products on the tensor cores (`launch.dot_precision`).

The wide tensors' prologues and the epilogues are those of the other contractions (`prologues.py`, `epilogues.py`);
reductions are partials merged in a fixed order (`partials.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.kernels import contraction, launch
from fastdcgan.kernels.activations import activation, activation_derivative
from fastdcgan.kernels.elementwise import dense, like
from fastdcgan.kernels.epilogues import EpilogueTile, apply_epilogue, epilogue_rows
from fastdcgan.kernels.image_side_transpose import MAX_IMAGE_CHANNELS, ImageSideConfig
from fastdcgan.kernels.launch import dot
from fastdcgan.kernels.partials import combine_sums, combined
from fastdcgan.kernels.prologues import PrologueOperand, load_tile, prologue_of, tile_rows
from fastdcgan.spec import Algorithm, Call, Operand, in_format_of_torch, memory_format, nhwc

_MAX_COLUMNS = 128  # of the patches in a dot
_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


# Small tiles for many warps: a thread loads 16 values of the patches, or holds 32 products, and no kernel spills.
_CONV = ImageSideConfig(64, 64, 8)
_WEIGHT_GRAD = ImageSideConfig(64, 64, 8, num_stages=2)
# Pipelined, the transposed float32 operand would be copied 4 bytes at a time.
_WEIGHT_GRAD_FLOAT32 = ImageSideConfig(64, 64, 8)


@dataclass(frozen=True)
class Patch:
    """The columns of a patch are (ky, kx, channel), padded to a power of two (a `constexpr` of the kernels)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    channels: int
    columns: int
    prologue: str
    act: int
    affine: bool  # bn_backward with p and q


@triton.jit
def load_patches(x, y, coef, coef_groups, slope, group, rows, size, strides, dtype, P: tl.constexpr):
    """[pixels, P.columns] in `dtype`: the patches of output pixels `rows`, prologue applied, 0 outside the image."""
    n, q, r, inside = rows
    height, width = size
    k = tl.arange(0, P.columns)
    ky = k // (P.kernel[1] * P.channels)
    kx = k // P.channels % P.kernel[1]
    c = k % P.channels
    top = q * P.stride[0] - P.padding[0]
    left = r * P.stride[1] - P.padding[1]
    in_y = top[:, None] + (ky * P.dilation[0])[None, :]
    in_x = left[:, None] + (kx * P.dilation[1])[None, :]
    mask = inside[:, None] & (ky < P.kernel[0])[None, :]
    mask = mask & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
    corner = n * strides[0] + top * strides[1] + left * strides[2]
    offsets = corner[:, None] + (ky * P.dilation[0] * strides[1] + kx * P.dilation[1] * strides[2] + c * strides[3])
    value = tl.load(x + offsets, mask=mask, other=0.0)
    if P.prologue != "none":
        first = coef + (group % coef_groups) * P.channels + c
        step = coef_groups * P.channels
        s = tl.load(first)[None, :]
        t = tl.load(first + step)[None, :]
        value = value.to(tl.float32)
        if P.prologue == "activate":
            value = activation(value * s + t, slope, P.act)
        else:
            raw = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
            value = s * activation_derivative(raw * s + t, slope, P.act) * value
            if P.affine:
                value += tl.load(first + 2 * step)[None, :] * raw + tl.load(first + 3 * step)[None, :]
        value = tl.where(mask, value, 0.0)
    return value.to(dtype)


@triton.jit
def conv_kernel(
    x, x_y, x_coef, x_slope, x_groups, weight, out, e_y, e_coef, e_slope, e_groups, partials,
    batch, tiles_per_group, height, width, out_height, out_width, c_out,
    x_n, x_h, x_w, x_c, w_o, w_i, w_h, w_w,
    PATCH: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [EPILOGUE.rows pixels, EPILOGUE.block_c channels] of the output: one dot."""
    tile = tl.program_id(0)
    group = tile // tiles_per_group
    rows, corner = tile_rows(tile % tiles_per_group, group, batch, out_height, out_width, EPILOGUE.rows, None)
    o = tl.program_id(1) * EPILOGUE.block_c + tl.arange(0, EPILOGUE.block_c)
    k = tl.arange(0, PATCH.columns)
    ky = k // (PATCH.kernel[1] * PATCH.channels)
    of_column = ky * w_h + k // PATCH.channels % PATCH.kernel[1] * w_w + k % PATCH.channels * w_i
    mask = (ky < PATCH.kernel[0])[:, None] & (o < c_out)[None, :]
    b = tl.load(weight + of_column[:, None] + (o * w_o)[None, :], mask=mask, other=0.0)
    size = (height, width)
    a = load_patches(x, x_y, x_coef, x_groups, x_slope, group, rows, size, (x_n, x_h, x_w, x_c), b.dtype, PATCH)
    ROWS: tl.constexpr = EPILOGUE.rows
    COLUMNS: tl.constexpr = EPILOGUE.block_c
    acc = dot(a, b, tl.zeros((ROWS, COLUMNS), tl.float32), PRECISION)
    apply_epilogue(
        acc, out, e_y, e_coef, e_groups, e_slope, partials, tile, group, rows, corner, (0, 0),
        tl.program_id(1) * EPILOGUE.block_c, (out_height, out_width, c_out), EPILOGUE,
    )  # fmt: skip


@triton.jit
def weight_grad_kernel(
    x, x_y, x_coef, x_slope, x_groups, dy, dy_y, dy_coef, dy_slope, dy_groups, partials,
    tiles, share, batch, tiles_per_group, height, width, dy_height, dy_width, c_dy,
    x_n, x_h, x_w, x_c,
    PATCH: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[LINEAR.block_c, columns] of the weight gradient from `share` tiles of pixels, to slot `program_id(0)`."""
    channel = tl.program_id(1) * LINEAR.block_c
    BLOCK: tl.constexpr = LINEAR.block_c
    COLUMNS: tl.constexpr = PATCH.columns
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        group = tile // tiles_per_group
        rows, corner = tile_rows(tile % tiles_per_group, group, batch, dy_height, dy_width, LINEAR.rows, None)
        linear = load_tile(
            dy, dy_y, dy_coef, dy_groups, dy_slope, group, rows, corner, (0, 0), channel,
            (dy_height, dy_width, c_dy), DTYPE, LINEAR,
        )  # fmt: skip
        strides = (x_n, x_h, x_w, x_c)
        patches = load_patches(x, x_y, x_coef, x_groups, x_slope, group, rows, (height, width), strides, DTYPE, PATCH)
        acc = dot(linear.T, patches, acc, PRECISION)
    c = channel + tl.arange(0, LINEAR.block_c)
    k = tl.arange(0, PATCH.columns)
    USED: tl.constexpr = PATCH.kernel[0] * PATCH.kernel[1] * PATCH.channels
    to = partials + (tl.program_id(0) * c_dy + c)[:, None] * USED + k[None, :]
    tl.store(to, acc, mask=(c < c_dy)[:, None] & (k < USED)[None, :])


# --- what the kernels take --------------------------------------------------------------------------------------------


def _columns(values: int) -> int:
    """The columns of a dot that hold so many values: a power of two, and what the tensor cores take at least."""
    return max(16, triton.next_power_of_2(values))


def why_not(call: Call) -> str | None:
    """None if `conv` or `weight_grad` can run this call, else the reason."""
    channels, kernel = call.a.x.shape[1], call.geometry.kernel
    if channels > MAX_IMAGE_CHANNELS:
        return f"{channels} channels on the image's side, more than {MAX_IMAGE_CHANNELS}"
    values = channels * kernel[0] * kernel[1]
    if values > _MAX_COLUMNS:
        return f"patches of {values} values, more than {_MAX_COLUMNS}"
    return contraction.why_not(call)


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """The operand of few channels, as it lies in memory."""

    x: Tensor
    y: Tensor | None
    coef: Tensor | None
    groups: int  # statistics groups of `coef`
    patch: Patch

    @classmethod
    def of(cls, a: Operand, geometry: Geometry) -> _Image:
        x = dense(a.x)
        y = None if a.y is None else like(x, a.y)
        coef = None if a.coef is None else a.coef.contiguous()
        channels, g = x.shape[1], geometry
        columns = _columns(channels * g.kernel[0] * g.kernel[1])
        affine = y is not None and coef is not None and coef.shape[0] == 4
        act = ACTIVATIONS[a.act].id
        patch = Patch(g.kernel, g.stride, g.padding, g.dilation, channels, columns, prologue_of(a), act, affine)
        return cls(x, y, coef, 1 if coef is None else coef.shape[1], patch)


def conv(call: Call, config: ImageSideConfig | None = None) -> tuple[Tensor, Tensor]:
    """The convolution of an operand with 1 to 4 channels, NHWC or NCHW in memory (other formats are copied)."""
    a, weight, e, size = call.a, call.b, call.epilogue, call.size
    config, image = config or _CONV, _Image.of(a, call.geometry)
    n, _, height, width = image.x.shape
    channels = weight.shape[0]
    e_groups = 1 if e.coef is None or e.coef.dim() == 1 else e.coef.shape[1]
    groups = max(image.groups, e.stat_groups, e_groups)
    tiles_per_group = triton.cdiv(n // groups * size[0] * size[1], config.pixels)
    out = launch.empty_nhwc((n, channels, *size), weight)
    partials = None
    if epilogue_rows(e):
        shape = (groups, tiles_per_group, epilogue_rows(e), channels)
        partials = torch.empty(shape, dtype=torch.float32, device=out.device)
    block_c = min(config.channels, _columns(channels))
    act = ACTIVATIONS[e.act].id
    epilogue_tile = EpilogueTile(e.kind, act, epilogue_rows(e), (1, 1), None, config.pixels, block_c, False)
    launch.start(
        conv_kernel, (groups * tiles_per_group, triton.cdiv(channels, block_c)),
        image.x, image.y, image.coef, float(a.slope), image.groups, weight, out,
        None if e.y is None else nhwc(e.y), None if e.coef is None else e.coef.contiguous(), float(e.slope),
        e_groups, partials, n // groups, tiles_per_group, height, width, *size, channels,
        image.x.stride(0), *image.x.stride()[2:], image.x.stride(1), *weight.stride(),
        PATCH=image.patch, EPILOGUE=epilogue_tile, PRECISION=launch.dot_precision(weight.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return in_format_of_torch(out, a.x, weight), combined(out, partials, e)


def weight_grad(call: Call, config: ImageSideConfig | None = None) -> Tensor:
    """The weight gradient of a gathered operand with 1 to 4 channels, in that operand's memory format."""
    assert isinstance(call.b, Operand)
    kernel = call.geometry.kernel
    image, wide = _Image.of(call.a, call.geometry), PrologueOperand.of(call.b)
    n, c_x, height, width = image.x.shape
    c_dy, *grid = wide.x.shape[1:]
    groups = max(image.groups, wide.groups)
    dtype = (image.x if image.y is None else image.y).dtype
    config = config or (_WEIGHT_GRAD_FLOAT32 if dtype == torch.float32 else _WEIGHT_GRAD)
    tiles_per_group = triton.cdiv(n // groups * grid[0] * grid[1], config.pixels)
    tiles = groups * tiles_per_group
    block_c = min(config.channels, _columns(c_dy))
    across = triton.cdiv(c_dy, block_c)
    share = triton.cdiv(tiles, config.splits or max(1, _PROGRAMS // across))
    splits = triton.cdiv(tiles, share)
    partials = torch.empty((1, splits, c_dy, c_x * kernel[0] * kernel[1]), device=image.x.device)
    launch.start(
        weight_grad_kernel, (splits, across),
        image.x, image.y, image.coef, float(call.a.slope), image.groups,
        wide.x, wide.y, wide.coef, float(call.b.slope), wide.groups, partials,
        tiles, share, n // groups, tiles_per_group, height, width, *grid, c_dy,
        image.x.stride(0), *image.x.stride()[2:], image.x.stride(1),
        PATCH=image.patch, LINEAR=wide.tile("pointer", (1, 1), (0, 0), config.pixels, block_c, False),
        PRECISION=launch.dot_precision(dtype), DTYPE=launch.triton_dtype(dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dw = combine_sums(partials, dtype).view(c_dy, *kernel, c_x).permute(0, 3, 1, 2)
    return dw.contiguous(memory_format=memory_format(call.a.x))


CONV = Algorithm("triton image-side", why_not, conv)
WEIGHT_GRAD = Algorithm("triton image-side", why_not, weight_grad)
