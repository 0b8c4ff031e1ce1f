"""What the heuristic plans for a DCGAN step on an H100: `python -m fastdcgan.benchmarks.tile_plan`.

For every contraction of the 64x64 net in bfloat16: multiply-adds, bytes, the time that they take at best, the tile, and
how much of the tensor cores' time the tile can use. Computed, not measured: it says where to look first once there are
measurements, and what no measurement can exceed. Written to `results/triton_plan.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastdcgan.benchmarks.compile_table import Case, cases, launches
from fastdcgan.benchmarks.results import RESULTS
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


def write(path: Path = PLAN) -> None:
    lines = ["# The plan of the Triton contractions on an H100 (computed, not measured)", ""]
    lines += ["Written by `python -m fastdcgan.benchmarks.tile_plan`; NOTES-triton.md says how to read it.", ""]
    for batch in (128, 1024):
        lines += [f"## Batch {batch}", "", *table(batch), ""]
    path.write_text("\n".join(lines))


if __name__ == "__main__":
    write()
    print(PLAN)
