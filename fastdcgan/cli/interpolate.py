"""`fastdcgan interpolate`"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdcgan.checks import AMOUNT, Range
from fastdcgan.cli.options import add_checkpoint, add_class, add_number
from fastdcgan.dcgan import distributed, interpolation, trained
from fastdcgan.dcgan.console import wrote
from fastdcgan.dcgan.files import check_suffix
from fastdcgan.dcgan.images import save_image

_SEEDS = ["0", "1", "2", "3", "4"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--seeds",
        nargs="+",
        metavar="SEED",
        help="walk from each of these inputs to the next one: SEED, or SEED:NUMBER for the image of that number, "
        f"counted from 0, in `sample --seed SEED` [default: {' '.join(_SEEDS)}]",
    )
    what.add_argument(
        "--arithmetic",
        metavar="EXPRESSION",
        help="sums and differences of means of inputs, such as '1,2,3 - 4,5,6 + 7,8,9', with images around the result",
    )
    add_number(
        parser, "--steps", Range(1, 10_000), metavar="N", help="images of each part of the walk [default: 8; GIF: 16]"
    )
    add_number(parser, "--noise", AMOUNT, metavar="X", help="how far around the result: +-X [default: 0.25]")
    add_class(parser)
    parser.add_argument("--ema", action="store_true", help="with the run's moving average of the generator")
    parser.add_argument(
        "--out",
        type=Path,
        help="a picture (.png), or of a walk an animation (.gif) [default: walk.png, arithmetic.png]",
    )


def run(args: argparse.Namespace) -> int:
    out = args.out or Path("walk.png" if args.arithmetic is None else "arithmetic.png")
    check_suffix(out, ".png", *([".gif"] if args.arithmetic is None else []), name="--out")
    if args.arithmetic is not None and args.steps is not None:
        raise ValueError("--steps is of a walk: expected none with --arithmetic")
    if args.arithmetic is None and args.noise is not None:
        raise ValueError("--noise is around a result: expected --arithmetic with it")
    device = distributed.choose_device(args.device)
    terms = None if args.arithmetic is None else interpolation.parse(args.arithmetic)
    generator = trained.load_generator(args.checkpoint, device, args.ema, args.label)
    if terms is not None:
        around = {} if args.noise is None else {"scale": args.noise}
        save_image(interpolation.arithmetic_sheet(generator, terms, **around), out)
    else:
        points = interpolation.latents(generator.nz, args.seeds or _SEEDS)
        how = {} if args.steps is None else {"steps": args.steps}
        if out.suffix.lower() == ".gif":
            interpolation.save_walk(generator, points, out, **how)
        else:
            save_image(interpolation.walk_sheet(generator, points, **how), out)
    wrote(out)
    return 0
