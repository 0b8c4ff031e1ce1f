"""Partial statistics and sums, one slot for each program that wrote them, merged in a fixed order: no atomics.

Partials are float32 [groups, slots, rows, C]: (count, mean, M2), or sums. A program merges the slots of some channels
of a group, in ascending order down each of its lanes and then across the lanes; where there are very many slots, as
many programs as are needed write partials again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.kernels import launch
from fastdcgan.spec import Epilogue

_COMBINE_SLOTS = 1024  # that one program merges
_COMBINE_TILE = 4096  # values of each row that it loads at once


@triton.jit
def chan_reduce(count, mean, m2):
    """(count, mean, M2) of all rows of three [R, C], by Chan, Golub & LeVeque's formula ("Updating formulae and a
    pairwise algorithm for computing sample variances", 1979) for many parts at once: no part's squares are of more
    than its distance to the common mean. Parts with count 0 are ignored."""
    n = tl.sum(count, axis=0)
    share = tl.where(n > 0.0, 1.0 / tl.maximum(n, 1.0), 0.0)
    centre = tl.sum(count * mean, axis=0) * share
    delta = tl.where(count > 0.0, mean - centre[None, :], 0.0)
    # What rounding left of the weighted mean of the distances, which is 0 but for that.
    rest = tl.sum(count * delta, axis=0) * share
    return n, centre + rest, tl.sum(tl.where(count > 0.0, m2, 0.0) + count * delta * delta, axis=0) - n * rest * rest


@triton.jit
def combine_stats_kernel(
    partials, out, slots, chunk, channels, FINAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Merge `chunk` slots of [groups, slots, 3, C] into one; FINAL: into stats [3, groups, C]."""
    group = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    count = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, slots)
    for start in range(first, last, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        inside = (slot < last)[:, None] & mask[None, :]
        at = partials + (group * slots + slot).to(tl.int64)[:, None] * (3 * channels) + channel[None, :]
        n = tl.load(at, mask=inside, other=0.0)
        delta = tl.where(n > 0.0, tl.load(at + channels, mask=inside, other=0.0) - mean, 0.0)
        part = tl.load(at + 2 * channels, mask=inside, other=0.0)
        share = n / tl.maximum(count + n, 1.0)
        mean += delta * share
        m2 += tl.where(n > 0.0, part, 0.0) + delta * delta * (count * share)
        count += n
    n, mean, m2 = chan_reduce(count, mean, m2)
    if FINAL:
        row = tl.num_programs(2) * channels
        to = out + group * channels + channel
        tl.store(to, mean, mask=mask)
        tl.store(to + row, tl.div_rn(m2, n), mask=mask)
        tl.store(to + 2 * row, tl.div_rn(m2, n - 1.0), mask=mask)
    else:
        to = out + (group * tl.num_programs(0) + tl.program_id(0)) * 3 * channels + channel
        tl.store(to, n, mask=mask)
        tl.store(to + channels, mean, mask=mask)
        tl.store(to + 2 * channels, m2, mask=mask)


@triton.jit
def combine_sums_kernel(
    partials, out, slots, chunk, columns, channels, FINAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Add `chunk` slots of [groups, slots, columns] up; FINAL: into [columns/channels, groups, channels]."""
    group = tl.program_id(2)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < columns
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, slots)
    for start in range(first, last, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        at = partials + (group * slots + slot).to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(at, mask=(slot < last)[:, None] & mask[None, :], other=0.0)
    if FINAL:
        to = out + (column // channels * tl.num_programs(2) + group) * channels + column % channels
    else:
        to = out + (group * tl.num_programs(0) + tl.program_id(0)) * columns + column
    tl.store(to, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=mask)


def _chunk(slots: int) -> int:
    """How many of a group's partials one program merges: all of them where that is quick."""
    return slots if slots <= 2 * _COMBINE_SLOTS else _COMBINE_SLOTS


def _launch(parts: int, chunk: int, columns: int, groups: int) -> tuple[tuple[int, int, int], int, int]:
    """(grid, BLOCK_S, BLOCK_C) of a combine kernel in which `parts` programs merge `chunk` slots each."""
    block_slots = min(256, triton.next_power_of_2(max(1, chunk)))
    block_columns = min(128, _COMBINE_TILE // block_slots, triton.next_power_of_2(columns))
    return (parts, triton.cdiv(columns, block_columns), groups), block_slots, block_columns


def combine_stats(partials: Tensor) -> Tensor:
    """`stats` [3, groups, C] from partials [groups, slots, 3, C] of (count, mean, M2), float32, in a fixed order."""
    groups, slots, _, channels = partials.shape
    while True:
        chunk = _chunk(slots)
        parts = triton.cdiv(slots, chunk)
        final = parts == 1
        shape = (3, groups, channels) if final else (groups, parts, 3, channels)
        out = partials.new_empty(shape)
        grid, block_s, block_c = _launch(parts, chunk, channels, groups)
        launch.start(
            combine_stats_kernel,
            grid,
            partials,
            out,
            slots,
            chunk,
            channels,
            FINAL=final,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
            num_warps=8,
        )
        if final:
            return out
        partials, slots = out, parts


def combine_sums(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, groups, C] in `dtype`: partials [groups, slots, rows, C] added up over the slots in a fixed order."""
    groups, slots, rows, channels = partials.shape
    while True:
        chunk = _chunk(slots)
        parts = triton.cdiv(slots, chunk)
        final = parts == 1
        out = (
            partials.new_empty((rows, groups, channels), dtype=dtype)
            if final
            else partials.new_empty((groups, parts, rows, channels))
        )
        grid, block_s, block_c = _launch(parts, chunk, rows * channels, groups)
        launch.start(
        combine_sums_kernel, grid,
            partials, out, slots, chunk, rows * channels, channels, FINAL=final, BLOCK_S=block_s, BLOCK_C=block_c,
            num_warps=8,
        )  # fmt: skip
        if final:
            return out
        partials, slots = out, parts


def flat_partials(partials: Tensor | None, taps: int) -> Tensor | None:
    """The partials of an output with (tap, channel) for its channels (`spec.flat_epilogue`): every tap is a slot."""
    if partials is None:
        return None
    groups, slots, rows, values = partials.shape
    apart = partials.view(groups, slots, rows, taps, values // taps)
    return apart.transpose(2, 3).reshape(groups, slots * taps, rows, values // taps).contiguous()


def combined(out: Tensor, partials: Tensor | None, epilogue: Epilogue) -> Tensor:
    """What the epilogue returns beside the output: `stats` or `sums` (`fastdcgan/spec.py`), or an empty tensor."""
    if partials is None:
        return torch.empty(0, dtype=torch.float32, device=out.device)
    # The groups of the partials may be finer than those asked for, and nest in them.
    groups = epilogue.stat_groups if epilogue.kind == "stats" else epilogue.coef.shape[1]  # type: ignore[union-attr]
    partials = partials.view(groups, -1, *partials.shape[2:])
    return combine_stats(partials) if epilogue.kind == "stats" else combine_sums(partials)
