"""The commands, a module each: `add_arguments(parser)` says what it takes, `run(args)` does it, for the exit code."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastdcgan.checks import SEED, Range

INTERRUPTED = 130


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT and --device, for what uses a trained network."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest one")
    add_device(parser)


def add_class(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """--class, one of those that the networks of a run with `train --conditional` know."""
    parser.add_argument(
        "--class",
        dest="label",
        metavar="NAME|INDEX",
        help=f"of a run that learned classes, this one, by its name or its number{otherwise}",
    )


def add_data(parser: argparse.ArgumentParser, what: str) -> None:
    """DATA, the images to work with."""
    parser.add_argument("data", metavar="DATA", nargs="?", help=f"{what} [default: what the run was trained on]")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, as `distributed.choose_device` takes it."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto is a GPU where there is one")


def add_out(parser: argparse.ArgumentParser, default: str, help: str) -> None:
    """--out, what the command makes."""
    parser.add_argument("--out", type=Path, default=Path(default), help=help)


def add_number(parser: argparse.ArgumentParser, flag: str, range: Range, **how: Any) -> None:
    """An option that takes a number, or several, of that range; `how` is what `add_argument` takes."""
    parser.add_argument(flag, type=int if range.whole else float, action=_Number, range=range, **how)


def add_seed(parser: argparse.ArgumentParser, help: str) -> None:
    """--seed, of all that is random."""
    add_number(parser, "--seed", SEED, default=0, help=help)


class _Number(argparse.Action):
    """Stores numbers. Raises ValueError for one out of range, which is one line; argparse's own errors are a page."""

    def __init__(self, range: Range, **how: Any) -> None:
        super().__init__(**how)
        self.range = range

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        for value in values if isinstance(values, list) else [values]:
            self.range.check(self.option_strings[0], value)
        setattr(namespace, self.dest, values)


def folder_to_fill(path: Path) -> None:
    """Make the folder that a command writes into, before the work begins. Raises ValueError where that fails."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no folder")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path} can't be written to")


def file_to_write(path: Path) -> None:
    """Make the folder of the file that a command writes, before the work begins. Raises ValueError if that fails."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected the name of a file")
    folder_to_fill(path.parent)
