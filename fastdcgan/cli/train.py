"""`fastdcgan train`"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence

from fastdcgan.checks import printable
from fastdcgan.cli.options import INTERRUPTED
from fastdcgan.dcgan import distributed
from fastdcgan.dcgan.config import PRESETS, TrainConfig
from fastdcgan.dcgan.training import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        const="",
        help="go on with this run's newest checkpoint, or with this file; without RUN with the run in --out",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="settings that go together, and that options given beside it override: paper, those of Radford et al. "
        "(2015) and of their code; emoji64, to begin with on emoji",
    )
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


def run(args: argparse.Namespace) -> int:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(args, f.name)}
    place = given.get("out", "") if args.resume == "" else args.resume
    if place == "":
        raise ValueError("--resume names no run: expected --resume RUN, or --out RUN --resume")
    if args.preset and place is not None:
        raise ValueError("--preset is of a new run: a resumed one keeps its settings, but for options given one by one")
    given = {**PRESETS.get(args.preset, {}), **given}
    try:
        trainer = Trainer(TrainConfig(**given)) if place is None else Trainer.resume(place, **given)
        outcome = trainer.run()
        if trainer.processes.main:
            if outcome.reason == "interrupted":
                print(f"Stopped at step {outcome.step}. Go on with: fastdcgan train --resume {printable(outcome.out)}")
            else:
                print(f"Done at step {outcome.step}. Samples, metrics and checkpoints are in {printable(outcome.out)}")
    finally:
        distributed.leave()
    return INTERRUPTED if outcome.reason == "interrupted" else 0
