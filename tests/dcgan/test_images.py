"""Pixels, grids and GIFs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.dcgan import images


def test_levels() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0, 1 / 255]).view(1, 1, 1, 6)
    assert images.to_pixels(x).ravel().tolist() == [0, 128, 255, 0, 255, 128]
    assert np.array_equal(images.to_pixels(x.to(torch.bfloat16)).ravel()[:5], [0, 128, 255, 0, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(channels: int) -> None:
    """Row by row, with gaps; five images make three columns and two rows."""
    expected = [25, 76, 128, 179, 230]
    levels = torch.tensor(expected) / 127.5 - 1
    picture = images.grid(levels.view(5, 1, 1, 1).expand(5, channels, 4, 6), gap=1)
    assert picture.size == (3 * 7 + 1, 2 * 5 + 1)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture).reshape(11, 22, channels)
    found = [pixels[row, column, 0] for row in (2, 7) for column in (3, 10, 17)]
    assert found == [*expected, 0]
    assert not pixels[:, [0, 7, 14, 21]].any()
    assert not pixels[[0, 5, 10]].any()


def test_grid_of_given_columns() -> None:
    assert images.grid(torch.zeros(6, 1, 4, 4), columns=6, gap=0).size == (24, 4)


def test_gif_of_many_frames(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(150)]
    for i, path in enumerate(paths):
        images.save_image(Image.new("L", (8, 8), i), path)
    with pytest.raises(ValueError, match=r"path is .*all\.png: expected the name of a file \.gif"):
        images.save_gif(paths, tmp_path / "all.png")
    with pytest.raises(ValueError, match=r"path is x\.jpg: expected the name of a file \.png"):
        images.save_image(Image.new("L", (8, 8)), Path("x.jpg"))
    images.save_image(Image.new("L", (8, 8)), tmp_path / "LOUD.PNG")
    images.save_gif(paths, tmp_path / "all.gif")
    with Image.open(tmp_path / "all.gif") as animation:
        assert animation.n_frames == 100
        assert animation.convert("L").getpixel((0, 0)) == 0
        animation.seek(99)
        assert animation.convert("L").getpixel((0, 0)) == 149
        assert animation.info["duration"] == 2000
