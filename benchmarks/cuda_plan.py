"""What the heuristic plans for the CUDA contractions of a DCGAN step: `python -m fastdcgan.benchmarks.cuda_plan`.

For every contraction of the 64x64 net in bfloat16 on an H100: the tile, parts of the depth, blocks and waves of them
over its multiprocessors, the bytes that go through shared memory for each FLOP, and the fraction of the tensor cores'
rate that the tiles leave and that shared memory can feed. Computed, not measured. Written to `results/cuda_plan.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from fastdcgan.backends.cuda_boxes import ROWS, pixel_tiles
from fastdcgan.backends.cuda_tiles import H100, Choice, Problem, WarpgroupTile, blocks, choose, resident
from fastdcgan.benchmarks.results import RESULTS
from fastdcgan.benchmarks.shapes import Block, NetShape

PLAN = RESULTS / "cuda_plan.md"
BATCHES = (128, 1024)
ITEM = 2  # bytes of bfloat16
PARTS = ("forward", "input gradient", "weight gradient")
# Of a multiprocessor, each clock: NVIDIA H100 Tensor Core GPU Architecture (2022), for bfloat16; 32 banks of 4 bytes.
FLOPS, BANKS = 4096, 128
COLUMNS = (
    "contraction", "GFLOP", "tile", "parts", "blocks", "waves", "bytes per 1000 FLOP", "tiles leave",
    "shared memory feeds", "expected at most",
)  # fmt: skip


def problem_of(block: Block, part: str, batch: int) -> Problem:
    """The matrix products of one contraction, as `backends/cuda_contractions.py` has them."""
    wide, image = (block.out_size, block.in_size) if block.transposed else (block.in_size, block.out_size)
    ci, co, taps = block.in_channels, block.out_channels, block.kernel**2
    of_image, of_grid = (co, ci) if block.transposed else (ci, co)  # channels of the large and of the small tensor
    pixels = batch * image**2
    of_weight = math.ceil(of_grid / ROWS) if of_grid % 8 == 0 else 0  # boxes want whole vectors, as all but G0 has them
    if image == 1:  # taps and channels are one axis
        if part == "weight gradient":
            return Problem(of_grid, of_image * taps, batch, 1, ITEM, box_tiles=of_weight)
        up = block.transposed == (part == "forward")
        sides = (of_image * taps, of_grid) if up else (of_grid, of_image * taps)
        tiles = pixel_tiles(batch, 1, 1) if of_grid % 8 == 0 or not up else 0
        return Problem(batch, *sides, 1, ITEM, box_tiles=tiles)
    if part == "weight gradient":
        return Problem(of_grid, of_image, pixels, taps, ITEM, box_tiles=of_weight)
    if block.transposed == (part == "forward"):  # conv_transpose, a product for each phase
        phases, side = block.stride**2, math.ceil(wide / block.stride)
        tiles = pixel_tiles(batch, side, side)
        return Problem(batch * side**2, of_image, of_grid * taps // phases, phases, ITEM, box_tiles=tiles)
    return Problem(pixels, of_grid, of_image * taps, 1, ITEM, box_tiles=pixel_tiles(batch, image, image))


def shared_bytes(choice: Choice) -> float:
    """Bytes that go through shared memory for one FLOP of the main loop: written once, read by every warp that needs
    them (2 x 2 warps, or 2 x 4 of eight), or by both warpgroups."""
    tile = choice.tile
    if isinstance(tile, WarpgroupTile):  # 64 rows each: both read all columns
        return (2 * tile.m + 3 * tile.n) * ITEM / (2 * tile.m * tile.n)
    along_m, along_n = {8: (2, 4), 4: (4, 1) if tile.n == 32 else (2, 2)}[tile.warps]
    moved = tile.m * (1 + along_n) + tile.n * (1 + along_m)
    return moved * ITEM / (2 * tile.m * tile.n)


def used(problem: Problem, choice: Choice) -> float:
    """Of the tensor cores' time: what tiles that overhang, an incomplete last wave and filling the pipeline leave."""
    tile, count = choice.tile, blocks(problem, choice.tile) * choice.splits
    steps = math.ceil(math.ceil(problem.k / tile.k) / choice.splits)
    whole = count * steps * tile.m * tile.n * tile.k
    inside = problem.m * problem.n * problem.k * problem.count / whole
    turns = math.ceil(count / H100.processors)  # a multiprocessor's blocks share its tensor cores
    return inside * count / (turns * H100.processors) * steps / (steps + tile.stages - 1)


def row(block: Block, part: str, batch: int) -> list[str]:
    problem = problem_of(block, part, batch)
    choice = choose(problem, H100)
    count = blocks(problem, choice.tile) * choice.splits
    waves = count / (H100.processors * resident(problem, choice.tile, H100))
    flops = 2 * problem.m * problem.n * problem.k * problem.count
    tile = f"{choice.tile.m}x{choice.tile.n}x{choice.tile.k}"
    tile += " wgmma" if isinstance(choice.tile, WarpgroupTile) else ""
    cells = [f"{block.name} {part}", f"{flops / 1e9:.2f}", tile, str(choice.splits), str(count), f"{waves:.2f}"]
    left, fed = used(problem, choice), min(1.0, BANKS / (shared_bytes(choice) * FLOPS))
    return [*cells, f"{1000 * shared_bytes(choice):.1f}", *(f"{100 * x:.0f} %" for x in (left, fed, min(left, fed)))]


def table(batch: int) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---|" + "---:|" * (len(COLUMNS) - 1)
    shape = NetShape()
    for block in (*shape.generator(), *shape.discriminator()):
        if shape.channels in (block.in_channels, block.out_channels) or block.out_channels == 1:
            continue  # kernels of their own (csrc/cuda/narrow*.cuh), which are bound by bytes
        for part in PARTS:
            yield "| " + " | ".join(row(block, part, batch)) + " |"


def write(path: Path = PLAN) -> None:
    lines = ["# The plan of the CUDA contractions on an H100 (computed, not measured)", ""]
    lines += ["Written by `python -m fastdcgan.benchmarks.cuda_plan`; NOTES-GPU.md says how to read it.", ""]
    for batch in BATCHES:
        lines += [f"## Batch {batch}", "", *table(batch), ""]
    path.write_text("\n".join(lines))


if __name__ == "__main__":
    write()
    print(PLAN)
