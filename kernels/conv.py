"""The strided gather as an implicit matrix product: [pixels, taps*Ci] x [taps*Ci, Co], NHWC.

Forward of Conv2d, and the gradient of a transposed convolution's input. No column matrix exists: a tile of it is a tile
of the input, shifted by the tap (Chetlur et al., cuDNN: Efficient Primitives for Deep Learning, 2014, section 3).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.geometry import Geometry
from fastdcgan.kernels.contraction import Gather, combined, contract
from fastdcgan.kernels.epilogues import finish_tile
from fastdcgan.kernels.launch import dot, tile_of_program
from fastdcgan.kernels.prologues import load_tile, tile_rows
from fastdcgan.kernels.tiles import TileConfig
from fastdcgan.spec import STORE, Epilogue, Operand, flat, flat_operand, in_format_of_torch


@triton.jit
def conv_kernel(
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
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    SOURCE: tl.constexpr,
    SINK: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [SOURCE.rows pixels, SINK.block_c channels] of the output of `groups` times `batch` images.

    `weight` is [Co, taps, Ci] in memory: a tensor descriptor of [Co, taps*Ci] where the source is not "pointer".
    """
    m, tile_n = tile_of_program(splits * groups * tiles_per_group, tl.cdiv(c_out, SINK.block_c), GROUP_M)
    split = m // (groups * tiles_per_group)
    m = m % (groups * tiles_per_group)
    group = m // tiles_per_group
    # Triton 3.6 takes a tuple for a constant only by a name that is declared so.
    BOX: tl.constexpr = SINK.box
    rows, corner = tile_rows(m % tiles_per_group, group, batch, out_height, out_width, SOURCE.rows, BOX)
    co = tile_n * SINK.block_c
    size = (height, width, c_in)
    blocks = tl.cdiv(c_in, SOURCE.block_c)
    ROWS_M: tl.constexpr = SOURCE.rows
    COLUMNS_N: tl.constexpr = SINK.block_c
    acc = tl.zeros((ROWS_M, COLUMNS_N), tl.float32)
    steps = KERNEL[0] * KERNEL[1] * blocks
    share = tl.cdiv(steps, splits)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        tap = step // blocks
        ci = step % blocks * SOURCE.block_c
        shift = (tap // KERNEL[1] * DILATION[0] - PADDING[0], tap % KERNEL[1] * DILATION[1] - PADDING[1])
        if SOURCE.form == "pointer":
            o = co + tl.arange(0, SINK.block_c)
            i = ci + tl.arange(0, SOURCE.block_c)
            place = weight + (o[:, None] * (KERNEL[0] * KERNEL[1]) + tap) * c_in + i[None, :]
            b = tl.load(place, mask=(o < c_out)[:, None] & (i < c_in)[None, :], other=0.0)
        else:
            b = weight.load([co, tap * c_in + ci])
        a = load_tile(x, x_y, x_coef, x_groups, x_slope, group, rows, corner, shift, ci, size, b.dtype, SOURCE)
        acc = dot(a, b.T, acc, PRECISION)
    if SINK.part:
        out += split.to(tl.int64) * groups * batch * out_height * out_width * c_out
    finish_tile(
        acc, out, e_y, e_coef, e_groups, e_slope, partials, m, group, rows, corner, (0, 0), co,
        (out_height, out_width, c_out), SINK,
    )  # fmt: skip


def gather_of(geometry: Geometry) -> Gather:
    """How `conv_kernel` walks the input and the output."""
    g = geometry
    constants = {"KERNEL": g.kernel, "PADDING": g.padding, "DILATION": g.dilation}
    return Gather("conv", g.stride, g.lead, (1, 1), g.kernel[0] * g.kernel[1], constants)


def conv(
    a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue = STORE, config: TileConfig | None = None
) -> tuple[Tensor, Tensor]:
    """`a` [N, Ci, H, W], weight [Co, Ci, kh, kw] -> [N, Co, H', W'] in the weight's dtype, and the epilogue's vectors.

    float32, float16 or bfloat16, any memory format (copied to NHWC unless it is that), no groups. `config`: the tile.
    """
    height, width = a.x.shape[2:]
    size = geometry.conv_size(height, width)
    operand, kernel, walk = a, weight, geometry
    if geometry.spans(height, width):
        operand, kernel, walk = flat_operand(a), flat(weight), Geometry((1, 1))
    out, partials = contract(conv_kernel, gather_of(walk), operand, kernel, weight.shape[0], size, epilogue, config)
    return in_format_of_torch(out, a.x, weight), combined(out, partials, epilogue)
