"""What `gpu_check.py` runs in processes of their own, so that a limit can end any of it.

Each command writes a results file or prints, and exits with 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdcgan import backends, doctor, functional
from fastdcgan.backends import cuda_tiles
from fastdcgan.backends.base import Backend
from fastdcgan.benchmarks import (
    bandwidth,
    harness,
    kernel_check,
    peers,
    plots,
    profiling,
    results,
    steps,
    suites,
    tables,
)
from fastdcgan.benchmarks.contractions import PARTS, call_of, run_layer, tensors
from fastdcgan.benchmarks.floors import step_flops
from fastdcgan.benchmarks.results import Case, Results
from fastdcgan.benchmarks.runners import StepRunner
from fastdcgan.benchmarks.shapes import Block, NetShape, inputs
from fastdcgan.dispatch import router
from fastdcgan.fuse import fuse

SHAPE = NetShape()
DRY_SHAPE = NetShape(16, ngf=8, ndf=8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_worker", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, few rounds")
    commands = parser.add_subparsers(required=True)

    def command(run: Callable[[argparse.Namespace, torch.device], int], *given: str) -> None:
        found = commands.add_parser(run.__name__.strip("_"))
        found.set_defaults(run=run)
        for name in given:
            found.add_argument(name, **_ARGUMENTS[name])

    timed = ("file", "--batch", "--seconds")
    for run in (_doctor, _ceilings, _bandwidth):
        command(run, "file")
    for run in (_step, _blocks):
        command(run, *timed, "--case")
    command(_contractions, *timed)
    command(_kernels, "--backend", "--tiles", "--early", "--share")
    command(_compile)
    command(_smallest)
    command(_report, "file", "plot")
    args = parser.parse_args(arguments)
    return args.run(args, torch.device(args.device))


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "file": {"type": Path},
    "plot": {"type": Path},
    "--batch": {"type": int, "required": True},
    "--seconds": {"type": float, "required": True, "help": "to time a case for"},
    "--case": {"nargs": "+", "required": True, "help": "a dtype, then peers"},
    "--backend": {"required": True},
    "--tiles": {"type": int, "nargs": "+", "help": "numbers of tiles (default: the rule's choice)"},
    "--early": {"choices": ("on", "off"), "default": "on", "help": "early launch"},
    "--share": {"type": int, "nargs": 2, "default": (0, 1), "metavar": ("I", "N"), "help": "each N-th, from I on"},
}


def _empty(args: argparse.Namespace, device: torch.device) -> Results:
    with suites.device_settings(device):
        return Results("gpu-check", results.environment(device), [], dry=args.dry)


def _doctor(args: argparse.Namespace, device: torch.device) -> int:
    """What `fastdcgan doctor` says, and the environment of the results. Fails without the library of the device."""
    print(doctor.report())
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU")
        return 1
    found = _empty(args, device)
    found.write(args.file)
    print(tables.caption(found))
    missing = backends.missing(device.type)
    print(missing or f"the backend {device.type!r} is here")
    return int(missing is not None)


# --- kernels by themselves -------------------------------------------------------------------------------------------


def _kernels(args: argparse.Namespace, device: torch.device) -> int:
    """Contractions with every prologue and epilogue against float64, by every algorithm of a backend or on tiles."""
    os.environ["FASTDCGAN_EARLY_LAUNCH"] = "1" if args.early == "on" else "0"  # which the library reads at its first
    if args.tiles and device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        args.tiles = [number for number in args.tiles if number not in cuda_tiles.OF_SM90]
        if not args.tiles:
            _say("this tile is for GPUs of compute capability 9.0")
            return 0
    checked = kernel_check.check(backends.get(args.backend), device, args.tiles, tuple(args.share), args.dry, _say)
    _say(f"{checked.count} checked, {len(checked.wrong)} wrong; {'; '.join(checked.wrong[:3])}")
    return int(bool(checked.wrong) or not checked.count)


def _compile(args: argparse.Namespace, device: torch.device) -> int:
    """Compile the Triton kernels of the timings side by side, into Triton's cache."""
    name = "triton" if device.type == "cuda" else "cpu"
    shape, batches = (DRY_SHAPE, (2,)) if args.dry else (SHAPE, (128, 32, 1024))
    own = backends.get(name)
    with backends.backend(name), router.compiling_ahead(name) as compiles:
        for batch, peer in itertools.product(batches, ("fused", "train")):
            data = [inputs(shape, batch)]
            StepRunner(peers.PEERS[peer], shape.nets(), data, device, torch.bfloat16, graph=False)()
        for layer, part in itertools.product(_wide_layers(shape), PARTS):
            call = call_of(layer, part, *tensors(layer, batches[0], device, "bf16"))
            for algorithm in own.algorithms(call.op):
                if algorithm.why_not(call) is None:
                    algorithm.run(call, None)
        _pass_over(own, device)
    _say("compiled" if compiles else f"the backend {name!r} compiles nothing")
    return 0


