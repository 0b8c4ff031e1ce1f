"""The transposed convolution as dense matrix products, one for each phase of the output; zeros are never inserted.

Forward of ConvTranspose2d, and the gradient of a plain convolution's input. Output pixels `q*stride + f` of one phase
`f` take the same taps (`geometry.phases`), so a phase is a stride-1 convolution of the input by its own part of the
kernel (Shi et al., Is the deconvolution layer the same as a convolutional layer?, 2016).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.geometry import Geometry, phases
from fastdcgan.kernels.contraction import Contraction, ImplicitGemm, why_not
from fastdcgan.kernels.epilogues import apply_epilogue
from fastdcgan.kernels.launch import dot, tile_of_program
from fastdcgan.kernels.partials import combined, flat_partials
from fastdcgan.kernels.prologues import load_tile, tile_rows
from fastdcgan.kernels.tiles import TileConfig
from fastdcgan.spec import Algorithm, Call, flat, flat_epilogue, in_format_of_torch


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
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [PROLOGUE.rows pixels of one phase, EPILOGUE.block_c channels] of the output.

    The output has `groups` times `batch` images. `weight` is [Ci, taps, Co] in memory: a tensor descriptor of
    [Ci, taps*Co] where PROLOGUE.form is not "pointer". ROWS and COLUMNS are the `geometry.phases` of the two axes.
    """
    PHASES: tl.constexpr = EPILOGUE.stride[0] * EPILOGUE.stride[1]
    tiles_n = tl.cdiv(c_out, EPILOGUE.block_c)
    m, column = tile_of_program(splits * groups * tiles_per_group, PHASES * tiles_n, GROUP_M)
    split = m // (groups * tiles_per_group)
    m = m % (groups * tiles_per_group)
    group = m // tiles_per_group
    phase = column // tiles_n
    fy = phase // EPILOGUE.stride[1]
    fx = phase % EPILOGUE.stride[1]
    # Pixels q*stride + f below the output's size: the first phases may have one more than the last.
    grid_height = (out_height - fy + EPILOGUE.stride[0] - 1) // EPILOGUE.stride[0]
    grid_width = (out_width - fx + EPILOGUE.stride[1] - 1) // EPILOGUE.stride[1]
    # Triton 3.6 takes a tuple for a constant only by a name that is declared so.
    TMA_TILE: tl.constexpr = EPILOGUE.tma_tile
    TAPS_Y: tl.constexpr = ROWS.count
    TAPS_X: tl.constexpr = COLUMNS.count
    FIRST_Y: tl.constexpr = ROWS.first
    FIRST_X: tl.constexpr = COLUMNS.first
    OFFSET_Y: tl.constexpr = ROWS.offset
    OFFSET_X: tl.constexpr = COLUMNS.offset
    rows, corner = tile_rows(m % tiles_per_group, group, batch, grid_height, grid_width, PROLOGUE.rows, TMA_TILE)
    co = column % tiles_n * EPILOGUE.block_c
    size = (height, width, c_in)
    blocks = tl.cdiv(c_in, PROLOGUE.block_c)
    taps_y = entry(TAPS_Y, fy)
    taps_x = entry(TAPS_X, fx)
    ky = entry(FIRST_Y, fy)
    kx = entry(FIRST_X, fx)
    dy = entry(OFFSET_Y, fy)
    dx = entry(OFFSET_X, fx)
    ROWS_M: tl.constexpr = PROLOGUE.rows
    COLUMNS_N: tl.constexpr = EPILOGUE.block_c
    acc = tl.zeros((ROWS_M, COLUMNS_N), tl.float32)
    steps = taps_y * taps_x * blocks
    share = tl.cdiv(steps, splits)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        jy = step // blocks // taps_x
        jx = step // blocks % taps_x
        ci = step % blocks * PROLOGUE.block_c
        tap = (ky + jy * ROWS.tap_step) * KERNEL[1] + kx + jx * COLUMNS.tap_step
        shift = (dy - jy * ROWS.pixel_step, dx - jx * COLUMNS.pixel_step)
        if PROLOGUE.form == "pointer":
            o = co + tl.arange(0, EPILOGUE.block_c)
            i = ci + tl.arange(0, PROLOGUE.block_c)
            place = weight + (i[:, None] * (KERNEL[0] * KERNEL[1]) + tap) * c_out + o[None, :]
            b = tl.load(place, mask=(i < c_in)[:, None] & (o < c_out)[None, :], other=0.0)
        else:
            b = weight.load([ci, tap * c_out + co])
        a = load_tile(x, x_y, x_coef, x_groups, x_slope, group, rows, corner, shift, ci, size, b.dtype, PROLOGUE)
        acc = dot(a, b, acc, PRECISION)
    slot = (group * PHASES + phase) * tiles_per_group + m % tiles_per_group
    if EPILOGUE.part:
        out += split.to(tl.int64) * groups * batch * out_height * out_width * c_out
    apply_epilogue(
        acc, out, e_y, e_coef, e_groups, e_slope, partials, slot, group, rows, corner, (fy, fx), co,
        (out_height, out_width, c_out), EPILOGUE,
    )  # fmt: skip


