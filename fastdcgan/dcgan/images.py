"""Pictures out of tensors: grids, PNG files and GIFs."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdcgan.dcgan.decoding import open_image
from fastdcgan.dcgan.files import check_suffix, write

_GIF_FRAMES = 100
_SAMPLES = re.compile(r"step-(\d{8,12})\.png")


def to_pixels(images: Tensor) -> np.ndarray:
    """[N, C, H, W] in [-1, 1], any float dtype -> uint8 [N, H, W, C]."""
    levels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] with 1 or 3 channels -> a picture."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """[N, C, H, W] in [-1, 1] -> one picture, row by row, as square as N allows unless `columns` is given."""
    sheet = Sheet(len(images), columns, gap)
    sheet.add(to_pixels(images))
    return sheet.image()


class Sheet:
    """A grid of `count` pictures that come in parts: `add` them, then take the `image`."""

    def __init__(self, count: int, columns: int | None = None, gap: int = 2) -> None:
        self.columns, self.gap = columns or math.ceil(math.sqrt(count)), gap
        self._rows, self._next = math.ceil(count / self.columns), 0
        self._pixels: np.ndarray | None = None

    def add(self, pixels: np.ndarray) -> None:
        """The next pictures: uint8 [N, H, W, C], all of one size."""
        (_, height, width, channels), gap = pixels.shape, self.gap
        if self._pixels is None:
            sides = (self._rows * (height + gap) + gap, self.columns * (width + gap) + gap)
            self._pixels = np.zeros((*sides, channels), np.uint8)
        for picture in pixels:
            row, column = divmod(self._next, self.columns)
            top, left = gap + row * (height + gap), gap + column * (width + gap)
            self._pixels[top : top + height, left : left + width] = picture
            self._next += 1

    def image(self) -> Image.Image:
        assert self._pixels is not None, "a sheet without pictures"
        return to_image(self._pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file's content. Pillow doesn't say why it could not write to a file, so it writes to memory."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def save_image(image: Image.Image, path: Path) -> None:
    """A PNG file, written atomically. Raises ValueError for the name of a file of another kind."""
    check_suffix(path, ".png")
    write(path, encoded(image))


def save_numbered(parts: Iterable[np.ndarray], count: int, folder: Path) -> None:
    """`count` pictures that come in parts, uint8 [N, H, W, C], as PNG files in `folder`: 000.png, 001.png, ..."""
    digits = len(str(count - 1))
    for number, pixels in enumerate(picture for part in parts for picture in part):
        (folder / f"{number:0{digits}}.png").write_bytes(encoded(to_image(pixels)))


def sample_grids(run: Path) -> list[tuple[int, Path]]:
    """The sample grids in a run's folder, with their steps, in the order of these."""
    found = ((_SAMPLES.fullmatch(path.name), path) for path in (run / "samples").glob("step-*.png"))
    return sorted((int(match[1]), path) for match, path in found if match)


def save_gif(frames: Sequence[Path], path: Path, seconds: float = 8.0) -> None:
    """An animation of files of one size: at most 100 pictures, evenly chosen, with the last one shown longest."""
    if len(frames) > _GIF_FRAMES:
        frames = [frames[round(i * (len(frames) - 1) / (_GIF_FRAMES - 1))] for i in range(_GIF_FRAMES)]
    pictures = []
    for frame in frames:
        with open_image(frame) as image:
            pictures.append(image.copy())
    each = max(20, round(1000 * seconds / len(pictures)))
    save_animation(pictures, path, [each] * (len(pictures) - 1) + [2000])


def save_animation(pictures: Sequence[Image.Image], path: Path, milliseconds: int | list[int]) -> None:
    """A GIF of pictures of one size that starts over and over, each shown that long, written atomically. Raises
    ValueError for the name of a file of another kind."""
    check_suffix(path, ".gif")
    first, *others = pictures
    write(path, encoded(first, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0))
