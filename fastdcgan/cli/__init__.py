"""The command line: `fastdcgan COMMAND`, also as `python -m fastdcgan`. `COMMANDS` lists them.

Exit codes: 0 done; 1 failed; 2 was given what it can't take (options, a checkpoint, a folder, a place to write to that
is full or read-only), or lacks a package; 130 stopped by Ctrl-C, another signal, or whoever read its output.
Errors are one line; `--debug` shows the traceback. Of several processes on a machine the first one says what is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fastdcgan.checks import printable
from fastdcgan.cli import packages
from fastdcgan.cli.options import INTERRUPTED
from fastdcgan.version import __version__

# Command -> (module with its options and itself, what it does)
COMMANDS = {
    "demo": ("fastdcgan.cli.demo", "Train on MNIST for about three minutes, and compare with plain PyTorch."),
    "train": ("fastdcgan.cli.train", "Train a DCGAN on a folder of images, or go on with a run."),
    "sample": ("fastdcgan.cli.sample", "Make images with a trained generator."),
    "interpolate": ("fastdcgan.cli.interpolate", "Walk between images of a generator, or calculate with them."),
    "inpaint": ("fastdcgan.cli.inpaint", "Fill in what is missing of images: semantic inpainting."),
    "features": ("fastdcgan.cli.features", "Features of a trained network, classifiers on them, a comparison."),
    "evaluate": ("fastdcgan.cli.evaluate", "Fréchet distance, precision and recall of a run's checkpoints."),
    "report": ("fastdcgan.cli.report", "Write a page about a run: curves, samples over the steps, settings."),
    "style": ("fastdcgan.cli.style", "Show one picture in the manner of another."),
    "bench": ("fastdcgan.cli.bench", "Time blocks and the training step against PyTorch."),
    "doctor": ("fastdcgan.cli.doctor", "Show what was built, what can run here, and why the rest can't."),
}
_GRACE = 20.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal, a file name that is no text
    try:
        args = _parser(argv).parse_args(argv)
        code = args.command(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has what it wants; what is left in the buffer must go somewhere
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return INTERRUPTED
    except Exception as error:
        lacking = packages.what_to_install(error, argv[0])
        usage = lacking is not None or _is_usage(error)
        if usage and int(os.environ.get("LOCAL_RANK", "0")) > 0:
            # The first process says the same. torchrun ends all of them when one ends, so that one comes first.
            time.sleep(_GRACE)
            return 2
        if "--debug" in argv:  # there are no `args` where importing the command failed
            traceback.print_exc()
        elif lacking is not None:
            print(f"error: {printable(lacking)}", file=sys.stderr)
        else:
            expected = isinstance(error, ValueError | RuntimeError | OSError)
            text = error if expected else f"{type(error).__name__}: {error}"
            print(f"error: {printable(str(text).replace(chr(10), ' '))}", file=sys.stderr)
            if not expected:
                print("Run it with --debug to see where.", file=sys.stderr)
        return 2 if usage else 1


def _is_usage(error: Exception) -> bool:
    if isinstance(error, (ValueError, OSError)):
        return True
    # An error of the DCGAN's can only come from where it was imported.
    checkpoint = sys.modules.get("fastdcgan.dcgan.checkpoint")
    return checkpoint is not None and isinstance(error, checkpoint.CheckpointError)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _ArgumentParser(prog="fastdcgan", description="Fast training of convolutional GANs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=_HelpFormatter)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if argv[:1] == [name]:  # only the module of the command that runs is imported
            if name != "doctor":
                packages.require("dcgan")
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(command=implementation.run)
    return parser


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _HelpFormatter(argparse.HelpFormatter):
    """Ends every help text with the option's default, unless the text says it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        silent = default is None or default is argparse.SUPPRESS or default is False
        return text if silent or "default" in text else f"{text} [default: %(default)s]"
