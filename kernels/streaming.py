"""How the passes that are bound by bytes walk a tensor, and their launch knobs. Plain Python: no kernel is here.

A tensor [N, C, H, W] is walked as `groups x outers` matrices of rows x columns; one side is contiguous in memory:

    NHWC   one matrix a group: a row is a pixel, or `fold` pixels; its columns are their channels
    NCHW   one matrix an image: a row is a pixel (contiguous), a column is a channel
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

# About four programs of four warps for each of an H100's 132 multiprocessors; on smaller chips a second wave.
_PROGRAMS = 528
_TILE_BYTES = 8192  # of each wide tensor: four 16-byte accesses in flight for each thread of four warps
_COMBINE_SLOTS = 1024  # that one program merges
_COMBINE_CHANNELS = 16  # of one program: two 32-byte sectors of float32


@dataclass(frozen=True)
class StreamConfig:
    """Launch knobs of a pass: the tile, how many tiles one program walks, pixels folded into one row, warps."""

    block_rows: int
    block_columns: int
    steps: int
    fold: int = 1
    num_warps: int = 4


@dataclass(frozen=True)
class Walk:
    """A dense tensor's shape and strides as the kernels take them, before any fold."""

    groups: int
    outers: int
    rows: int
    channels: int
    outer_stride: int
    row_stride: int
    channel_stride: int

    @property
    def channels_last(self) -> bool:
        return self.row_stride == self.channels

    def tiles(self, config: StreamConfig) -> int:
        """Tiles down one matrix."""
        return triton.cdiv(self.rows // config.fold, config.block_rows)

    def programs(self, config: StreamConfig) -> int:
        """Programs that share out the rows of one group; at least one, so that every partial is written."""
        return max(1, triton.cdiv(self.outers * self.tiles(config), config.steps))

    def slots(self, config: StreamConfig) -> int:
        """Partials of one group."""
        return self.programs(config) * config.fold

    def grid(self, config: StreamConfig) -> tuple[int, int, int]:
        return self.programs(config), triton.cdiv(self.channels * config.fold, config.block_columns), self.groups

    def arguments(self, config: StreamConfig) -> tuple[int, ...]:
        """`channels, outers, rows, columns, outer_stride, row_stride, column_stride, tiles, steps` of a kernel."""
        fold = config.fold
        return (
            self.channels,
            self.outers,
            self.rows // fold,
            self.channels * fold,
            self.outer_stride,
            self.row_stride * fold,
            self.channel_stride,
            self.tiles(config),
            config.steps,
        )

    def options(self, config: StreamConfig) -> dict[str, int | bool]:
        """The `constexpr` arguments and launch options of a kernel."""
        return {
            "FOLDED": config.fold > 1,
            "BLOCK_R": config.block_rows,
            "BLOCK_C": config.block_columns,
            "num_warps": config.num_warps,
        }


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` [N, C, H, W] lies in memory as NHWC (a tensor of one channel counts as NCHW)."""
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """`x` as it is where it is NHWC or NCHW in memory, else an NCHW copy."""
    return x if is_channels_last(x) else x.contiguous()


def like(x: Tensor, y: Tensor) -> Tensor:
    """`y` in the memory format of the dense tensor `x` of the same shape."""
    return y.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def walk_of(x: Tensor, groups: int) -> Walk:
    """How `x` [N, C, H, W], dense, is walked with statistics per each of `groups` equal parts of the batch."""
    n, c, h, w = x.shape
    if n % groups:
        raise ValueError(f"stat_groups={groups} must divide the batch size, got a batch of {n}")
    part, pixels = n // groups, h * w
    if is_channels_last(x):
        return Walk(groups, 1, part * pixels, c, part * pixels * c, c, 1)
    return Walk(groups, part, pixels, c, c * pixels, 1, pixels)


def stream_config(walk: Walk, element_size: int, reduces: bool = False) -> StreamConfig:
    """The heuristic: full tiles in whole 16-byte accesses, and a row split that fills the chip at any channel count."""
    elements = _TILE_BYTES // element_size
    if reduces and element_size == 4:
        elements //= 2  # two float32 accumulators for each element of the tile
    power = triton.next_power_of_2
    fold = 1
    if walk.channels_last:
        fold = _fold(walk)
        columns = walk.channels * fold
        block_columns = next((b for b in (128, 64) if columns % b == 0), min(128, power(columns)))
        block_rows = min(elements // block_columns, power(max(1, walk.rows // fold)))
    else:
        block_rows = min(256, power(max(1, walk.rows)))
        block_columns = min(elements // block_rows, power(walk.channels))
    config = StreamConfig(block_rows, block_columns, 1, fold)
    if not reduces:
        return config
    tiles = walk.outers * walk.tiles(config) * triton.cdiv(walk.channels * fold, block_columns) * walk.groups
    return StreamConfig(block_rows, block_columns, max(1, tiles // _PROGRAMS), fold)


def _fold(walk: Walk) -> int:
    """How many pixels make one row, so that its length is a multiple of 64 (or at least of 16) elements."""
    if walk.channels % 64 == 0 or walk.channels > 1024:
        return 1
    for multiple in (64, 32, 16):
        for fold in (1, 2, 4, 8, 16, 32, 64):
            if walk.rows % fold == 0 and walk.channels * fold % multiple == 0:
                return fold
    return 1


def combine_chunk(slots: int) -> int:
    """How many of a group's partials one program merges: all of them where that is quick."""
    return slots if slots <= 2 * _COMBINE_SLOTS else _COMBINE_SLOTS


def combine_launch(parts: int, chunk: int, columns: int, groups: int) -> tuple[tuple[int, int, int], int, int]:
    """(grid, BLOCK_S, BLOCK_C) of a combine kernel in which `parts` programs merge `chunk` slots each."""
    block_columns = min(_COMBINE_CHANNELS, triton.next_power_of_2(columns))
    block_slots = min(256, triton.next_power_of_2(max(1, chunk)))
    return (parts, triton.cdiv(columns, block_columns), groups), block_slots, block_columns
