"""Which tile a contraction runs with: what a tile is, the search space, and a heuristic that needs no measuring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class TileConfig:
    """One program's share of a contraction, as a matrix product [block_m, block_k] x [block_k, block_n].

    conv, conv_transpose: m pixels, n output channels, k input channels. weight_grad: m channels of the gathered
    operand, n channels of the linear one, k pixels. The blocks are powers of two, of at least 16.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8  # tiles along m that run next to each other, for the second-level cache
    splits: int = 1  # parts of the reduction, added up in a fixed order afterwards
    descriptors: bool = True  # tensor descriptors where the operands allow it, else masked pointers

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < (1 if name == "num_warps" else 16) or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, and a block at least 16, got {value}")

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold the tile's sums."""
        return self.block_m * self.block_n // (32 * self.num_warps)


@dataclass(frozen=True)
class Device:
    """What the choice of a tile needs to know of a GPU."""

    name: str
    arch: int  # 80, 90 or 100: the kind of tile
    processors: int
    shared_memory: int  # bytes that one program may have


# Multiprocessors and shared memory of A100, RTX 4090, H100, B200 and RTX 5090 (CUDA C++ Programming Guide, Compute
# Capabilities), by the architecture that kernels are compiled for.
KNOWN = {
    80: Device("sm_80", 80, 108, 163 * 1024),
    89: Device("sm_89", 80, 128, 99 * 1024),
    90: Device("sm_90", 90, 132, 227 * 1024),
    100: Device("sm_100", 100, 148, 227 * 1024),
    120: Device("sm_120", 80, 170, 99 * 1024),
}


@lru_cache
def device_of(device: torch.device) -> Device:
    """The GPU behind `device`; in the interpreter, where programs run one by one, an H100 of one multiprocessor."""
    if device.type != "cuda":
        return replace(KNOWN[90], name="interpreter", processors=1)
    found = torch.cuda.get_device_properties(device)
    # wgmma and tcgen05 are of just these; every other GPU runs the tiles for mma.sync and cp.async.
    arch = {9: 90, 10: 100}.get(found.major, 80)
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    return Device(found.name, arch, found.multi_processor_count, shared)


@dataclass(frozen=True)
class Problem:
    """What a tile is chosen for: `count` matrix products [m, k] x [k, n]."""

    op: str  # "conv" | "conv_transpose" | "weight_grad"
    dtype: torch.dtype
    m: int
    n: int
    k: int
    count: int  # phases of a transposed conv, taps of weight_grad
    prologue: str  # of weight_grad's two operands, joined by a space
    epilogue: str
    descriptors: bool  # whether tensor descriptors can read the operands
    unaligned: int  # how many of the two operands have rows that are no multiple of 16 bytes

    @property
    def prologues(self) -> tuple[str, str]:
        """Of the left and the right operand of the product; weights have none."""
        left, _, right = self.prologue.partition(" ")
        return left, right or "none"

    def blocks(self, config: TileConfig) -> int:
        """Tiles of the result."""
        return ceil_div(self.m, config.block_m) * ceil_div(self.n, config.block_n) * self.count

    def shared_memory(self, config: TileConfig) -> int:
        """Bytes of the tiles in flight: bn_backward loads two for its operand."""
        left, right = (2 if prologue == "bn_backward" else 1 for prologue in self.prologues)
        values = (left * config.block_m + right * config.block_n) * config.block_k
        return values * self.dtype.itemsize * config.num_stages


# --- covering a grid of pixels ---------------------------------------------------------------------------------------

TmaTile = tuple[int, int, int]  # images, rows, columns
_MAX_SIDE = 256  # of a TMA tile: what a tensor-map copy takes (CUDA driver API, cuTensorMapEncodeTiled)


