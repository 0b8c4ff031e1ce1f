"""Walks between a generator's inputs, and arithmetic with them.

    generator = load_generator("runs/mine")
    save_image(walk_sheet(generator, latents(generator.nz, ["3", "14", "15"])), Path("walk.png"))
    save_image(arithmetic_sheet(generator, parse("1,2,3 - 4,5,6 + 7,8,9")), Path("arithmetic.png"))

An input is named by its seed, "3", or by seed and number, "0:14": the image of that number, counted from 0, in
`fastdcgan sample --seed 0`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdcgan.checks import SEED, Range
from fastdcgan.dcgan.images import grid, save_animation, to_image, to_pixels
from fastdcgan.dcgan.models import Generator
from fastdcgan.dcgan.sampling import noise

_GAP = 2
_GIF_SIDE = 128  # pixels: smaller images are enlarged to at least this
_MILLISECONDS = 60
_NAME = re.compile(r"(\d+)(?::(\d+))?")
_BATCH = 64
_NUMBER = Range(0, 99_999)  # the noise of all images before it is drawn, too

Terms = list[tuple[int, list[str]]]  # sign, and the names of the inputs that are averaged


# --- inputs and what lies between them -------------------------------------------------------------------------------


def latents(nz: int, names: Sequence[str | int]) -> Tensor:
    """The inputs of these names: float32 [len(names), nz]. Raises ValueError for a name that is none."""
    rows = []
    for name in names:
        found = _NAME.fullmatch(str(name))
        if not found:
            raise ValueError(f"{str(name)!r} names no input: expected a seed, or SEED:NUMBER")
        seed, number = int(found[1]), int(found[2] or 0)
        SEED.check("a seed", seed)
        _NUMBER.check("the number of an image", number)
        rows.append(noise(nz, number + 1, seed)[number])
    return torch.stack(rows)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation: [T, nz] from `a` [nz] at t = 0 to `b` [nz] at t = 1, `t` [T] (Shoemake, 1985).

    What lies between two draws of a normal distribution is then as long as such draws are; on the straight line it
    is shorter, and the generator never saw the like. For opposite directions, which no single arc connects, and equal
    ones it is the straight line.
    """
    cosine = torch.dot(a / a.norm(), b / b.norm()).clamp(-1, 1)
    angle = torch.acos(cosine)
    t = t[:, None]
    if torch.sin(angle) < 1e-4:
        return (1 - t) * a + t * b
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def walk(points: Tensor, steps: int) -> Tensor:
    """The inputs [K-1, steps, nz] on the way from each of the `points` [K, nz] to the next one, both ends included."""
    if len(points) < 2:
        raise ValueError(f"a walk between {len(points)} inputs: expected at least 2")
    if steps < 2:
        raise ValueError(f"steps is {steps}: expected at least 2")
    t = torch.linspace(0, 1, steps)
    return torch.stack([slerp(a, b, t) for a, b in pairwise(points)])


# --- arithmetic ------------------------------------------------------------------------------------------------------


def parse(expression: str) -> Terms:
    """Reads "1,2,3 - 4,5,6 + 7,8,9": terms of names of inputs, separated by commas, with their signs.

    Raises ValueError for anything else.
    """
    first, *others = re.split(r"\s*([+-])\s*", expression.strip())
    signs = [1, *(1 if sign == "+" else -1 for sign in others[::2])]
    terms = [(sign, term.split(",")) for sign, term in zip(signs, [first, *others[1::2]], strict=True)]
    for _, names in terms:
        for name in names:
            if not _NAME.fullmatch(name.strip()):
                raise ValueError(f"{expression!r} has {name!r}: expected something like '1,2,3 - 4,5,6 + 7,8,9'")
    return [(sign, [name.strip() for name in names]) for sign, names in terms]


def combine(nz: int, terms: Terms) -> Tensor:
    """The sum of the terms, each the mean of its inputs: [nz] (Radford et al., 2015, section 6.3)."""
    return torch.stack([sign * latents(nz, names).mean(0) for sign, names in terms]).sum(0)


