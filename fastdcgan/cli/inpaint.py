"""`fastdcgan inpaint`"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdcgan.checks import AMOUNT, Range
from fastdcgan.cli.options import add_checkpoint, add_class, add_number, add_out, add_seed
from fastdcgan.dcgan import distributed, inpainting, masks, trained
from fastdcgan.dcgan.console import Bar, say, wrote
from fastdcgan.dcgan.data import held_out, load_images
from fastdcgan.dcgan.files import check_suffix, mark_written, new_folder, replacing
from fastdcgan.dcgan.images import encoded, save_numbered, to_pixels
from fastdcgan.dcgan.trained import Trained
from fastdcgan.images import normalize_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "images",
        nargs="?",
        metavar="IMAGES",
        help="a folder of images, or a built-in set [default: what the run held out of its data (train --holdout), or "
        "else all of it]",
    )
    parser.add_argument(
        "--mask",
        default="centre",
        help="what is missing: centre, random, top, bottom, left, right, or an image file of the size of the images, "
        "white where something is missing",
    )
    add_number(
        parser,
        "--share",
        Range(None, None, above=0, below=1, whole=False),
        help="how much is missing [default: centre 0.25, random 0.8, else 0.5]",
    )
    add_number(parser, "--count", Range(1), default=12, help="how many images, evenly chosen")
    add_number(parser, "--steps", Range(1), default=300, help="of each search")
    add_number(parser, "--restarts", Range(1), default=4, help="searches for each image; the best one is kept")
    add_number(parser, "--prior", AMOUNT, default=0.003, help="weight of the prior loss")
    add_seed(parser, "of random masks, and of where the searches begin")
    add_class(parser)
    parser.add_argument("--ema", action="store_true", help="with the run's moving average of the generator")
    parser.add_argument("--cache", type=Path, help="folder of decoded images [default: as train has it]")
    parser.add_argument(
        "--separate", type=Path, metavar="FOLDER", help="also a file of each filled image, in a new folder"
    )
    add_out(parser, "inpainted.png", "picture: originals, what is known of them, and filled in")


def run(args: argparse.Namespace) -> int:
    check_suffix(args.out, ".png", name="--out")
    run = trained.load_trained(args.checkpoint, distributed.choose_device(args.device), args.ema, args.label)
    size = run.config.image_size
    known = masks.make(args.mask, size, args.count, share=args.share, seed=args.seed)
    images, mean = _images(run, args)
    known = known[: len(images)]
    with (
        replacing(args.out) as picture,
        new_folder(args.separate) if args.separate else nullcontext() as folder,
    ):
        with Bar("inpainting", args.steps) as bar:
            result = inpainting.inpaint(
                run.generator,
                run.discriminator,
                images,
                known,
                steps=args.steps,
                restarts=args.restarts,
                prior=args.prior,
                seed=args.seed,
                progress=bar.update,
            )
        picture.write_bytes(encoded(inpainting.sheet(images, known, result.images)))
        if folder is not None:
            save_numbered([to_pixels(result.images)], len(images), folder)
    lines = {"filled in": result.images, "mean of the image's known pixels": inpainting.mean_of_known(images, known)}
    if mean is not None:
        lines["mean of the images trained on"] = mean
    say(f"PSNR over the missing pixels of {len(images)} images of {size}x{size}, mask {args.mask}:")
    for title, filling in lines.items():
        filled = inpainting.fill_with(images, known, filling)
        say(f"  {title:<34}{_in_words(inpainting.psnr(filled, images, ~known))}")
    if args.separate:
        mark_written(args.separate)
    wrote(args.out)
    return 0


def _in_words(psnr: Tensor) -> str:
    """The mean of PSNRs, which are infinite where an image is filled in without any error: those are counted."""
    finite = psnr[psnr.isfinite()]
    exact = len(psnr) - len(finite)
    words = [f"{finite.mean():6.2f} dB"] if len(finite) else []
    return ", ".join(words + [f"{exact} of {len(psnr)} without error"] * (exact > 0))


def _images(run: Trained, args: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """The images to fill in [N, C, H, W], and the mean of those that the run was trained on, where they are of its own
    data."""
    config = run.config
    data = run.images(args.images)
    array = load_images(data, config.image_size, config.channels, cache_folder=args.cache).array
    numbers, mean = np.arange(len(array)), None
    if args.images is None:
        unseen = held_out(len(array), config.holdout)
        mean = torch.from_numpy(array.mean(0, where=~unseen[:, None, None, None], dtype=np.float64))
        mean = mean.permute(2, 0, 1)[None].div(127.5).sub(1).float()
        if config.holdout:
            numbers = np.flatnonzero(unseen)
        else:
            say(f"The run was trained on all of {data}: these are images that it has seen.")
    chosen = numbers[np.linspace(0, len(numbers) - 1, min(args.count, len(numbers))).round().astype(int)]
    return normalize_images(torch.from_numpy(array[chosen])), mean
