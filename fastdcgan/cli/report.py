"""`fastdcgan report`"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastdcgan.benchmarks import demo
from fastdcgan.checks import Range
from fastdcgan.cli.options import add_data, add_device, add_number, file_to_write
from fastdcgan.dcgan import distributed, report, trained
from fastdcgan.dcgan.console import wrote
from fastdcgan.dcgan.files import check_suffix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    add_data(parser, "the images whose nearest to some samples are shown")
    add_number(
        parser,
        "--speed",
        Range(1, 3600, whole=False),
        metavar="SECONDS",
        help="measure for so long how fast a step of the run's shape is here, fused and in plain PyTorch",
    )
    parser.add_argument("--out", type=Path, help="the page (.html) [default: report.html in the run's folder]")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    if args.out is not None:
        check_suffix(args.out, ".html", name="--out")
        file_to_write(args.out)
    device = distributed.choose_device(args.device)
    speed = "" if args.speed is None else _speed(args.run, device, args.speed)
    wrote(report.write_report(args.run, args.out, args.data, device, speed))
    return 0


def _speed(run: str, device: torch.device, seconds: float) -> str:
    saved = trained.read(run, "discriminator")
    config = saved.config
    (timed,) = demo.compare(config, [config.precision], device, seconds, len(saved.classes))
    plain, fused, times = 1e3 * timed.vanilla.median, 1e3 * timed.fused.median, timed.speedup
    return (
        f"On this machine ({demo.describe(device)}) a step takes {fused:.1f} ms fused and {plain:.1f} ms in plain "
        f"PyTorch: {times.median:.2f} times as fast (quartiles {times.q1:.2f} and {times.q3:.2f}), {config.precision}."
    )
