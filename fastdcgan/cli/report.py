"""`fastdcgan report`"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdcgan.cli.options import add_data, add_device, file_to_write
from fastdcgan.dcgan import distributed, report
from fastdcgan.dcgan.console import wrote
from fastdcgan.dcgan.files import check_suffix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    add_data(parser, "the images whose nearest to some samples are shown")
    parser.add_argument("--out", type=Path, help="the page (.html) [default: report.html in the run's folder]")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    if args.out is not None:
        check_suffix(args.out, ".html", name="--out")
        file_to_write(args.out)
    wrote(report.write_report(args.run, args.out, args.data, distributed.choose_device(args.device)))
    return 0
