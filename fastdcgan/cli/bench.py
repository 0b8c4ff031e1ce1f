"""`fastdcgan bench`: tables of training steps, generation, blocks and host time, fused versus PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdcgan.benchmarks import bench, plots, tables
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.results import Results, environment
from fastdcgan.benchmarks.shapes import IMAGE_SIZES
from fastdcgan.checks import Range
from fastdcgan.cli.options import add_number
from fastdcgan.dispatch import autotune

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=(*bench.SUITES, "all"), default="all", help="what to time")
    parser.add_argument("--image-size", type=int, choices=IMAGE_SIZES, help="of the DCGAN (default: 64; --quick: 32)")
    add_number(parser, "--batch", Range(1), nargs="+", help="(default: 32 on a CPU, 128 on a GPU; --quick: 16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16"), help="bf16 is autocast (default: fp32 on a CPU, bf16 on a GPU)"
    )
    add_number(parser, "--rounds", Range(1), help="interleaved rounds a case (default: what fits into its time)")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"of: {', '.join(PEERS)}")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="profile our step instead: a Chrome trace, and each kernel's floor"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write everything measured to FILE, and a plot beside it"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="on a GPU: first search for the best tiles and boundaries (minutes), and keep them",
    )
    parser.add_argument("--quick", action="store_true", help="a small net, few blocks, few rounds")


def run(args: argparse.Namespace) -> int:
    """Run it. 0, or 1 if a peer was wrong or ours failed. Raises ValueError for arguments that make no sense here."""
    from rich.console import Console

    request = bench.Request(
        _device(args.device),
        bench.SUITES if args.suite == "all" else (args.suite,),
        args.image_size,
        args.batch,
        args.dtype,
        args.peers,
        args.rounds,
        args.quick,
    )
    if args.tune and request.device.type != "cuda":
        raise ValueError("--tune searches among GPU kernels, and this runs on a CPU: leave it out")
    facts = environment(request.device)
    if facts["load_average"] > facts["cores"]:
        busy = f"load {facts['load_average']:.1f} on {facts['cores']} cores"
        print(f"Other processes keep this machine busy ({busy}): times will be noisy.", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.trace is not None:
        _print_trace(console, request, args.trace)
        return 0
    with console.status("starting") as status:

        def show(case: str, text: str) -> None:
            status.update(f"{case}: {text}")

        with autotune.at_once(), autotune.tuning() if args.tune else contextlib.nullcontext():
            cases = list(bench.cases(request, show))
    results = Results("bench", facts, cases)

    console.print(tables.caption(results))
    for suite, cells in tables.CELLS.items():
        header, lines = cells(results)
        if lines:
            _print_table(console, tables.TITLES[suite], header, lines, names=4)
    console.print(tables.NOTE, highlight=False)
    if args.json is not None:
        results.write(args.json)
        console.print(f"results: {args.json}")
        if any(case.suite in ("step", "generate") for case in cases):
            plots.plot_steps(results, {}, args.json.with_suffix(".png"))
            console.print(f"plot: {args.json.with_suffix('.png')}")
    for case, row in results.bad:
        where = f"{case.name} {case.part}, batch {case.batch}, {row.label} in {row.dtype}"
        console.print(f"{row.status}: {where}: {row.detail}", style="red", markup=False, highlight=False)
    return int(bool(results.bad))


def _print_trace(console: Console, request: bench.Request, path: Path) -> None:
    title, shares = bench.trace(request, path)
    lines = []
    for share in shares:
        of_floor = f"{100 * share.floor_ms / share.ms:.0f} %" if share.floor_ms and share.ms else "-"
        lines.append((share.what, str(share.calls), f"{share.ms:.3f}", f"{share.floor_ms:.3f}", of_floor))
    _print_table(console, title, ("primitive", "calls", "ms", "floor, ms", "of the floor"), lines, names=1)
    console.print(f"trace: {path}")


def _print_table(
    console: Console, title: str, header: Sequence[str], lines: Iterable[Sequence[str]], names: int
) -> None:
    """A table whose first `names` columns are aligned to the left."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i < names else "right")
    for line in lines:
        table.add_row(*map(Text, line))  # an error in a cell is no markup
    console.print(table)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; expected cpu")
    return torch.device(name)
