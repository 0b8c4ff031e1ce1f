"""`fastdcgan style`"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdcgan.checks import AMOUNT, Range
from fastdcgan.cli.options import add_checkpoint, add_number, add_out, add_seed, file_to_write
from fastdcgan.dcgan import console, distributed, images, pictures, style, trained
from fastdcgan.dcgan.files import check_suffix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("content", metavar="CONTENT", type=Path, help="a picture of what shall be seen")
    parser.add_argument("style", metavar="STYLE", type=Path, help="a picture of how")
    add_number(parser, "--size", Range(style.LEAST_SIDE, 2**14), default=256, help="pixels of the longer sides")
    parser.add_argument("--optimize", choices=("image", "z"), default="image", help="the pixels, or a generator's z")
    parser.add_argument("--layers", help="of the style, with commas [default: all but the logit]")
    parser.add_argument("--content-layer", help="of the content [default: the second]")
    add_number(parser, "--content-weight", AMOUNT, default=1.0, help="of the content's loss")
    add_number(parser, "--style-weight", AMOUNT, default=3.0, help="of the style's loss")
    add_number(parser, "--variation-weight", AMOUNT, default=0.2, help="of the total variation")
    add_number(parser, "--steps", Range(1), default=300, help="of Adam")
    add_seed(parser, "of the first z, and of what is random on the way")
    add_out(parser, "style.png", "file of the sheet: content, style, result")


def run(args: argparse.Namespace) -> int:
    check_suffix(args.out, ".png", name="--out")
    device = distributed.choose_device(args.device)
    nets = trained.load_trained(args.checkpoint, device)
    channels = nets.discriminator.channels
    square = args.optimize == "z"  # then pictures have the size that is generated
    side = nets.generator.image_size if square else args.size
    content, manner = (
        pictures.load_picture(path, channels, side, square=square) for path in (args.content, args.style)
    )
    file_to_write(args.out)
    with console.Bar("style", args.steps) as bar:
        result = style.transfer(
            nets.discriminator,
            content,
            manner,
            layers=args.layers.split(",") if args.layers else None,
            content_layer=args.content_layer,
            weights=style.Weights(args.content_weight, args.style_weight, args.variation_weight),
            steps=args.steps,
            generator=nets.generator if args.optimize == "z" else None,
            seed=args.seed,
            progress=bar.update,
        )
    images.save_image(pictures.beside([content, manner, result.image.cpu()]), args.out)
    print(f"loss {result.first_loss:.3g} -> {result.loss:.3g}")
    console.wrote(args.out)
    return 0
