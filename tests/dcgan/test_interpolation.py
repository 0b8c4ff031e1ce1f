"""Walks between inputs, arithmetic with them, and the pictures of both."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.dcgan import Generator, interpolation, sample
from fastdcgan.dcgan.images import to_pixels

# --- inputs and what lies between them -------------------------------------------------------------------------------


def test_inputs_are_those_of_samples(generator: Generator) -> None:
    points = interpolation.latents(8, [3, "0:14", "0"])
    images = generator(points).detach()
    expected = torch.cat([sample(generator, 1, 3), sample(generator, 15, 0)[14:], sample(generator, 1, 0)])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["-1", "a", "1:", ":1", "1:2:3", "1.5", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="names no input"):
        interpolation.latents(8, ["1", name])


def test_slerp_runs_along_the_arc() -> None:
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    found = interpolation.slerp(a, b, torch.tensor([0.0, 1 / 3, 1.0]))
    expected = torch.tensor([[1.0, 0, 0], [math.cos(math.pi / 6), math.sin(math.pi / 6), 0], [0, 1, 0]]) * 2
    torch.testing.assert_close(found, expected)
    # Other lengths: both ends are met, and it never gets shorter than the shorter one.
    between = interpolation.slerp(a, 3 * b, torch.linspace(0, 1, 9))
    torch.testing.assert_close(between[[0, -1]], torch.stack([a, 3 * b]))
    assert between.norm(dim=1).min() >= 2


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_slerp_without_an_arc(factor: float) -> None:
    a = torch.tensor([1.0, 2.0, 3.0])
    found = interpolation.slerp(a, factor * a, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(found, torch.stack([a, (1 + factor) / 2 * a, factor * a]))


def test_walk_meets_its_points() -> None:
    points = torch.randn(4, 16)
    path = interpolation.walk(points, 5)
    assert path.shape == (3, 5, 16)
    torch.testing.assert_close(path[:, 0], points[:-1])
    torch.testing.assert_close(path[:, -1], points[1:])
    with pytest.raises(ValueError, match="a walk between 1 inputs: expected at least 2"):
        interpolation.walk(points[:1], 5)
    with pytest.raises(ValueError, match="steps is 1: expected at least 2"):
        interpolation.walk(points, 1)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "terms"),
    [
        ("1,2,3 - 4,5,6 + 7,8,9", [(1, ["1", "2", "3"]), (-1, ["4", "5", "6"]), (1, ["7", "8", "9"])]),
        ("0:1, 0:2-3", [(1, ["0:1", "0:2"]), (-1, ["3"])]),
        (" 5 ", [(1, ["5"])]),
    ],
)
def test_expressions(expression: str, terms: interpolation.Terms) -> None:
    assert interpolation.parse(expression) == terms


@pytest.mark.parametrize("expression", ["", "1,,2", "1 * 2", "1 -", "- 1", "a - b", "1 - - 2", "1 2"])
def test_expressions_that_are_none(expression: str) -> None:
    with pytest.raises(ValueError, match="expected something like"):
        interpolation.parse(expression)


def test_sums_of_means() -> None:
    z = interpolation.latents(8, ["1", "2", "3", "4"])
    found = interpolation.combine(8, interpolation.parse("1,2 - 3 + 4"))
    torch.testing.assert_close(found, (z[0] + z[1]) / 2 - z[2] + z[3])


def test_neighbourhood() -> None:
    z = torch.randn(200)
    around = interpolation.neighbourhood(z, 0.5)
    assert torch.equal(around[4], z)
    others = (around - z)[[0, 1, 2, 3, 5, 6, 7, 8]]
    assert others.abs().max() <= 0.5 + 1e-6
    assert others.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)  # of a uniform distribution
    assert torch.equal(interpolation.neighbourhood(z, 0.0), z.expand(9, -1))
    with pytest.raises(ValueError, match=r"the scale of the noise is -0\.1"):
        interpolation.neighbourhood(z, -0.1)


# --- pictures --------------------------------------------------------------------------------------------------------


def pixels_of(generator: Generator, z: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return to_pixels(generator(z))[..., 0].astype(int)


def test_walk_sheet(generator: Generator) -> None:
    points = interpolation.latents(8, [1, 2, 3])
    sheet = np.asarray(interpolation.walk_sheet(generator, points, 4)).astype(int)
    assert sheet.shape == (2 * 30 + 2, 4 * 30 + 2)
    expected = pixels_of(generator, interpolation.walk(points, 4).flatten(0, 1))
    for i, picture in enumerate(expected):
        top, left = 2 + 30 * (i // 4), 2 + 30 * (i % 4)
        assert abs(sheet[top : top + 28, left : left + 28] - picture).max() <= 1


def test_walk_as_gif(generator: Generator, tmp_path: Path) -> None:
    """Enlarged, and back to where it began without showing that twice."""
    points = interpolation.latents(8, [1, 2, 3])
    interpolation.save_walk(generator, points, tmp_path / "walk.gif", 4)
    ends = pixels_of(generator, points)
    with Image.open(tmp_path / "walk.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (12, (140, 140), 0)
        for i, picture in enumerate(ends):
            gif.seek(4 * i)
            assert abs(np.asarray(gif.convert("L"))[2::5, 2::5].astype(int) - picture).max() <= 3


@pytest.mark.parametrize("expression", ["1,2,3 - 4,5,6 + 7,8,9", "1 + 2", "1,2,3,4,5 - 6"])
def test_arithmetic_sheet(expression: str, generator: Generator) -> None:
    """The result is in the middle of the nine at the right, every mean at the bottom of its column."""
    terms = interpolation.parse(expression)
    sheet = np.asarray(interpolation.arithmetic_sheet(generator, terms, 0.2)).astype(int)
    height = len(sheet)
    (result,) = pixels_of(generator, interpolation.combine(8, terms)[None])
    nine = sheet[(height - 92) // 2 :, -92:][:92]
    assert abs(nine[32:60, 32:60] - result).max() <= 1
    for i, (_, names) in enumerate(terms):
        left = i * (32 + 14) + 2  # columns of 28 with gaps of 2 on both sides, signs of 14 between
        points = interpolation.latents(8, names)
        for j, picture in enumerate(pixels_of(generator, points)):
            assert abs(sheet[2 + 30 * j : 30 + 30 * j, left : left + 28] - picture).max() <= 1
        (mean,) = pixels_of(generator, points.mean(0)[None])
        assert abs(sheet[height - 30 : height - 2, left : left + 28] - mean).max() <= 1
