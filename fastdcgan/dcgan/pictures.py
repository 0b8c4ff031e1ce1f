"""Single pictures from files, and several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastdcgan.dcgan.decoding import read_image
from fastdcgan.dcgan.images import to_image, to_pixels
from fastdcgan.images import normalize_images


def load_picture(path: str | Path, channels: int, side: int, *, square: bool = False) -> Tensor:
    """A file as [1, channels, H, W] in [-1, 1], its longer side `side` pixels; with `square` its middle, that large.

    Raises ValueError for a file that is no picture.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no picture {path}")
    try:
        plain = read_image(path, channels)
    except ValueError as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error
    if square:
        plain = ImageOps.fit(plain, (side, side), Image.Resampling.LANCZOS)
    else:
        plain = ImageOps.contain(plain, (side, side), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(plain))
    return normalize_images(pixels.view(1, *pixels.shape[:2], channels))


def beside(pictures: Sequence[Tensor], gap: int = 4) -> Image.Image:
    """[1, C, H, W] in [-1, 1] each, of any sizes, in a row, centred on white."""
    pixels = [to_pixels(picture)[0] for picture in pictures]
    height = max(p.shape[0] for p in pixels)
    sheet = np.full((height, sum(p.shape[1] + gap for p in pixels) - gap, pixels[0].shape[2]), 255, np.uint8)
    left = 0
    for p in pixels:
        top = (height - p.shape[0]) // 2
        sheet[top : top + p.shape[0], left : left + p.shape[1]] = p
        left += p.shape[1] + gap
    return to_image(sheet)
