"""Which tile a CUDA C++ contraction runs with: those that are compiled, and a heuristic that needs no measuring."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastdcgan.build_info import build_info


@dataclass(frozen=True)
class Tile:
    """A block's share of a matrix product [m, k] x [k, n], as `TileShape` in csrc/cuda/gemm/contraction.cuh."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    blocks: int  # that a multiprocessor's registers have room for
    rate: float  # ranks tiles by the multiply-adds that shared memory can feed with values; no measured throughput

    def shared_memory(self, itemsize: int, second_left: bool = False, second_right: bool = False) -> int:
        """Bytes of a block; `bn_backward` loads two tensors for its factor."""
        left, right = (side * self.k * itemsize * self.stages for side in (self.m, self.n))
        results = 4 * self.m * (self.n + 8)
        place = 128 * -(-(16 + 4 * self.m) // 128)
        return max(left + right, results) + place + left * second_left + right * second_right


@dataclass(frozen=True)
class Sm90Tile(Tile):
    """One of csrc/cuda/gemm_sm90, for GPUs of compute capability 9.0."""

    ring: int  # bytes of a block's stages where there is no prologue

    def blocks_with(self, prologue: bool) -> int:
        """Of a multiprocessor; beside 128 columns and more, a prologue leaves registers for one."""
        return 1 if prologue and self.n > 64 else self.blocks

    def ring_with(self, prologue: bool) -> int:
        return self.ring * self.blocks // self.blocks_with(prologue)


# By number, as in csrc/cuda/gemm/contraction_tiles.cuh and gemm_sm90/sm90_tiles.cuh (cuda_facts.py compares them): of
# 16-bit numbers, of floats, of 16-bit numbers on sm_90a.
TILES = (
    Tile(128, 128, 32, 8, 4, 2, 1.0),
    Tile(128, 64, 32, 4, 4, 3, 0.85),
    Tile(64, 128, 32, 4, 4, 3, 0.85),
    Tile(64, 64, 64, 4, 3, 4, 0.7),
    Tile(128, 32, 32, 4, 4, 4, 0.5),
    Tile(128, 64, 32, 8, 3, 2, 1.0),
    Tile(64, 64, 32, 4, 3, 4, 0.8),
    Sm90Tile(128, 256, 64, 8, 4, 1, 2.0, 192 * 1024),
    Sm90Tile(128, 128, 64, 8, 3, 2, 1.6, 96 * 1024),
    Sm90Tile(128, 64, 64, 8, 4, 2, 1.15, 96 * 1024),
)
OF_SIZE = {2: range(5), 4: range(5, 7)}
OF_SM90 = range(7, 10)
_MAX_SPLITS = 64
MAX_PARTS = 1024  # that the operators take
_MIN_STEPS = 8  # of the depth in one block: filling its pipeline takes about half as many
_BYTE = 64  # multiply-adds in the time of moving one byte of workspace through the second-level cache
_ALONE = 0.6  # of a multiprocessor's rate, for a block that has it to itself: nothing hides its waits
_SM90_ALONE = 0.85  # the same where a warp of its own copies: nothing hides the epilogue


@dataclass(frozen=True)
class Device:
    """What the choice needs to know of a GPU."""

    processors: int
    shared_memory: int  # bytes that one block may have
    shared_in_all: int  # bytes of a multiprocessor
    sm90: bool = False  # compute capability 9.0, and a library that was built for it


H100 = Device(132, 227 * 1024, 228 * 1024, True)  # CUDA C++ Programming Guide, Compute Capabilities


@dataclass(frozen=True)
class Problem:
    """`count` matrix products [m, k] x [k, n] of numbers of `itemsize` bytes."""

    m: int
    n: int
    k: int
    count: int  # phases of a transposed conv, taps of weight_grad
    itemsize: int
    second_left: bool = False  # whether bn_backward is computed on load
    second_right: bool = False
    tma_tiles: int = 0  # TMA tiles of pixels that cover `m` (cuda_tma.py); 0 where TMA can't copy them
    prologue: bool = False  # of the left factor, or of weight_grad's right one


@dataclass(frozen=True)
class Choice:
    """A tile by its number, and the parts of the depth. Raises ValueError if there is no such tile or number."""

    number: int
    splits: int

    def __post_init__(self) -> None:
        if self.number not in range(len(TILES)) or not 1 <= self.splits <= MAX_PARTS:
            raise ValueError(f"{self}: expected a tile below {len(TILES)} and 1 to {MAX_PARTS} parts")

    @property
    def tile(self) -> Tile:
        return TILES[self.number]


@lru_cache
def device_of(device: torch.device) -> Device:
    """The GPU behind `device`; for CPU tensors, which the tests run on, one of a single multiprocessor."""
    if device.type != "cuda":
        return Device(1, H100.shared_memory, H100.shared_in_all)
    found = torch.cuda.get_device_properties(device)
    block = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    in_all = getattr(found, "shared_memory_per_multiprocessor", block)
    sm90 = (found.major, found.minor) == (9, 0) and "9.0a" in build_info().cuda.architectures
    return Device(found.multi_processor_count, block, in_all, sm90)


def blocks(problem: Problem, tile: Tile) -> int:
    """Tiles of the result."""
    if isinstance(tile, Sm90Tile):
        return problem.tma_tiles * _ceil_div(problem.n, tile.n) * problem.count
    return _ceil_div(problem.m, tile.m) * _ceil_div(problem.n, tile.n) * problem.count


def resident(problem: Problem, tile: Tile, device: Device) -> int:
    """Blocks that a multiprocessor has room for at a time; 0 if a block has not enough shared memory."""
    if isinstance(tile, Sm90Tile):
        return tile.blocks_with(problem.prologue)
    size = tile.shared_memory(problem.itemsize, problem.second_left, problem.second_right)
    return min(tile.blocks, device.shared_in_all // (size + 1024)) if size <= device.shared_memory else 0


def candidates(problem: Problem, device: Device) -> list[int]:
    """Numbers of the tiles that the problem may have, and that the device has the shared memory for."""
    own = OF_SM90 if device.sm90 and problem.tma_tiles and problem.itemsize == 2 else ()
    return [number for number in (*OF_SIZE[problem.itemsize], *own) if resident(problem, TILES[number], device)]


@lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device) -> Choice:
    """The tile, and the parts of the depth, that would take the least time if blocks took turns on multiprocessors.

    Raises ValueError if no tile fits the device.
    """
    costs = {
        Choice(number, splits): cost(problem, Choice(number, splits), device)
        for number in candidates(problem, device)
        for splits in _splits(problem, TILES[number], device)
    }
    if not costs:
        raise ValueError(f"no tile fits a block's {device.shared_memory} bytes of shared memory")
    return min(costs, key=lambda choice: costs[choice])


def shortlist(problem: Problem, device: Device) -> list[Choice]:
    """What tuning tries: of each tile what the rule ranks first, with as many parts and with half or twice as many."""
    found = []
    for number in candidates(problem, device):
        by_splits = {n: cost(problem, Choice(number, n), device) for n in _splits(problem, TILES[number], device)}
        best = min(by_splits, key=lambda n: by_splits[n])
        found += [Choice(number, n) for n in by_splits if best <= 2 * n and n <= 2 * best]
    return sorted(found, key=lambda choice: cost(problem, choice, device))


def cost(problem: Problem, choice: Choice, device: Device) -> float:
    """The time of a choice, in multiply-adds of one multiprocessor at its best rate."""
    tile = choice.tile
    room = resident(problem, tile, device)
    all_blocks = blocks(problem, tile) * choice.splits
    steps = _ceil_div(_ceil_div(problem.k, tile.k), choice.splits) + tile.stages
    full, rest = divmod(all_blocks, device.processors * room)
    last = _ceil_div(rest, device.processors)  # blocks of the busiest multiprocessor in the last turn
    alone = _SM90_ALONE if isinstance(tile, Sm90Tile) else _ALONE
    turns = full * room / (alone if room == 1 else 1.0) + (max(last, 1 / alone) if last else 0)
    work = turns * steps * tile.m * tile.n * tile.k / tile.rate
    if choice.splits > 1:  # float32, written and read
        work += 8 * choice.splits * problem.m * problem.n * problem.count * _BYTE / device.processors
    return work


def _splits(problem: Problem, tile: Tile, device: Device) -> list[int]:
    """1, and powers of two as long as multiprocessors would be idle and the parts are not too short."""
    found = [1]
    while (
        2 * found[-1] <= _MAX_SPLITS
        and blocks(problem, tile) * found[-1] < 2 * device.processors
        and problem.k >= 2 * found[-1] * _MIN_STEPS * tile.k
    ):
        found.append(2 * found[-1])
    return found


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
