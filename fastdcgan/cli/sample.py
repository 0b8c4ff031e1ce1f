"""`fastdcgan sample`"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdcgan.checks import Range, printable
from fastdcgan.cli.options import add_class, add_device, add_number, add_seed
from fastdcgan.dcgan import distributed, sampling, trained
from fastdcgan.dcgan.console import wrote
from fastdcgan.dcgan.files import check_suffix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest one"
    )
    which.add_argument(
        "--per-class",
        nargs="+",
        metavar="NAME=CHECKPOINT",
        help="a generator for each class instead: --count images of each go into the folder OUT/NAME",
    )
    add_number(parser, "--count", Range(1), default=64, help="how many images")
    add_seed(parser, "of the noise they are made from")
    add_number(
        parser,
        "--truncation",
        Range(None, 1e12, above=0, whole=False),
        metavar="T",
        help="redraw noise beyond +-T: fewer odd images",
    )
    add_class(parser, " [default: all in turn]")
    parser.add_argument("--ema", action="store_true", help="with the run's moving average of the generator")
    parser.add_argument(
        "--out",
        type=Path,
        help="a grid (.png), an array (.npy, .npz), or a new folder [default: samples.png, or the folder samples]",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--separate", action="store_true", help="a file for each image in the folder OUT")
    form.add_argument(
        "--as-folder", action="store_true", help="a class of an ImageFolder-like set: files in OUT/NAME-OF-THE-DATA"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    device = distributed.choose_device(args.device)
    how = {"seed": args.seed, "truncation": args.truncation}
    if args.per_class and (args.separate or args.as_folder):
        raise ValueError("--per-class has a folder for each class: expected neither --separate nor --as-folder with it")
    in_folder = args.per_class or args.separate or args.as_folder
    out = args.out or Path("samples" if in_folder else "samples.png")
    if args.per_class and args.label is not None:
        raise ValueError("--class is of one checkpoint: expected none with --per-class")
    if args.per_class:
        places = _places(args.per_class)
        generators = {name: trained.load_generator(place, device, args.ema) for name, place in places.items()}
        sampling.write_classes(generators, args.count, out, **how)
        wrote(out)
        return 0
    if not in_folder:
        check_suffix(out, ".png", ".npy", ".npz", name="--out")
    run = trained.load_trained(args.checkpoint, device, args.ema, args.label)
    if args.as_folder:
        out /= _name(run)
    if in_folder:
        sampling.write_files(run.generator, args.count, out, **how)
    elif out.suffix.lower() == ".png":
        sampling.write_grid(run.generator, args.count, out, **how)
    else:
        sampling.write_array(run.generator, args.count, out, **how)
    if args.as_folder:  # made to be data
        print(printable(out))
    else:
        wrote(out)
    return 0


def _name(run: trained.Trained) -> str:
    """The last part of what the run was trained on. It is the checkpoint that says so, so it may be anything."""
    name = Path(run.config.data).name
    if name in ("", ".."):
        raise ValueError(
            f"{run.path} was trained on {run.config.data!r}: expected the name of a folder for --as-folder"
        )
    return name


def _places(pairs: list[str]) -> dict[str, str]:
    """NAME=CHECKPOINT, ... -> the checkpoint of each class."""
    places: dict[str, str] = {}
    for pair in pairs:
        name, sign, place = pair.partition("=")
        if not (name and sign and place):
            raise ValueError(f"--per-class has {pair!r}: expected NAME=CHECKPOINT")
        if name in places:
            raise ValueError(f"--per-class names {name} twice: expected one checkpoint for each class")
        places[name] = place
    return places
