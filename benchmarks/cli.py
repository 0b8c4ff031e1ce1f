"""`fastdcgan bench`: tables of training steps, generation and blocks, fused versus PyTorch, on the device at hand."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdcgan.benchmarks import plots, profiling, suites, tables
from fastdcgan.benchmarks.end_to_end import run_end_to_end
from fastdcgan.benchmarks.harness import Timing
from fastdcgan.benchmarks.peers import DTYPES, PEERS, default_peers, eval_peers
from fastdcgan.benchmarks.pix2pix import Pix2PixShape
from fastdcgan.benchmarks.results import Case, Results, environment
from fastdcgan.benchmarks.runners import StepRunner
from fastdcgan.benchmarks.shapes import IMAGE_SIZES, Block, NetShape, inputs
from fastdcgan.dispatch import autotune

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Plan:
    """How much a run does."""

    shape: NetShape
    batch: int
    block_timing: Timing
    step_timing: Timing
    all_blocks: bool = True


SUITES = ("step", "folder", "pix2pix", "generate", "blocks")
GENERATED = (1, 16, 64)  # batches of the generator alone

_CPU = Plan(NetShape(), 32, Timing(15, 0.02, 2.0, 5), Timing(15, 0.1, 45.0, 5))
_CUDA = Plan(NetShape(), 128, Timing(30, 0.02, 2.0, 10), Timing(30, 0.1, 30.0, 10))
_QUICK = Plan(NetShape(32, ngf=32, ndf=32), 16, Timing(5, 0.01, 1.0), Timing(5, 0.02, 4.0), all_blocks=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastdcgan bench`."""
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all", help="what to time (default: all)")
    parser.add_argument("--image-size", type=int, choices=IMAGE_SIZES, help="of the DCGAN (default: 64; --quick: 32)")
    parser.add_argument("--batch", type=int, nargs="+", help="(default: 32 on a CPU, 128 on a GPU; --quick: 16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16"), help="bf16 is autocast (default: fp32 on a CPU, bf16 on a GPU)"
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds a case (default: what fits into its time)")
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
    from rich.table import Table
    from rich.text import Text

    device = _device(args.device)
    batches = args.batch or [_plan(args, device).batch]
    if args.tune and device.type != "cuda":
        raise ValueError("--tune searches among GPU kernels, and this runs on a CPU: leave it out")
    for name, values in (("--batch", batches), ("--rounds", [args.rounds] if args.rounds is not None else [])):
        if min(values, default=1) < 1:
            raise ValueError(f"{name} has to be at least 1, not {min(values)}")
    facts = environment(device)
    if facts["load_average"] > facts["cores"]:
        busy = f"load {facts['load_average']:.1f} on {facts['cores']} cores"
        print(f"Other processes keep this machine busy ({busy}): times will be noisy.", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.trace is not None:
        for table in _traces(args, device, batches[0]):
            console.print(table)
        console.print(f"trace: {args.trace}")
        return 0
    with console.status("starting") as status:

        def show(case: str, text: str) -> None:
            status.update(f"{case}: {text}")

        with autotune.tuning() if args.tune else contextlib.nullcontext():
            cases = list(_cases(args, device, batches, show))
    results = Results("bench", facts, cases)

    console.print(tables.caption(results))
    for suite, cells in tables.CELLS.items():
        header, lines = cells(results)
        if not lines:
            continue
        table = Table(title=tables.TITLES[suite])
        for i, title in enumerate(header):
            table.add_column(title, justify="left" if i < 4 else "right")
        for line in lines:
            table.add_row(*map(Text, line))  # an error in a cell is no markup
        console.print(table)
    console.print(tables.NOTE, highlight=False)
    if args.json is not None:
        results.write(args.json)
        console.print(f"results: {args.json}")
        if any(case.suite in ("step", "generate") for case in cases):
            plots.plot_steps(results, {}, args.json.with_suffix(".png"))
            console.print(f"plot: {args.json.with_suffix('.png')}")
    for case, row in results.bad:
        where = f"{case.name} {case.part}, batch {case.batch}, {row.label} in {row.dtype}"
        console.print(Text(f"{row.status}: {where}: {row.detail}", style="red"))
    return int(bool(results.bad))


def _traces(args: argparse.Namespace, device: torch.device, batch: int) -> Iterator[Table]:
    """A table of the primitives of our step, run without a graph, against the ceilings of this machine."""
    from rich.table import Table

    shape = _shape(args, _plan(args, device))
    dtype = DTYPES[(args.dtype or ["bf16" if device.type == "cuda" else "fp32"])[0]]
    size, copied = (8192, 2**31) if device.type == "cuda" else (1024, 2**26)
    rates = profiling.ceilings(device, dtype, size, copied, 0.2)
    torch.manual_seed(0)
    runner = StepRunner(PEERS["train"], shape.nets(), [inputs(shape, batch)], device, dtype, graph=False)
    with suites.device_settings(device):
        shares = profiling.trace(runner, device, args.trace, rates)
    table = Table(
        title=f"One step, {shape.image_size}x{shape.image_size}, batch {batch}, against {rates.flops_per_s / 1e12:.3g} "
        f"TFLOP/s and {rates.bytes_per_s / 1e9:.0f} GB/s"
    )
    for column in ("primitive", "calls", "ms", "floor, ms", "of the floor"):
        table.add_column(column, justify="left" if column == "primitive" else "right")
    for share in shares:
        of_floor = f"{100 * share.floor_ms / share.ms:.0f} %" if share.floor_ms and share.ms else "-"
        table.add_row(share.what, str(share.calls), f"{share.ms:.3f}", f"{share.floor_ms:.3f}", of_floor)
    yield table


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; expected cpu")
    return torch.device(name)


def _plan(args: argparse.Namespace, device: torch.device) -> Plan:
    return _QUICK if args.quick else _CUDA if device.type == "cuda" else _CPU


def _timing(timing: Timing, args: argparse.Namespace) -> Timing:
    return timing if args.rounds is None else Timing(args.rounds, timing.seconds_per_round)


def _shape(args: argparse.Namespace, plan: Plan) -> NetShape:
    size = args.image_size or plan.shape.image_size
    return NetShape(size, ngf=plan.shape.ngf, ndf=plan.shape.ndf)


def _cases(
    args: argparse.Namespace, device: torch.device, batches: list[int], show: Callable[[str, str], None]
) -> Iterator[Case]:
    plan = _plan(args, device)
    shape = _shape(args, plan)
    wanted = SUITES if args.suite == "all" else (args.suite,)
    timing = _timing(plan.step_timing, args)
    for dtype in args.dtype or (["bf16"] if device.type == "cuda" else ["fp32"]):
        names = args.peers or default_peers(device, dtype)
        for batch in batches:
            if "step" in wanted:
                say = functools.partial(show, f"step {shape.image_size}x{shape.image_size}, batch {batch}, {dtype}")
                yield suites.run_step(shape, batch, names, device, dtype, timing, say)
            if "folder" in wanted:
                show(f"training from a folder, batch {batch}, {dtype}", "making files, decoding them, timing")
                yield run_end_to_end(shape, batch, device, dtype, timing)
            if "pix2pix" in wanted:
                images = Pix2PixShape(shape.image_size, width=shape.ngf)
                say = functools.partial(show, f"pix2pix, batch {batch}, {dtype}")
                able = _without_whole(names, "pix2pix")
                yield suites.run_pix2pix(images, batch, able, device, dtype, timing, say)
            if "blocks" in wanted:
                able = _block_peers(args, names)
                for block in _blocks(shape, plan):
                    say = functools.partial(show, f"block {block.name}, batch {batch}, {dtype}")
                    block_timing = _timing(plan.block_timing, args)
                    yield from suites.run_block(block, batch, able, device, dtype, block_timing, say)
        for batch in args.batch or GENERATED if "generate" in wanted else ():
            say = functools.partial(show, f"generation, batch {batch}, {dtype}")
            peers = _without_whole(args.peers or eval_peers(device), "generate")
            yield suites.run_generate(shape, batch, peers, device, dtype, _timing(plan.block_timing, args), say)


def _without_whole(names: list[str], suite: str) -> list[str]:
    """The peers that `suite` can run: there is no GANStep in it."""
    able = [name for name in names if not PEERS[name].whole]
    if not able:
        raise ValueError(f"the suite {suite} has no DCGAN's step: expected --peers of more than 'train'")
    return able


def _block_peers(args: argparse.Namespace, names: list[str]) -> list[str]:
    names = _without_whole(names, "blocks")
    if args.quick and not args.peers:  # compiling is most of a quick run's time: the step has it
        names = [name for name in names if PEERS[name].compile_mode is None]
    return names


def _blocks(shape: NetShape, plan: Plan) -> list[Block]:
    generator, discriminator = shape.generator(), shape.discriminator()
    if plan.all_blocks:
        return [*generator, *discriminator]
    return [generator[1], generator[-1], *discriminator[:2]]
