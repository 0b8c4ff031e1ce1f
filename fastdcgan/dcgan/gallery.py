"""Pictures of what a trained DCGAN does, for the documentation: `make gallery`, or `python -m fastdcgan.dcgan.gallery`.

It draws them from two runs, one on digits and one on people among the emoji, which it trains first where they are not
there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdcgan.dcgan import checkpoint, demo, inpainting, interpolation, masks, sampling
from fastdcgan.dcgan.config import PRESETS, TrainConfig
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.data import held_out, load_images
from fastdcgan.dcgan.files import write
from fastdcgan.dcgan.images import encoded, grid
from fastdcgan.dcgan.trained import Trained, load_trained
from fastdcgan.dcgan.training import Trainer
from fastdcgan.images import normalize_images

MOST_BYTES = 500_000  # that a picture's file may have
_SIDE = 64  # pixels: smaller images are enlarged to it
_SHOWN, _FILLED, _CANDIDATES, _FRAMES = 64, 12, 256, 7

_DIGITS = TrainConfig(
    data="mnist",
    image_size=demo.IMAGE_SIZE,
    channels=demo.CHANNELS,
    ngf=demo.WIDTH,
    ndf=demo.WIDTH,
    batch_size=demo.BATCH,
    lr_g=demo.LR_G,
    lr_d=demo.LR_D,
    holdout=demo.HOLDOUT,
    ema=0.998,
)
_PEOPLE = TrainConfig(**{**PRESETS["emoji64"], "data": "emoji-people"})


@dataclasses.dataclass(frozen=True)
class Picture:
    """A file of the gallery, and what it shows."""

    name: str
    title: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdcgan.dcgan.gallery", description="Make the gallery.")
    parser.add_argument("--out", type=Path, default=Path("docs/gallery"), help="folder of the pictures")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/gallery"), help="folder of the runs they are drawn from"
    )
    parser.add_argument("--data", default=_PEOPLE.data, help="colour pictures to train on: a folder, or a built-in set")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long a run may train that is not there yet")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto is a GPU where there is one")
    args = parser.parse_args(argv)
    sections = []
    for name, config in (("digits", _DIGITS), ("people", dataclasses.replace(_PEOPLE, data=args.data))):
        run = _trained(dataclasses.replace(config, device=args.device), args.runs / name, args.minutes)
        sections.append((name, describe(run), draw(run, args.out, name)))
    write(args.out / "README.md", page(sections))
    print(args.out)
    return 0


def page(sections: Sequence[tuple[str, str, Sequence[Picture]]]) -> str:
    """Markdown: of each run its name, what was trained, and its pictures."""
    text = ["# Gallery", "", "Made by `make gallery`, which trains what is missing and draws what you see."]
    for name, described, pictures in sections:
        text += ["", f"## {name.capitalize()}", "", described]
        for picture in pictures:
            text += ["", f"{picture.title}:", "", f"![{picture.title}]({picture.name})"]
    return "\n".join(text) + "\n"


def _trained(config: TrainConfig, out: Path, minutes: float) -> Trained:
    """The run in `out`, trained if it is not there."""
    if not checkpoint.all_of(out):
        config = dataclasses.replace(
            config,
            out=str(out),
            precision="bf16",
            epochs=1000,
            max_minutes=minutes,
            sample_every=250,
        )
        Trainer(config).run()
    run = load_trained(out)
    return load_trained(out, ema=True) if run.config.ema else run


def describe(run: Trained) -> str:
    """What was trained, from the checkpoint."""
    c = run.config
    data = {"mnist": "5,000 digits of MNIST", "emoji-people": "Faces, people and hands of the font Noto Color Emoji"}
    unseen = f", every {c.holdout}th held out" if c.holdout else ""
    short = " A short run: with more steps come more details." if run.step < demo.MOST_STEPS else ""
    average = "; drawn with the average of the generator" if c.ema else ""
    return (
        f"{data.get(c.data, 'Pictures')}, {c.image_size}x{c.image_size}{unseen}; {run.step} steps of "
        f"{c.batch_size} images, ngf {c.ngf}, ndf {c.ndf}, {c.precision}{average}.{short}"
    )


def draw(run: Trained, out: Path, prefix: str) -> list[Picture]:
    """Write all pictures of a run into `out`. Raises RuntimeError for one that is larger than `MOST_BYTES`."""
    generator, size = run.generator, run.config.image_size
    points = interpolation.latents(generator.nz, range(6))
    pictures = []

    def add(name: str, title: str, image: Image.Image) -> None:
        picture = Picture(f"{prefix}-{name}.png", title)
        _save(_enlarged(image, size), out / picture.name)
        pictures.append(picture)

    add("samples", "Samples", grid(sampling.sample(generator, _SHOWN)))
    add("walk", "Walks from one input to the next", interpolation.walk_sheet(generator, points))
    if run.config.channels == 1:  # with colours the sum is plain white
        sums = interpolation.arithmetic_sheet(generator, _by_brightness(run))
        add("arithmetic", "Bold ones minus thin ones plus middling ones", sums)
    animation = Picture(f"{prefix}-walk.gif", "A walk, moving")
    interpolation.save_walk(generator, points[:4], out / animation.name, _FRAMES)
    _check_size(out / animation.name)
    pictures.append(animation)
    if run.config.holdout:
        images = _unseen(run, _FILLED)
        for name in ("centre", "random"):
            known = masks.make(name, size, _FILLED)
            result = inpainting.inpaint(generator, run.discriminator, images, known)
            title = "Inpainting of images that training did not see: original, known, filled in"
            add(f"inpainting-{name}", title, inpainting.sheet(images, known, result.images))
    return pictures


def _unseen(run: Trained, count: int) -> torch.Tensor:
    """Evenly chosen images that the run held out of its data."""
    c = run.config
    array = load_images(run.images(None), c.image_size, c.channels).array
    unseen = np.flatnonzero(held_out(len(array), c.holdout))
    return normalize_images(torch.from_numpy(array[unseen[np.linspace(0, len(unseen) - 1, count).astype(int)]]))


def _by_brightness(run: Trained) -> interpolation.Terms:
    """Three of the brightest samples, minus three of the darkest, plus three in the middle."""
    order = sampling.sample(run.generator, _CANDIDATES).mean((1, 2, 3)).argsort().tolist()
    middle = _CANDIDATES // 2
    chosen = ((1, order[-3:]), (-1, order[:3]), (1, order[middle : middle + 3]))
    return [(sign, [f"0:{number}" for number in numbers]) for sign, numbers in chosen]


def _enlarged(image: Image.Image, size: int) -> Image.Image:
    factor = max(1, _SIDE // size)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _save(image: Image.Image, path: Path) -> None:
    write(path, encoded(image, optimize=True))
    _check_size(path)


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    say(f"{path}: {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        raise RuntimeError(f"{path} has {size} bytes: expected at most {MOST_BYTES}")


if __name__ == "__main__":
    sys.exit(main())
