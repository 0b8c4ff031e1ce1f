"""`fastdcgan demo`"""

from __future__ import annotations

import argparse

from fastdcgan.benchmarks import demo
from fastdcgan.checks import Range, printable
from fastdcgan.cli.options import INTERRUPTED, add_device, add_number, add_out, add_seed
from fastdcgan.dcgan.demo import DemoSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "demo", "folder for everything it makes")
    add_number(parser, "--minutes", Range(0.5, 1e6, whole=False), default=3.0, help="how long it may take in all")
    add_device(parser)
    add_seed(parser, "of weights, order of the data and noise")


def run(args: argparse.Namespace) -> int:
    settings = DemoSettings(args.out, args.minutes, args.device, args.seed)
    outcome = demo.run(settings)
    if outcome.reason == "interrupted":
        return INTERRUPTED
    print(printable(settings.out))
    return 0
