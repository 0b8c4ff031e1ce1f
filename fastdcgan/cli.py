"""The command line: `fastdcgan demo | train | sample | bench | doctor`, also as `python -m fastdcgan`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C. Errors are one line; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from fastdcgan import __version__

INTERRUPTED = 130


class UsageError(Exception):
    """The command was given something that it can't take; exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(argv).parse_args(argv)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            expected = isinstance(error, UsageError | ValueError | RuntimeError | OSError)
            print(f"error: {error if expected else f'{type(error).__name__}: {error}'}", file=sys.stderr)
            if not expected:
                print("Run it with --debug to see where.", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdcgan", description="Fast training of convolutional GANs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=_HelpFormatter)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(command=command)
        return sub

    _add_demo(add("demo", _demo, "Train on MNIST for about three minutes, and compare with plain PyTorch."))
    _add_train(add("train", _train, "Train a DCGAN on a folder of images, or go on with a run."))
    _add_sample(add("sample", _sample, "Make images with a trained generator."))
    bench = add("bench", _bench, "Time blocks and the training step against PyTorch.")
    if argv[:1] == ["bench"]:  # its options live with the benchmarks, which nothing else needs
        from fastdcgan.benchmarks import cli as bench_cli

        bench_cli.add_arguments(bench)
    add("doctor", _doctor, "Show what was built, what can run here, and why the rest can't.")
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Ends every help text with the option's default, unless the text says it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        silent = default is None or default is argparse.SUPPRESS or default is False
        return text if silent or "default" in text else f"{text} [default: %(default)s]"


# --- demo ------------------------------------------------------------------------------------------------------------


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything it makes")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long it may take in all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto is a GPU where there is one")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of the data and noise")


def _demo(args: argparse.Namespace) -> int:
    from fastdcgan.dcgan import demo

    try:
        settings = demo.DemoSettings(args.out, args.minutes, args.device, args.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    outcome = demo.run(settings)
    if outcome.reason == "interrupted":
        return INTERRUPTED
    print(settings.out)
    return 0


# --- train -----------------------------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    from fastdcgan.dcgan.config import TrainConfig

    parser.add_argument("--resume", metavar="RUN", help="go on with this run's newest checkpoint, or with this file")
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        text, choices = field.metadata["help"], field.metadata.get("choices")
        # Absent from the result unless given: a resumed run keeps its own settings.
        extra: dict = {"help": text, "default": argparse.SUPPRESS}
        flag = "--" + field.name.replace("_", "-")
        if field.name == "data":
            parser.add_argument("data", nargs="?", metavar="DATA", **extra)
        elif types[field.name] in (bool, bool | None):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **extra)
        else:
            if "[default" not in text:
                extra["help"] = f"{text} [default: {field.default}]"
            extra |= {"type": types[field.name], "choices": choices, "metavar": _metavar(choices, field)}
            parser.add_argument(flag, **extra)


def _metavar(choices: Sequence | None, field: dataclasses.Field) -> str:
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    return {"out": "FOLDER", "cache": "FOLDER", "device": "DEVICE"}.get(field.name, "N")


def _train(args: argparse.Namespace) -> int:
    from fastdcgan.dcgan import distributed
    from fastdcgan.dcgan.config import TrainConfig
    from fastdcgan.dcgan.training import Trainer

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(args, f.name)}
    try:
        try:
            trainer = Trainer.resume(args.resume, **given) if args.resume else Trainer(TrainConfig(**given))
        except ValueError as error:
            raise UsageError(str(error)) from error
        outcome = trainer.run()
        if trainer.processes.main:
            if outcome.reason == "interrupted":
                print(f"Stopped at step {outcome.step}. Go on with: fastdcgan train --resume {outcome.out}")
            else:
                print(f"Done at step {outcome.step}. Samples, metrics and checkpoints are in {outcome.out}")
    finally:
        distributed.leave()
    return INTERRUPTED if outcome.reason == "interrupted" else 0


# --- sample ----------------------------------------------------------------------------------------------------------


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument("--count", type=int, default=64, help="how many images")
    parser.add_argument("--seed", type=int, default=0, help="of the noise they are made from")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="file of the grid, or folder of files")
    parser.add_argument("--separate", action="store_true", help="a file for each image instead of one grid")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto is a GPU where there is one")


def _sample(args: argparse.Namespace) -> int:
    from fastdcgan.dcgan import distributed, sampling

    if args.count < 1:
        raise UsageError(f"--count is {args.count}: expected at least 1")
    try:
        device = distributed.choose_device(args.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    samples = sampling.sample(sampling.load_generator(args.checkpoint, device), args.count, args.seed)
    sampling.save_samples(samples, args.out, grid=not args.separate)
    print(args.out)
    return 0


# --- bench and doctor ------------------------------------------------------------------------------------------------


def _bench(args: argparse.Namespace) -> int:
    from fastdcgan.benchmarks import cli as bench_cli

    return bench_cli.run(args)


def _doctor(args: argparse.Namespace) -> int:
    from fastdcgan import doctor

    report = doctor.report()
    print(report)
    return 0 if report.healthy else 1
