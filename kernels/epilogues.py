"""What happens to the accumulator of a contraction before it is stored: bias, activation, statistics.

Tiles that return statistics write **partials**: float32 `[stat_groups, tiles_per_group, rows, C]`, contiguous.

    stats       rows = 3: (count, mean, M2) of the tile's values per channel, M2 = sum((value - mean)^2)
    grad_stats  rows = 2: (sum(g), sum(g*xhat)), or rows = 1: (sum(g),) for a coef of two rows

Both are of the values as they are stored: the rounding error of a constant channel, the same everywhere, would
otherwise stay as a distance to its mean, and be multiplied by 1/sqrt(eps).

A tile covers pixels of one statistics group. Every slot is written by exactly one program; a tile that covers no pixel
has count = mean = M2 = 0. `partials.combine_stats` and `combine_sums` merge the tiles of a group in a fixed order
(Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979), so the same
input gives the same bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fastdcgan.geometry import Pair
from fastdcgan.kernels.activations import activation, activation_derivative
from fastdcgan.kernels.prologues import tile_rows
from fastdcgan.kernels.tiles import TmaTile
from fastdcgan.spec import Epilogue


@dataclass(frozen=True)
class EpilogueTile:
    """The epilogue of a tile, and how it is stored (a `constexpr` of the kernels)."""

    epilogue: str  # "none" | "bias" | "activate" | "stats" | "grad_stats"
    act: int
    partial_rows: int  # rows of the partials, 0 without
    stride: Pair  # the tile's pixels are `stride` apart in the output: the phases of a transposed conv
    tma_tile: TmaTile | None  # None where a tile is a run of pixels
    rows: int
    block_c: int
    descriptors: bool  # `out` and `y` are tensor descriptors (`launch.tile_argument`, "tma")
    part: bool = False  # the tile is a part of a sum, and goes to a workspace that `epilogue_kernel` reads


def epilogue_rows(epilogue: Epilogue) -> int:
    """Rows of the partials that the epilogue writes, 0 if none."""
    if epilogue.kind == "stats":
        return 3
    if epilogue.kind == "grad_stats":
        assert epilogue.coef is not None
        return epilogue.coef.shape[0] // 2
    return 0


@triton.jit
def apply_epilogue(
    acc, out, y, coef, coef_groups, slope, partials, slot, group, rows, corner, phase, channel, size, S: tl.constexpr
):
    """Apply the epilogue to `acc` [rows, block_c] float32, store it, and write its partials to `slot`.

    `rows` and `corner` are those of `prologues.tile_rows`, `phase` the pixel of the output where they begin, `channel`
    the first output channel, `size` the output's (height, width, channels).
    """
    n, q, r, inside = rows
    n0, q0, r0 = corner
    height, width, channels = size
    c = channel + tl.arange(0, S.block_c)
    in_range = c < channels
    pixel = (n * height + q * S.stride[0] + phase[0]) * width + r * S.stride[1] + phase[1]
    offsets = pixel[:, None] * channels + c[None, :]
    mask = inside[:, None] & in_range[None, :]
    STORED: tl.constexpr = out.dtype if S.descriptors else out.dtype.element_ty

    if S.epilogue == "bias":
        acc += tl.load(coef + c, mask=in_range, other=0.0).to(tl.float32)[None, :]
    elif S.epilogue == "activate" or S.epilogue == "grad_stats":
        first = coef + (group % coef_groups) * channels + c
        step = coef_groups * channels
        s = tl.load(first, mask=in_range, other=0.0)
        t = tl.load(first + step, mask=in_range, other=0.0)
        if S.epilogue == "activate":
            acc = activation(acc * s[None, :] + t[None, :], slope, S.act)
        else:
            if S.descriptors:
                raw = y.load([n0, q0, phase[0], r0, phase[1] * channels + channel]).reshape(S.rows, S.block_c)
            else:
                raw = tl.load(y + offsets, mask=mask, other=0.0)
            z = raw.to(tl.float32) * s[None, :] + t[None, :]
            acc = acc * activation_derivative(z, slope, S.act)

    # Stored before anything is summed: then the accumulator is in half as many registers.
    stored = acc.to(STORED)
    if S.descriptors:
        tile = stored.reshape(S.tma_tile[0], S.tma_tile[1], 1, S.tma_tile[2], S.block_c)
        out.store([n0, q0, phase[0], r0, phase[1] * channels + channel], tile)
    else:
        tl.store(out + offsets, stored, mask=mask)

    if S.partial_rows:
        place = partials + slot * S.partial_rows * channels + c
    if S.epilogue == "grad_stats":
        g = stored.to(tl.float32)
        tl.store(place, tl.sum(tl.where(inside[:, None], g, 0.0), 0), mask=in_range)
        if S.partial_rows == 2:
            mean = tl.load(first + 2 * step, mask=in_range, other=0.0)
            rstd = tl.load(first + 3 * step, mask=in_range, other=0.0)
            # Only the sum is multiplied by rstd, whose values would otherwise be in registers for each pixel.
            centred = tl.where(mask, g * (raw.to(tl.float32) - mean[None, :]), 0.0)
            tl.store(place + channels, tl.sum(centred, 0) * rstd, mask=in_range)
    elif S.epilogue == "stats":
        value = stored.to(tl.float32)
        count = tl.sum(inside.to(tl.float32), 0)
        mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / tl.maximum(count, 1.0)
        centred = tl.where(inside[:, None], value - mean[None, :], 0.0)
        tl.store(place, tl.zeros_like(mean) + count, mask=in_range)
        tl.store(place + channels, mean, mask=in_range)
        tl.store(place + 2 * channels, tl.sum(centred * centred, 0), mask=in_range)


@triton.jit
def epilogue_kernel(
    parts,
    out,
    e_y,
    e_coef,
    e_slope,
    e_groups,
    partials,
    splits,
    values,
    batch,
    tiles_per_group,
    height,
    width,
    channels,
    EPILOGUE: tl.constexpr,
):
    """Add up the parts [splits, values] of an output in ascending order and apply the epilogue, one tile a program."""
    tiles_n = tl.cdiv(channels, EPILOGUE.block_c)
    m = tl.program_id(0) // tiles_n
    channel = tl.program_id(0) % tiles_n * EPILOGUE.block_c
    group = m // tiles_per_group
    # Triton 3.6 takes a tuple for a constant only by a name that is declared so.
    TMA_TILE: tl.constexpr = EPILOGUE.tma_tile
    rows, corner = tile_rows(m % tiles_per_group, group, batch, height, width, EPILOGUE.rows, TMA_TILE)
    n, q, r, inside = rows
    c = channel + tl.arange(0, EPILOGUE.block_c)
    pixel = (n * height + q) * width + r
    place = parts + pixel[:, None] * channels + c[None, :]
    mask = inside[:, None] & (c < channels)[None, :]
    ROWS: tl.constexpr = EPILOGUE.rows
    COLUMNS: tl.constexpr = EPILOGUE.block_c
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(splits):
        acc += tl.load(place, mask=mask, other=0.0)
        place += values
    apply_epilogue(
        acc, out, e_y, e_coef, e_groups, e_slope, partials, m, group, rows, corner, (0, 0), channel,
        (height, width, channels), EPILOGUE,
    )  # fmt: skip
