"""Pictures out of tensors: grids, PNG files and GIFs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdcgan.dcgan.files import replacing

_GIF_FRAMES = 100


def to_pixels(images: Tensor) -> np.ndarray:
    """[N, C, H, W] in [-1, 1], any float dtype -> uint8 [N, H, W, C]."""
    levels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] with 1 or 3 channels -> a picture."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """[N, C, H, W] in [-1, 1] -> one picture, row by row, as square as N allows unless `columns` is given."""
    pixels = to_pixels(images)
    n, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), np.uint8)
    for i, picture in enumerate(pixels):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return to_image(sheet)


def save_image(image: Image.Image, path: Path) -> None:
    """A PNG file, written atomically."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def save_gif(frames: Sequence[Path], path: Path, seconds: float = 8.0) -> None:
    """An animation of pictures of one size: at most 100 of them, evenly chosen, with the last one shown longest."""
    if len(frames) > _GIF_FRAMES:
        frames = [frames[round(i * (len(frames) - 1) / (_GIF_FRAMES - 1))] for i in range(_GIF_FRAMES)]
    pictures = []
    for frame in frames:
        with Image.open(frame) as image:
            pictures.append(image.copy())
    each = max(20, round(1000 * seconds / len(pictures)))
    durations = [each] * (len(pictures) - 1) + [2000]
    with replacing(path) as temporary:
        pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
