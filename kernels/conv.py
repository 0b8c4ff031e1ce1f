"""The convolution as an implicit GEMM: [pixels, taps*Ci] x [taps*Ci, Co], NHWC.

Forward of Conv2d, and the gradient of a transposed convolution's input. No column matrix exists: a tile of it is a tile
of the input, shifted by the tap (Chetlur et al., cuDNN: Efficient Primitives for Deep Learning, 2014, section 3).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.geometry import Geometry
from fastdcgan.kernels.contraction import Contraction, ImplicitGemm, why_not
from fastdcgan.kernels.epilogues import apply_epilogue
from fastdcgan.kernels.launch import dot, tile_of_program
from fastdcgan.kernels.partials import combined
from fastdcgan.kernels.prologues import load_tile, tile_rows
from fastdcgan.kernels.tiles import TileConfig
from fastdcgan.spec import Algorithm, Call, flat, flat_operand, in_format_of_torch


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
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [PROLOGUE.rows pixels, EPILOGUE.block_c channels] of the output of `groups` times `batch` images.

    `weight` is [Co, taps, Ci] in memory: a tensor descriptor of [Co, taps*Ci] where PROLOGUE.form is not "pointer".
    """
    m, tile_n = tile_of_program(splits * groups * tiles_per_group, tl.cdiv(c_out, EPILOGUE.block_c), GROUP_M)
    split = m // (groups * tiles_per_group)
    m = m % (groups * tiles_per_group)
    group = m // tiles_per_group
    # Triton 3.6 takes a tuple for a constant only by a name that is declared so.
    TMA_TILE: tl.constexpr = EPILOGUE.tma_tile
    rows, corner = tile_rows(m % tiles_per_group, group, batch, out_height, out_width, PROLOGUE.rows, TMA_TILE)
    co = tile_n * EPILOGUE.block_c
    size = (height, width, c_in)
    blocks = tl.cdiv(c_in, PROLOGUE.block_c)
    ROWS_M: tl.constexpr = PROLOGUE.rows
    COLUMNS_N: tl.constexpr = EPILOGUE.block_c
    acc = tl.zeros((ROWS_M, COLUMNS_N), tl.float32)
    steps = KERNEL[0] * KERNEL[1] * blocks
    share = tl.cdiv(steps, splits)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        tap = step // blocks
        ci = step % blocks * PROLOGUE.block_c
        shift = (tap // KERNEL[1] * DILATION[0] - PADDING[0], tap % KERNEL[1] * DILATION[1] - PADDING[1])
        if PROLOGUE.form == "pointer":
            o = co + tl.arange(0, EPILOGUE.block_c)
            i = ci + tl.arange(0, PROLOGUE.block_c)
            place = weight + (o[:, None] * (KERNEL[0] * KERNEL[1]) + tap) * c_in + i[None, :]
            b = tl.load(place, mask=(o < c_out)[:, None] & (i < c_in)[None, :], other=0.0)
        else:
            b = weight.load([co, tap * c_in + ci])
        a = load_tile(x, x_y, x_coef, x_groups, x_slope, group, rows, corner, shift, ci, size, b.dtype, PROLOGUE)
        acc = dot(a, b.T, acc, PRECISION)
    if EPILOGUE.part:
        out += split.to(tl.int64) * groups * batch * out_height * out_width * c_out
    apply_epilogue(
        acc, out, e_y, e_coef, e_groups, e_slope, partials, m, group, rows, corner, (0, 0), co,
        (out_height, out_width, c_out), EPILOGUE,
    )  # fmt: skip


def implicit_gemm(geometry: Geometry) -> ImplicitGemm:
    """How `conv_kernel` reads the input and writes the output."""
    g = geometry
    constants = {"KERNEL": g.kernel, "PADDING": g.padding, "DILATION": g.dilation}
    return ImplicitGemm(conv_kernel, "conv", g.stride, g.lead, (1, 1), g.kernel[0] * g.kernel[1], constants)


def contraction(call: Call) -> Contraction:
    """The matrix product that computes `call`. A kernel as large as its image has one pixel of long rows."""
    a, weight, geometry = call.a, call.b, call.geometry
    channels = weight.shape[0]
    if geometry.spans(*a.x.shape[2:]):
        a, weight, geometry = flat_operand(a), flat(weight), Geometry((1, 1))
    return Contraction(implicit_gemm(geometry), a, weight, channels, call.size, call.epilogue)


def conv(call: Call, tile: TileConfig | None = None) -> tuple[Tensor, Tensor]:
    """`a` [N, Ci, H, W], weight [Co, Ci, kh, kw] -> [N, Co, H', W'] in the weight's dtype, and the epilogue's vectors.

    float32, float16 or bfloat16, any memory format (copied to NHWC unless it is that), no groups. A `tile` that the GPU
    has no shared memory for raises `triton.runtime.errors.OutOfResources`.
    """
    out, partials = contraction(call).run(tile)
    return in_format_of_torch(out, call.a.x, call.b), combined(out, partials, call.epilogue)


CONV = Algorithm("triton", why_not, conv, lambda call: contraction(call).candidates(), TileConfig)
