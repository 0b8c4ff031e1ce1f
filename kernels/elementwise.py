"""How the elementwise passes and the reductions cut a tensor into tiles. Plain Python: `norm_act.py` has the kernels.

A tensor [N, C, H, W] is taken as `groups x outers` matrices of rows x columns; one side is contiguous in memory:

    NHWC   one matrix a group: a row is a pixel, or `fold` pixels; its columns are their channels
    NCHW   one matrix an image: a row is a pixel (contiguous), a column is a channel
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

# Four programs of four warps for each of an H100's 132 multiprocessors: one wave there.
_PROGRAMS = 528
# Elements of a tile, by the registers that a thread of four warps needs: at least 16 KB in flight per multiprocessor.
ELEMENTWISE_TILE_BYTES = 8192
STATS_TILE = 4096
GRAD_SUMS_TILE = 2048


@dataclass(frozen=True)
class PassConfig:
    """Launch knobs of a pass: the tile, how many tiles one program takes, pixels folded into one row, warps."""

    block_rows: int
    block_columns: int
    steps: int
    fold: int = 1
    num_warps: int = 4


@dataclass(frozen=True)
class Matrices:
    """A dense tensor's shape and strides as the kernels take them, before any fold."""

    channels_last: bool
    groups: int
    outers: int
    rows: int
    channels: int
    outer_stride: int
    row_stride: int
    channel_stride: int

    def tiles(self, config: PassConfig) -> int:
        """Tiles down one matrix."""
        return triton.cdiv(self.rows // config.fold, config.block_rows)

    def programs(self, config: PassConfig) -> int:
        """Programs that share out the rows of one group; at least one, so that every partial is written."""
        return max(1, triton.cdiv(self.outers * self.tiles(config), config.steps))

    def slots(self, config: PassConfig) -> int:
        """Partials of one group."""
        return self.programs(config) * config.fold

    def grid(self, config: PassConfig) -> tuple[int, int, int]:
        return self.programs(config), triton.cdiv(self.channels * config.fold, config.block_columns), self.groups

    def arguments(self, config: PassConfig) -> tuple[int, ...]:
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

    def options(self, config: PassConfig) -> dict[str, int | bool]:
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


def matrices_of(x: Tensor, groups: int) -> Matrices:
    """The matrices of `x` [N, C, H, W], dense, with statistics for each of `groups` equal parts of the batch."""
    n, c, h, w = x.shape
    if n % groups:
        raise ValueError(f"stat_groups={groups} must divide the batch size, got a batch of {n}")
    part, pixels = n // groups, h * w
    if is_channels_last(x):
        return Matrices(True, groups, 1, part * pixels, c, part * pixels * c, c, 1)
    return Matrices(False, groups, part, pixels, c, c * pixels, 1, pixels)


def elementwise_config(matrices: Matrices, element_size: int) -> PassConfig:
    """The heuristic of an elementwise pass: four 16-byte accesses for each thread and tensor."""
    return _tiles(matrices, ELEMENTWISE_TILE_BYTES // element_size)


def reduction_config(matrices: Matrices, elements: int) -> PassConfig:
    """The heuristic of a reduction: the rows are split so that the chip is full at any number of channels."""
    config = _tiles(matrices, elements)
    across = triton.cdiv(matrices.channels * config.fold, config.block_columns)
    tiles = matrices.groups * matrices.outers * matrices.tiles(config) * across
    return replace(config, steps=max(1, triton.cdiv(tiles, _PROGRAMS)))


def _tiles(matrices: Matrices, elements: int) -> PassConfig:
    """Tiles of about `elements`, one a program, that are whole 16-byte accesses wherever the shape allows it."""
    power = triton.next_power_of_2
    if not matrices.channels_last:
        block_rows = min(256, power(max(1, matrices.rows)))
        # Wider tiles of small images have to pass the coefficients through shared memory.
        return PassConfig(block_rows, min(elements // block_rows, power(matrices.channels), 64), 1)
    fold = _fold(matrices)
    columns = matrices.channels * fold
    block_columns = next((b for b in (128, 64) if columns % b == 0), min(128, power(columns)))
    return PassConfig(min(elements // block_columns, power(max(1, matrices.rows // fold))), block_columns, 1, fold)


def _fold(matrices: Matrices) -> int:
    """How many pixels make one row, so that its length is a multiple of 64 (or at least of 16) elements."""
    if matrices.channels % 64 == 0 or matrices.channels > 1024:
        return 1
    for multiple in (64, 32, 16):
        for fold in (1, 2, 4, 8, 16, 32, 64):
            if matrices.rows % fold == 0 and matrices.channels * fold % multiple == 0:
                return fold
    return 1
