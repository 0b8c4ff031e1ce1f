"""`fastdcgan demo`"""

from __future__ import annotations

import argparse

from fastdcgan.benchmarks import demo
from fastdcgan.checks import printable
from fastdcgan.cli.options import INTERRUPTED, add_device, add_out
from fastdcgan.dcgan.demo import DemoSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "demo", "folder for everything it makes")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long it may take in all")
    add_device(parser)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of the data and noise")


def run(args: argparse.Namespace) -> int:
    settings = DemoSettings(args.out, args.minutes, args.device, args.seed)
    outcome = demo.run(settings)
    if outcome.reason == "interrupted":
        return INTERRUPTED
    print(printable(settings.out))
    return 0
