"""`fastdcgan evaluate`"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdcgan.checks import Range, printable
from fastdcgan.cli.options import add_checkpoint, add_data, add_number, add_seed, folder_to_fill
from fastdcgan.dcgan import checkpoint, distributed, evaluation, trained
from fastdcgan.dcgan.files import mark_written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_data(parser, "a folder of images (one with a folder for each class has labels), or a built-in set")
    parser.add_argument("--all", action="store_true", help="all checkpoints of the run, not the newest alone")
    add_number(parser, "--count", Range(10), default=1000, help="how many images to generate")
    parser.add_argument("--ema", action="store_true", help="the moving average of the generator")
    parser.add_argument("--fid", action="store_true", help="Inception's FID too (needs torch-fidelity and its weights)")
    add_seed(parser, "of the noise")
    parser.add_argument("--out", type=Path, help="folder for the results [default: evaluation, in the run's folder]")


def run(args: argparse.Namespace) -> int:
    device = distributed.choose_device(args.device)
    if args.fid:
        evaluation.check_fid()
    newest = trained.load_trained(args.checkpoint, device, args.ema)
    place = newest.path.parent.parent if newest.path.parent.name == "checkpoints" else newest.path.parent
    paths = checkpoint.all_of(place) if args.all else [newest.path]
    if not paths:
        raise checkpoint.CheckpointError(f"{place} has no checkpoints")
    data = newest.images(args.data)
    out = args.out or place / "evaluation"
    folder_to_fill(out)
    yardstick = evaluation.load_yardstick(data, newest, out, device)
    found = evaluation.evaluate(paths, yardstick, count=args.count, seed=args.seed, ema=args.ema, fid=args.fid)
    real = evaluation.real_images(yardstick, args.count, args.seed, fid=args.fid)
    evaluation.write(found, real, yardstick, out, data=data, count=args.count, seed=args.seed, ema=args.ema)
    print(
        f"{args.count} generated images against {len(yardstick.pixels)} held-out ones, in the feature space of "
        f"{yardstick.space}.\n\n{evaluation.to_markdown(found, real)}"
    )
    mark_written(out / "evaluation.png")
    print(printable(out))
    return 0