def implicit_gemm(geometry: Geometry) -> ImplicitGemm:
    """How `conv_transpose_kernel` reads the input and writes the output."""
    g = geometry
    axes = [phases(*numbers) for numbers in zip(g.kernel, g.stride, g.padding, g.dilation, strict=True)]
    lowest = [min(o - max(c - 1, 0) * p.pixel_step for o, c in zip(p.offset, p.count, strict=True)) for p in axes]
    lead = (max(0, -lowest[0]), max(0, -lowest[1]))
    taps = g.kernel[0] * g.kernel[1] / (g.stride[0] * g.stride[1])
    constants = {"KERNEL": g.kernel, "ROWS": axes[0], "COLUMNS": axes[1]}
    return ImplicitGemm(conv_transpose_kernel, "conv_transpose", (1, 1), lead, g.stride, taps, constants)


def _spans(call: Call) -> bool:
    """Whether the output is a single pixel's, so that every tap of the kernel is a pixel of its own."""
    return tuple(call.a.x.shape[2:]) == (1, 1) and call.geometry.spans(*call.size)


def contraction(call: Call) -> Contraction:
    """The matrix product that computes `call`; where it `_spans`, to (tap, channel) for channels."""
    weight, channels = call.b, call.b.shape[1]
    if _spans(call):
        taps = weight.shape[2] * weight.shape[3]
        gemm, e = implicit_gemm(Geometry((1, 1))), flat_epilogue(call.epilogue, taps)
        return Contraction(gemm, call.a, flat(weight), taps * channels, (1, 1), e)
    return Contraction(implicit_gemm(call.geometry), call.a, weight, channels, call.size, call.epilogue)


def conv_transpose(call: Call, tile: TileConfig | None = None) -> tuple[Tensor, Tensor]:
    """`a` [N, Ci, H, W], weight [Ci, Co, kh, kw] -> [N, Co, *size] in the weight's dtype, and the epilogue's vectors.

    float32, float16 or bfloat16, any memory format (copied to NHWC unless it is that), no groups. A `tile` that the GPU
    has no shared memory for raises `triton.runtime.errors.OutOfResources`.
    """
    out, partials = contraction(call).run(tile)
    if _spans(call):
        _, channels, height, width = call.b.shape
        out = out.view(-1, *call.size, channels).permute(0, 3, 1, 2)
        partials = flat_partials(partials, height * width)
    return in_format_of_torch(out, call.a.x, call.b), combined(out, partials, call.epilogue)


CONV_TRANSPOSE = Algorithm("triton", why_not, conv_transpose, lambda call: contraction(call).candidates(), TileConfig)
