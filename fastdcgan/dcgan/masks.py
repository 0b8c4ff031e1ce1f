"""Which pixels of an image are known and which are to be filled in: bool masks [1 or N, 1, H, W], True where known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdcgan.dcgan.decoding import read_image

# What a half mask takes away: (axis, whether from the start) of [N, 1, H, W]
HALVES = {"top": (2, True), "bottom": (2, False), "left": (3, True), "right": (3, False)}
MASKS = ("centre", "random", *HALVES)


def make(name: str, image_size: int, count: int = 1, *, share: float | None = None, seed: int = 0) -> Tensor:
    """A mask of one of the `MASKS`, or out of an image file.

    `share` is how much is missing: by default the middle square with half the side (a quarter), 80% of random pixels
    (other ones in each of `count` images), or one half. Raises ValueError for a share that is not between 0 and 1, and
    for a file that holds no mask of this size.
    """
    if share is not None and not 0 < share < 1:
        raise ValueError(f"the share of missing pixels is {share}: expected more than 0 and less than 1")
    if name == "centre":
        return centre(image_size, 0.25 if share is None else share)
    if name == "random":
        return scattered(image_size, count, 0.8 if share is None else share, seed)
    if name in HALVES:
        return side(image_size, name, 0.5 if share is None else share)
    if share is not None:
        raise ValueError(f"the mask {name} is a file: expected no share of missing pixels with it")
    return from_file(name, image_size)


def centre(image_size: int, share: float = 0.25) -> Tensor:
    """Without a square in the middle that has this share of the pixels: [1, 1, H, W]."""
    hole = min(max(round(image_size * share**0.5), 1), image_size - 1)
    start = (image_size - hole) // 2
    known = torch.ones(1, 1, image_size, image_size, dtype=torch.bool)
    known[:, :, start : start + hole, start : start + hole] = False
    return known


def scattered(image_size: int, count: int = 1, share: float = 0.8, seed: int = 0) -> Tensor:
    """Without this share of pixels, drawn for each image: [count, 1, H, W]."""
    pixels = image_size**2
    missing = min(max(round(pixels * share), 1), pixels - 1)
    random = torch.Generator().manual_seed(seed)
    known = torch.ones(count, pixels, dtype=torch.bool)
    for row in known:
        row[torch.randperm(pixels, generator=random)[:missing]] = False
    return known.view(count, 1, image_size, image_size)


def side(image_size: int, which: str, share: float = 0.5) -> Tensor:
    """Without this share of rows or columns at the "top", "bottom", "left" or "right": [1, 1, H, W]."""
    axis, first = HALVES[which]
    gone = min(max(round(image_size * share), 1), image_size - 1)
    known = torch.ones(1, 1, image_size, image_size, dtype=torch.bool)
    known.narrow(axis, 0 if first else image_size - gone, gone).fill_(False)
    return known


def from_file(path: str | Path, image_size: int) -> Tensor:
    """Out of a picture, in which what is to be filled in is white (or lighter than middle grey): [1, 1, H, W].

    It is not resized: a mask says of each pixel whether it is known. Raises ValueError for a picture of another size,
    for one that leaves nothing to fill in or nothing known, and for a file that can't be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no mask {path}: expected a file, or one of {', '.join(MASKS)}")
    try:
        light = np.asarray(read_image(path, 1)) >= 128
    except ValueError as error:
        raise ValueError(f"the mask {path} can't be read: {error}") from error
    height, width = light.shape
    if (height, width) != (image_size, image_size):
        raise ValueError(f"the mask {path} is {width}x{height}: expected {image_size}x{image_size}, as the images are")
    known = torch.from_numpy(~light)[None, None]
    check(known)
    return known


def check(known: Tensor) -> None:
    """Raises ValueError where a mask has nothing to fill in, or leaves nothing known."""
    per_image = known.flatten(1)
    if per_image.all(1).any():
        raise ValueError("the mask leaves nothing to fill in: expected pixels that are missing")
    if not per_image.any(1).all():
        raise ValueError("the mask leaves nothing known: expected pixels to go by")
