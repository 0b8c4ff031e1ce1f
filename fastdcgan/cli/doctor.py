"""`fastdcgan doctor`"""

from __future__ import annotations

import argparse

from fastdcgan import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass  # it has no options


def run(args: argparse.Namespace) -> int:
    report = doctor.report()
    print(report)
    return 0 if report.healthy else 1
