"""`fastdcgan sample`"""

from __future__ import annotations

import argparse

from fastdcgan.commands import add_checkpoint, add_out, at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--count", type=int, default=64, help="how many images")
    parser.add_argument("--seed", type=int, default=0, help="of the noise they are made from")
    add_out(parser, "samples.png", "file of the grid, or folder of files")
    parser.add_argument("--separate", action="store_true", help="a file for each image instead of one grid")


def run(args: argparse.Namespace) -> int:
    from fastdcgan.dcgan import distributed, sampling, trained

    at_least("--count", args.count, 1)
    device = distributed.choose_device(args.device)
    samples = sampling.sample(trained.load_generator(args.checkpoint, device), args.count, args.seed)
    sampling.save_samples(samples, args.out, grid=not args.separate)
    print(args.out)
    return 0