# --- ceilings --------------------------------------------------------------------------------------------------------


def _ceilings(args: argparse.Namespace, device: torch.device) -> int:
    """A large bfloat16 matrix product on random data, and a copy that counts bytes read and written."""
    size, copied = (256, 2**20) if args.dry else (8192, 2**31)
    rates = profiling.ceilings(device, torch.bfloat16, size, copied, 0.01 if args.dry else 0.2)
    flops_per_s, bytes_per_s = rates.flops_per_s, rates.bytes_per_s
    found = _empty(args, device)
    found.extra["ceilings"] = {"bf16_flops_per_s": flops_per_s, "copy_bytes_per_s": bytes_per_s}
    found.write(args.file)
    print(f"bf16 {size}^3 matrix product: {flops_per_s / 1e12:.3g} TFLOP/s; copy: {bytes_per_s / 1e12:.3g} TB/s")
    return 0


def _own_backends(device: torch.device) -> list[str]:
    """Those that have passes of their own for the device."""
    reasons = backends.reasons(device.type, torch.bfloat16)
    return [name for name, why in reasons.items() if why is None and name != "reference"]


def _bandwidth(args: argparse.Namespace, device: torch.device) -> int:
    """The passes and image-side layers of every backend of our own, and Adam, as fractions of a copy's speed."""
    found = _empty(args, device)
    entries: list[dict] = []
    for name in _own_backends(device):
        for batch in (2,) if args.dry else (128, 1024):
            entries += bandwidth.as_entries(bandwidth.measure(name, batch, device, torch.bfloat16, args.dry))
            work = bandwidth.image_side(backends.get(name), batch, device, torch.bfloat16, args.dry)
            if name == device.type:  # which brings the operators of `dispatch/training_ops.py`
                work += bandwidth.training(batch, device, args.dry)
            entries += bandwidth.as_entries(bandwidth.measure_work(name, work, device, args.dry))
    found.extra["bandwidth"] = entries
    found.write(args.file)
    _say(bandwidth.markdown(entries))
    return 0


# --- timings ---------------------------------------------------------------------------------------------------------


def _timing(args: argparse.Namespace) -> harness.Timing:
    if args.dry:
        return harness.Timing(3, 0.001, args.seconds)
    return harness.Timing(50, 0.05, args.seconds, least_rounds=5)


def _say(text: str) -> None:
    print(text, flush=True)


def _step(args: argparse.Namespace, device: torch.device) -> int:
    found = _empty(args, device)
    shape = DRY_SHAPE if args.dry else SHAPE
    dtype, *names = args.case
    contest = suites.Contest(names, device, dtype, _say)
    case = suites.run_step(contest, shape, args.batch, _timing(args))
    if backends.requested() != "auto":
        case.name += f" on {backends.requested()}"
    _add(found, [case], args.file)
    contest.profile(case)  # which may fail in ways of its own: what was measured is written
    found.write(args.file)
    return int(bool(found.bad))


def _blocks(args: argparse.Namespace, device: torch.device) -> int:
    found = _empty(args, device)
    shape = DRY_SHAPE if args.dry else SHAPE
    blocks = shape.generator() + shape.discriminator()
    dtype, *names = args.case
    for block in blocks[1:3] if args.dry else blocks:
        contest = suites.Contest(names, device, dtype)
        _add(found, suites.run_block(contest, block, args.batch, _timing(args)), args.file)
    return int(bool(found.bad))