def neighbourhood(z: Tensor, scale: float = 0.25, seed: int = 0) -> Tensor:
    """`z` [nz] in the middle of eight others, with uniform noise in [-scale, scale] added, as in the paper: [9, nz]."""
    if not scale >= 0:
        raise ValueError(f"the scale of the noise is {scale}: expected at least 0")
    random = torch.Generator().manual_seed(seed)
    around = z + scale * (2 * torch.rand(9, len(z), generator=random) - 1)
    around[4] = z
    return around


# --- pictures --------------------------------------------------------------------------------------------------------


def walk_sheet(generator: Generator, points: Tensor, steps: int = 8) -> Image.Image:
    """A row of images for each part of the `walk` along `points` [K, nz]."""
    return grid(_images(generator, walk(points, steps).flatten(0, 1)), columns=steps)


def save_walk(generator: Generator, points: Tensor, path: Path, steps: int = 16) -> None:
    """A GIF of the walk along `points` [K, nz] and back to the first one; each part has `steps` frames."""
    if steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1")
    around = walk(torch.cat([points, points[:1]]), steps + 1)[:, :-1]
    frames = _images(generator, around.flatten(0, 1))
    scale = math.ceil(_GIF_SIDE / generator.image_size)
    enlarged = to_pixels(frames).repeat(scale, 1).repeat(scale, 2)
    save_animation([to_image(frame) for frame in enlarged], path, _MILLISECONDS)


def arithmetic_sheet(generator: Generator, terms: Terms, scale: float = 0.25, seed: int = 0) -> Image.Image:
    """For each term a column of its inputs' images, with the image of their mean below, and the `neighbourhood` of the
    result, as figure 7 of the paper shows it."""
    nz, size = generator.nz, generator.image_size
    columns = [latents(nz, names) for _, names in terms]
    rows = max(map(len, columns))
    cell = size + _GAP
    height = (max(rows, 2) + 1) * cell + _GAP + cell // 2
    parts: list[np.ndarray] = []
    for (sign, _), column in zip(terms, columns, strict=True):
        if parts or sign < 0:
            parts.append(_sign("+" if sign > 0 else "-", height, size, generator.channels))
        parts.append(_column(_images(generator, column), _images(generator, column.mean(0)[None]), height))
    parts.append(_sign("=", height, size, generator.channels))
    result = np.asarray(grid(_images(generator, neighbourhood(combine(nz, terms), scale, seed)), 3, _GAP))
    parts.append(_centred(result.reshape(*result.shape[:2], generator.channels), height))
    return to_image(np.concatenate(parts, 1))


@torch.inference_mode()
def _images(generator: Generator, z: Tensor) -> Tensor:
    device = next(generator.parameters()).device
    return torch.cat([generator(part.to(device)).float().cpu() for part in z.split(_BATCH)])


def _column(images: Tensor, mean: Tensor, height: int) -> np.ndarray:
    """Images below each other from the top, and one at the bottom."""
    pixels, last = to_pixels(images), to_pixels(mean)[0]
    _, side, _, channels = pixels.shape
    column = np.full((height, side + 2 * _GAP, channels), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top = _GAP + i * (side + _GAP)
        column[top : top + side, _GAP:-_GAP] = picture
    column[height - _GAP - side : height - _GAP, _GAP:-_GAP] = last
    return column


def _centred(block: np.ndarray, height: int) -> np.ndarray:
    above = (height - len(block)) // 2
    return np.pad(block, ((above, height - len(block) - above), (0, 0), (0, 0)), constant_values=255)


def _sign(sign: str, height: int, size: int, channels: int) -> np.ndarray:
    """A plus, a minus or an equals sign, beside the means."""
    picture = np.full((height, size // 2, channels), 255, np.uint8)
    middle, long, thick = height - _GAP - size // 2, size // 8, max(1, size // 32)
    centre = size // 4
    offsets = (-2 * thick, 2 * thick) if sign == "=" else (0,)
    for offset in offsets:
        picture[middle + offset - thick : middle + offset + thick, centre - long : centre + long] = 0
    if sign == "+":
        picture[middle - long : middle + long, centre - thick : centre + thick] = 0
    return picture