@lru_cache(maxsize=4096)
def tma_tile(rows: int, batch: int, height: int, width: int) -> TmaTile:
    """The TMA tile of `rows` pixels, with powers of two for its sides. Of those that cover `batch` grids of `height` x
    `width` with the fewest tiles it is the widest, and of equally wide ones the highest."""
    sides = [1 << bits for bits in range(rows.bit_length())]
    found = [(rows // (h * w), h, w) for w in reversed(sides) for h in reversed(sides) if h * w <= rows]
    return min((t for t in found if max(t) <= _MAX_SIDE), key=lambda t: tile_count(rows, t, batch, height, width))


def tile_count(rows: int, tile: TmaTile | None, batch: int, height: int, width: int) -> int:
    """How many TMA tiles, or runs of `rows` pixels where `tile` is None, cover `batch` grids of `height` x `width`."""
    if tile is None:
        return ceil_div(batch * height * width, rows)
    return ceil_div(batch, tile[0]) * ceil_div(height, tile[1]) * ceil_div(width, tile[2])


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- heuristic -------------------------------------------------------------------------------------------------------

# Per architecture (block_m, block_n, num_warps, num_stages, rate). `rate` ranks tiles by the multiply-adds that they do
# for each value they load; it is no measured throughput.
_LADDER = {
    80: (
        (128, 128, 8, 3, 1.0),
        (128, 64, 4, 3, 0.85),
        (64, 128, 4, 3, 0.85),
        (128, 64, 8, 3, 0.8),
        (64, 128, 8, 3, 0.8),
        (64, 64, 4, 4, 0.65),
        (64, 64, 8, 4, 0.6),
        (128, 32, 4, 4, 0.55),
        (64, 32, 4, 4, 0.45),
        (128, 16, 8, 4, 0.3),
        (64, 16, 4, 4, 0.2),
    ),
    90: (
        (128, 256, 8, 3, 1.0),
        (128, 128, 8, 4, 0.9),
        (128, 64, 4, 4, 0.7),
        (64, 128, 4, 4, 0.7),
        (128, 64, 8, 4, 0.65),
        (64, 128, 8, 4, 0.65),
        (64, 64, 4, 4, 0.5),
        (128, 32, 4, 4, 0.4),
        (64, 32, 4, 4, 0.3),
        (128, 16, 4, 4, 0.2),
        (64, 16, 4, 4, 0.15),
    ),
    100: (
        (128, 128, 8, 4, 1.0),
        (128, 64, 8, 4, 0.7),
        (64, 128, 8, 4, 0.7),
        (64, 64, 4, 4, 0.5),
        (64, 64, 8, 4, 0.45),
        (128, 32, 4, 4, 0.4),
        (64, 32, 4, 4, 0.3),
        (128, 16, 4, 4, 0.2),
        (64, 16, 4, 4, 0.15),
    ),
}
# How many accumulators a thread has room for without spilling, as compiled by Triton 3.7.1, for each architecture and
# number of bytes of a value: beside the grad_stats epilogue; beside two prologues, or bn_backward in weight_grad; and
# beside anything else.
_ROOM = {
    (80, 2): (32, 32, 64),
    (80, 4): (32, 16, 32),
    (90, 2): (64, 64, 128),
    (90, 4): (64, 64, 128),
    (100, 2): (64, 32, 64),
    (100, 4): (32, 16, 64),
}
# The same where the operands are read by pointers, and where neither operand's rows are a multiple of 16 bytes: every
# value is then loaded by itself, and steps are half as long.
_ROOM_POINTERS = {80: 64, 90: 64, 100: 16}
_ROOM_UNALIGNED = {80: 16, 90: 32, 100: 16}
# bn_backward loads two values for each one of its operand. How many of those a thread has room for, alone and together
# with the accumulators.
_ROOM_BN_BACKWARD = 32
_ROOM_BOTH = 128
_STEP_BYTES = 128  # of one row of a tile: the widest swizzle of shared memory
_RESERVED = 8 * 1024  # shared memory for barriers and reductions
_MAX_SPLITS = 64
_SHORT = 12  # candidates to measure: compiling one takes seconds
_MIN_STEPS = 8  # of the reduction in one program: filling its pipeline takes about half as many
_BYTE = 64  # multiply-adds in the time of moving one byte of workspace through the second-level cache


@lru_cache(maxsize=4096)
def heuristic(problem: Problem, device: Device) -> TileConfig:
    """The candidate that would take the least time if its tiles took turns on the multiprocessors."""
    return shortlist(problem, device)[0]


def shortlist(problem: Problem, device: Device) -> list[TileConfig]:
    """What is worth measuring: the candidates that would take the least time by that rule, the best first."""
    rates = {(m, n, warps): rate for m, n, warps, _, rate in _LADDER[device.arch]}

    def cost(config: TileConfig) -> float:
        turns = ceil_div(problem.blocks(config) * config.splits, device.processors)
        steps = ceil_div(ceil_div(problem.k, config.block_k), config.splits) + config.num_stages
        rate = rates[config.block_m, config.block_n, config.num_warps]
        work = turns * steps * config.block_m * config.block_n * config.block_k / rate
        if config.splits > 1:  # float32, written and read
            work += 8 * config.splits * problem.m * problem.n * problem.count * _BYTE / device.processors
        return work

    return sorted(search_space(problem, device), key=cost)[:_SHORT]


def search_space(problem: Problem, device: Device) -> list[TileConfig]:
    """What tuning may try: the architecture's ladder as far as it fits the problem, with splits where few tiles would
    leave multiprocessors idle."""
    found = []
    for block_m, block_n, warps, stages, _ in _LADDER[device.arch]:
        if (block_m > 64 and block_m >= 2 * problem.m) or (block_n > 16 and block_n >= 2 * problem.n):
            continue
        step_bytes = _STEP_BYTES // 2 if problem.unaligned == 2 else _STEP_BYTES
        config = TileConfig(block_m, block_n, step_bytes // problem.dtype.itemsize, warps, stages)
        if not _has_registers(config, problem, device):
            continue
        config = _fitted(replace(config, descriptors=device.arch >= 90 and problem.descriptors), problem, device)
        blocks = problem.blocks(config)
        splits = 1
        while splits == 1 or (
            splits <= _MAX_SPLITS
            and blocks * splits < 4 * device.processors
            and problem.k >= splits * _MIN_STEPS * config.block_k
        ):
            found.append(replace(config, splits=splits))
            splits *= 2
    return found


def _has_registers(config: TileConfig, problem: Problem, device: Device) -> bool:
    """Whether prologues and epilogue have the registers that they need beside the accumulators."""
    grad_stats, two_prologues, other = _ROOM[device.arch, problem.dtype.itemsize]
    if problem.epilogue == "grad_stats":
        room = grad_stats
    else:
        heavy = "none" not in problem.prologues or (problem.op == "weight_grad" and "bn_backward" in problem.prologues)
        room = two_prologues if heavy else other
    if not problem.descriptors:
        room = min(room, (_ROOM_UNALIGNED if problem.unaligned == 2 else _ROOM_POINTERS)[device.arch])
    threads = 32 * config.num_warps
    loaded = [
        side * config.block_k // threads
        for side, prologue in zip((config.block_m, config.block_n), problem.prologues, strict=True)
        if prologue == "bn_backward"
    ]
    if loaded and (max(loaded) > _ROOM_BN_BACKWARD or max(loaded) + config.accumulators > _ROOM_BOTH):
        return False
    return config.accumulators <= room


def _fitted(config: TileConfig, problem: Problem, device: Device) -> TileConfig:
    """With no more stages, and no longer steps, than shared memory has room for."""
    room = device.shared_memory - _RESERVED
    while problem.shared_memory(config) > room:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        else:
            config = replace(config, block_k=config.block_k // 2)
    return config
