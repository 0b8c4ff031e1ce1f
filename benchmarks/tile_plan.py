"""What the heuristic plans for a DCGAN step on an H100: `python -m fastdcgan.benchmarks.tile_plan`.

For every contraction of the 64x64 net in bfloat16: multiply-adds, bytes, the time that they take at best, the tile, and
how much of the tensor cores' time the tile can use; for every pass over memory and every image-side contraction its
bytes; for every boundary what the rule chooses. Computed, not measured: it says where to look first once there are
measurements, and what no measurement can exceed. Written to `results/triton_plan.md`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fastdcgan.backends.boundaries import boundaries
from fastdcgan.benchmarks.compile_table import Case, cases, launches
from fastdcgan.benchmarks.results import RESULTS
from fastdcgan.benchmarks.shapes import NetShape
from fastdcgan.engine.match import FoundChain, block_of, segments
from fastdcgan.kernels import tiles

PLAN = RESULTS / "triton_plan.md"
# Measured on an H100, in bfloat16 (FLOP/s) and on a copy (bytes/s).
PEAK, BANDWIDTH = 798e12, 3.0e12
ACTIVATION_BYTES = 2
H100 = tiles.KNOWN[90]


def moved(case: Case) -> int:
    """Bytes of the operands and the result, each once."""
    x, y, w = case.block.inputs(case.batch), case.block.outputs(case.batch), case.block.weights
    forward = "conv_transpose" if case.block.transposed else "conv"
    left, _, right = case.prologue.partition(" ")
    if case.op == "weight_grad":
        large, small = (y, x) if case.block.transposed else (x, y)
        values = large * (1 + (left == "bn_backward")) + small * (1 + (right == "bn_backward")) + w
    else:
        source, result = (x, y) if case.op == forward else (y, x)
        values = source * (1 + (left == "bn_backward")) + result * (1 + (case.epilogue == "grad_stats")) + w
    return ACTIVATION_BYTES * values


def row(case: Case) -> list[str]:
    """One line of the table."""
    _, programs, arguments, config = launches(case)[0]
    flops, size = case.block.flops(case.batch), moved(case)
    math_s, bytes_s = flops / PEAK, size / BANDWIDTH
    turns = tiles.ceil_div(programs, H100.processors)
    padded = programs * config.block_m * config.block_n
    # Lost: where tiles overhang the result, multiprocessors without a tile in the last turn, filling the pipeline.
    if case.op == "weight_grad":
        reduction = arguments["groups"] * arguments["tiles_per_group"] * config.block_k / config.splits
    else:
        reduction = flops / 2 / (padded / config.splits) / config.splits
    steps = max(1.0, reduction / config.block_k)
    used = min(1.0, flops / 2 / (padded * steps * config.block_k))
    busy = used * programs / (turns * H100.processors) * steps / (steps + config.num_stages)
    return [
        f"{case.block.name} {case.op}",
        case.prologue,
        case.epilogue,
        f"{flops / 1e9:.2f}",
        f"{size / 1e6:.1f}",
        f"{max(math_s, bytes_s) * 1e6:.1f} ({'math' if math_s > bytes_s else 'bytes'})",
        f"{config.block_m}x{config.block_n}x{config.block_k}",
        str(config.splits),
        str(programs),
        f"{programs / H100.processors:.2f}",
        f"{100 * busy:.0f} %",
    ]


_COLUMNS = ("contraction", "prologue", "epilogue", "GFLOP", "MB", "floor, us", "tile", "parts", "programs", "turns")


def table(batch: int) -> Iterator[str]:
    header = [*_COLUMNS, "tensor cores at most"]
    yield "| " + " | ".join(header) + " |"
    yield "|---|---|---|" + "---:|" * (len(header) - 3)
    for case in dict.fromkeys(cases([90], ["bf16"], [batch], [64])):
        yield "| " + " | ".join(row(case)) + " |"


# --- bound by bytes ---------------------------------------------------------------------------------------------------

# Tensors of the size of a block's output that a pass reads and writes.
_PASSES = {"batch_stats": 1, "norm_act": 2, "norm_act_reduce, grad_stats": 2, "norm_act backward": 3}


def byte_bound(shape: NetShape, batch: int) -> Iterator[list[str]]:
    """(kernel, block, MB, floor in us) of the passes and the image-side contractions."""
    for block in (*shape.generator(), *shape.discriminator()):
        if shape.channels in (block.in_channels, block.out_channels):
            size = ACTIVATION_BYTES * (block.inputs(batch) + block.outputs(batch) + block.weights)
            ops = ("forward", "input gradient", "weight gradient")
            rows = {f"narrow: {op}": size for op in (ops if block.in_size > 1 else ops[::2])}
        elif block.norm:
            rows = {name: ACTIVATION_BYTES * count * block.outputs(batch) for name, count in _PASSES.items()}
        else:
            continue
        for name, moved_bytes in rows.items():
            yield [name, block.name, f"{moved_bytes / 1e6:.1f}", f"{moved_bytes / BANDWIDTH * 1e6:.1f}"]


# --- boundaries -------------------------------------------------------------------------------------------------------


def boundary_rows(shape: NetShape) -> Iterator[list[str]]:
    """(net, deferred boundaries, blocks whose dy is never stored) by the rule, in training."""
    for name, net, described in zip("GD", shape.nets(), (shape.generator(), shape.discriminator()), strict=True):
        (chain,) = segments(net.to(torch.bfloat16))
        assert isinstance(chain, FoundChain)
        plan = [block_of(found, False, "triton") for found in chain.blocks]
        weights = [found.conv.weight for found in chain.blocks]
        image = (described[0].in_size,) * 2
        chosen = boundaries(plan, weights, image, [False, *[True] * len(plan)])
        between = [f"{a.name}-{b.name}" for a, b in itertools.pairwise(described)]
        deferred = [boundary for boundary, flag in zip(between, chosen.deferred, strict=True) if flag]
        lazy = [block.name for block, flag in zip(described, chosen.lazy_grad, strict=True) if flag]
        yield [name, ", ".join(deferred) or "none", ", ".join(lazy) or "none"]


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for cells in rows:
        yield "| " + " | ".join(cells) + " |"


def write(path: Path = PLAN) -> None:
    lines = ["# The plan of the Triton contractions on an H100 (computed, not measured)", ""]
    lines += ["Written by `python -m fastdcgan.benchmarks.tile_plan`; NOTES-GPU.md says how to read it.", ""]
    shape = NetShape()
    lines += ["## Boundaries", "", *_lines(("net", "deferred", "dy never stored"), boundary_rows(shape)), ""]
    for batch in (128, 1024):
        lines += [f"## Batch {batch}", "", *table(batch), ""]
        header = ("bound by bytes", "block", "MB", "floor, us")
        lines += [*_lines(header, byte_bound(shape, batch)), ""]
    path.write_text("\n".join(lines))


if __name__ == "__main__":
    write()
    print(PLAN)