def _contractions(args: argparse.Namespace, device: torch.device) -> int:
    """The layers without an image side, whose arithmetic counts."""
    found = _empty(args, device)
    shape = DRY_SHAPE if args.dry else SHAPE
    for block in _wide_layers(shape):
        _add(found, run_layer(block, args.batch, device, "bf16", _timing(args)), args.file)
    return int(bool(found.bad))


def _wide_layers(shape: NetShape) -> list[Block]:
    blocks = (*shape.generator(), *shape.discriminator())
    return [block for block in blocks if shape.channels not in (block.in_channels, block.out_channels)]


def _add(found: Results, cases: Sequence[Case], file: Path) -> None:
    """Written after every case: a limit may end the process at any time."""
    found.cases += cases
    found.write(file)
    for case in cases:
        for row in case.rows:
            time = f"{tables.format_ms(row.ms)} ms" if row.ms else tables.reason(row)
            _say(f"{case.name} {case.part} batch {case.batch} {case.dtype} {row.peer}: {time}")


# --- the smallest shapes, for a sanitizer ----------------------------------------------------------------------------


def _pass_over(on: Backend, device: torch.device) -> None:
    """Its passes over ragged sizes."""
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), ((2, 5, 3, 3), (2, 24, 2, 6))):
        for layout in (torch.contiguous_format, torch.channels_last):
            y = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
            for run, _ in bandwidth.passes(on, y, torch.ones_like(y)).values():
                run()


def _smallest(args: argparse.Namespace, device: torch.device) -> int:
    """Two training steps on the library of the device in each dtype, its passes over ragged sizes, its image-side
    layers, Adam, the loss and images; no vanilla kernels timed."""
    torch.manual_seed(0)
    shape = DRY_SHAPE if args.dry else NetShape(16)  # 64 channels and more
    real, noise = (tensor.to(device) for tensor in inputs(shape, 2))
    own = backends.get(device.type)
    _pass_over(own, device)
    for dtype in (torch.float32, torch.bfloat16):
        for work in bandwidth.image_side(own, 2, device, dtype, dry=True):
            work.run()
    for work in bandwidth.training(2, device, dry=True):
        work.run()
    functional.bce_with_logits(torch.randn(6, device=device), (0.9, 0.0))
    for autocast in (None, torch.bfloat16):
        generator, discriminator = (fuse(net.to(device)) for net in shape.nets())
        opt_g, opt_d = steps.adam(generator, device), steps.adam(discriminator, device)
        with backends.backend(own.name):
            losses: tuple[Tensor, ...] = ()
            for _ in range(2):
                losses = steps.gan_step(generator, discriminator, opt_g, opt_d, real, noise, autocast)
        _say(f"autocast {autocast}: losses {[loss.item() for loss in losses]}")
        if not all(map(torch.isfinite, losses)):
            return 1
    return 0


# --- report ----------------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace, device: torch.device) -> int:
    found = Results.read(args.file)
    print(tables.caption(found))
    for suite, title in tables.TITLES.items():
        print(f"\n{title}\n\n{tables.markdown(found, suite) or tables.NOT_MEASURED}", flush=True)
    if found.extra.get("bandwidth"):
        print(f"\nPasses over memory, as a fraction of a copy\n\n{bandwidth.markdown(found.extra['bandwidth'])}\n")
    ceilings = found.extra.get("ceilings")
    limits: dict[int, dict[str, float]] = {}
    if ceilings is not None:
        rates = ceilings["bf16_flops_per_s"], ceilings["copy_bytes_per_s"]
        shape = DRY_SHAPE if args.dry else SHAPE
        for batch in sorted({case.batch for case in found.cases if case.suite == "step"}):
            limits[batch] = suites.step_floors(shape, batch, *rates)
            values = ", ".join(f"{level} {ms:.3f} ms" for level, ms in limits[batch].items())
            print(f"floors at batch {batch}, {step_flops(shape, batch) / 1e9:.0f} GFLOP: {values}")
        found.extra["floors_ms"] = {str(batch): values for batch, values in limits.items()}
        found.write(args.file)
    if any(case.suite == "step" for case in found.cases):
        plots.plot_steps(found, limits, args.plot)
        print(f"plot: {args.plot.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
