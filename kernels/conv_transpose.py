"""The adjoint of the strided gather as dense matrix products, one per phase of the output; zeros are never inserted.

Forward of ConvTranspose2d, and the gradient of a plain convolution's input. Output pixels `q*stride + f` of one phase
`f` take the same taps (`geometry.phases`), so a phase is a stride-1 convolution of the input by its own part of the
kernel (Shi et al., Is the deconvolution layer the same as a convolutional layer?, 2016).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.geometry import Geometry, Pair, phases
from fastdcgan.kernels.contraction import Gather, combined, contract, flat_partials
from fastdcgan.kernels.epilogues import finish_tile
from fastdcgan.kernels.launch import dot, tile_of_program
from fastdcgan.kernels.prologues import load_tile, tile_rows
from fastdcgan.kernels.tiles import TileConfig
from fastdcgan.spec import STORE, Epilogue, Operand, flat, flat_epilogue, in_format_of_torch


@triton.jit
def entry(TABLE: tl.constexpr, i):
    """TABLE[i] of a tuple of constants."""
    value = TABLE[0]
    for j in tl.static_range(1, len(TABLE)):
        value = tl.where(i == j, TABLE[j], value)
    return value


@triton.jit
def conv_transpose_kernel(
    x,
    x_y,
    x_coef,
    x_slope,
    x_groups,
    weight,
    out,
    e_y,
    e_coef,
    e_slope,
    e_groups,
    partials,
    groups,
    batch,
    tiles_per_group,
    splits,
    height,
    width,
    c_in,
    out_height,
    out_width,
    c_out,
    KERNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOURCE: tl.constexpr,
    SINK: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [SOURCE.rows pixels of one phase, SINK.block_c channels] of the output of `groups` times `batch` images.

    `weight` is [Ci, taps, Co] in memory: a tensor descriptor of [Ci, taps*Co] where the source is not "pointer". ROWS
    and COLUMNS are the `geometry.phases` of the two axes.
    """
    tiles_n = tl.cdiv(c_out, SINK.block_c)
    m, column = tile_of_program(splits * groups * tiles_per_group, SINK.stride[0] * SINK.stride[1] * tiles_n, GROUP_M)
    split = m // (groups * tiles_per_group)
    m = m % (groups * tiles_per_group)
    group = m // tiles_per_group
    phase = column // tiles_n
    fy = phase // SINK.stride[1]
    fx = phase % SINK.stride[1]
    # Pixels q*stride + f below the output's size: the first phases may have one more than the last.
    grid_height = (out_height - fy + SINK.stride[0] - 1) // SINK.stride[0]
    grid_width = (out_width - fx + SINK.stride[1] - 1) // SINK.stride[1]
    # Triton 3.6 takes a tuple for a constant only by a name that is declared so.
    BOX: tl.constexpr = SINK.box
    TAPS_Y: tl.constexpr = ROWS.count
    TAPS_X: tl.constexpr = COLUMNS.count
    FIRST_Y: tl.constexpr = ROWS.first
    FIRST_X: tl.constexpr = COLUMNS.first
    OFFSET_Y: tl.constexpr = ROWS.offset
    OFFSET_X: tl.constexpr = COLUMNS.offset
    rows, corner = tile_rows(m % tiles_per_group, group, batch, grid_height, grid_width, SOURCE.rows, BOX)
    co = column % tiles_n * SINK.block_c
    size = (height, width, c_in)
    blocks = tl.cdiv(c_in, SOURCE.block_c)
    taps_y = entry(TAPS_Y, fy)
    taps_x = entry(TAPS_X, fx)
    ky = entry(FIRST_Y, fy)
    kx = entry(FIRST_X, fx)
    dy = entry(OFFSET_Y, fy)
    dx = entry(OFFSET_X, fx)
    ROWS_M: tl.constexpr = SOURCE.rows
    COLUMNS_N: tl.constexpr = SINK.block_c
    acc = tl.zeros((ROWS_M, COLUMNS_N), tl.float32)
    steps = taps_y * taps_x * blocks
    share = tl.cdiv(steps, splits)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        jy = step // blocks // taps_x
        jx = step // blocks % taps_x
        ci = step % blocks * SOURCE.block_c
        tap = (ky + jy * ROWS.tap_step) * KERNEL[1] + kx + jx * COLUMNS.tap_step
        shift = (dy - jy * ROWS.pixel_step, dx - jx * COLUMNS.pixel_step)
        if SOURCE.form == "pointer":
            o = co + tl.arange(0, SINK.block_c)
            i = ci + tl.arange(0, SOURCE.block_c)
            place = weight + (i[:, None] * (KERNEL[0] * KERNEL[1]) + tap) * c_out + o[None, :]
            b = tl.load(place, mask=(i < c_in)[:, None] & (o < c_out)[None, :], other=0.0)
        else:
            b = weight.load([ci, tap * c_out + co])
        a = load_tile(x, x_y, x_coef, x_groups, x_slope, group, rows, corner, shift, ci, size, b.dtype, SOURCE)
        acc = dot(a, b, acc, PRECISION)
    slot = group * tiles_per_group * SINK.stride[0] * SINK.stride[1] + phase * tiles_per_group + m % tiles_per_group
    if SINK.part:
        out += split.to(tl.int64) * groups * batch * out_height * out_width * c_out
    finish_tile(
        acc, out, e_y, e_coef, e_groups, e_slope, partials, slot, group, rows, corner, (fy, fx), co,
        (out_height, out_width, c_out), SINK,
    )  # fmt: skip


def gather_of(geometry: Geometry) -> Gather:
    """How `conv_transpose_kernel` walks the input and the output."""
    g = geometry
    axes = [phases(*numbers) for numbers in zip(g.kernel, g.stride, g.padding, g.dilation, strict=True)]
    lowest = [min(o - max(c - 1, 0) * p.pixel_step for o, c in zip(p.offset, p.count, strict=True)) for p in axes]
    lead = (max(0, -lowest[0]), max(0, -lowest[1]))
    taps = g.kernel[0] * g.kernel[1] / (g.stride[0] * g.stride[1])
    constants = {"KERNEL": g.kernel, "ROWS": axes[0], "COLUMNS": axes[1]}
    return Gather("conv_transpose", (1, 1), lead, g.stride, taps, constants)


def conv_transpose(
    a: Operand,
    weight: Tensor,
    geometry: Geometry,
    output_size: Pair,
    epilogue: Epilogue = STORE,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`a` [N, Ci, H, W], weight [Ci, Co, kh, kw] -> [N, Co, *output_size] in the weight's dtype, and
    the epilogue's vectors.

    float32, float16 or bfloat16, any memory format (copied to NHWC unless it is that), no groups. `config`: the tile.
    """
    channels, taps = weight.shape[1], weight.shape[2] * weight.shape[3]
    if a.x.shape[2:] == (1, 1) and geometry.spans(*output_size):
        gather, e = gather_of(Geometry((1, 1))), flat_epilogue(epilogue, taps)
        out, partials = contract(conv_transpose_kernel, gather, a, flat(weight), taps * channels, (1, 1), e, config)
        out = out.view(-1, *output_size, channels).permute(0, 3, 1, 2)
        partials = flat_partials(partials, taps)
    else:
        gather = gather_of(geometry)
        out, partials = contract(conv_transpose_kernel, gather, a, weight, channels, output_size, epilogue, config)
    return in_format_of_torch(out, a.x, weight), combined(out, partials, epilogue)
