"""Sources of images: folders, built-in sets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.dcgan import load_images
from fastdcgan.dcgan.data import load_labelled
from fastdcgan.dcgan.sources import FolderSource, open_source
from tests.machine import needs_mnist


def decoded(folder: Path, name: str, size: int = 16, channels: int = 3) -> np.ndarray:
    source = FolderSource(folder)
    return source.decode([source.name_of(i) for i in range(len(source))].index(name), size, channels)


def test_centre_crop_and_antialiased_resize(tmp_path: Path) -> None:
    wide = np.zeros((32, 96), dtype=np.uint8)
    wide[:, :32] = wide[:, 64:] = 255  # black only in the middle third
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decoded(tmp_path, "wide.png").max() < 30  # the cut edges ring a little
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard of single pixels averages out
    Image.fromarray(fine.astype(np.uint8)).save(tmp_path / "fine.png")
    inside = decoded(tmp_path, "fine.png")[2:-2, 2:-2]
    assert abs(inside.astype(int) - 127).max() <= 3


def test_rotated_by_exif(tmp_path: Path) -> None:
    picture = np.zeros((32, 32), dtype=np.uint8)
    picture[:16] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert decoded(tmp_path, "turned.png")[0, 8, 0] == 0
    assert decoded(tmp_path, "turned.png")[-1, 8, 0] == 255


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder, and no built-in set"):
        load_images(str(tmp_path / "nowhere"), 16, 3, cache_folder=tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        load_images(str(tmp_path / "empty"), 16, 3, cache_folder=tmp_path / "cache")
    (tmp_path / "empty" / "broken.png").touch()
    with pytest.raises(ValueError, match=r"none of the 1 files .* could be read"):
        load_images(str(tmp_path / "empty"), 16, 3, cache_folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@needs_mnist
def test_mnist_and_digits() -> None:
    mnist = load_images("mnist", 32, 1).array
    assert mnist.shape == (5000, 32, 32, 1)
    assert mnist.max() == 255
    assert not mnist[:, :2].any()
    assert not mnist[:, :, -2:].any()
    source = open_source("mnist")
    assert np.array_equal(source.decode(7, 28, 1), mnist[7, 2:-2, 2:-2])
    assert source.decode(7, 64, 3).shape == (64, 64, 3)
    assert load_images("digits", 32, 3).array.shape == (1797, 32, 32, 3)


def test_photo_crops() -> None:
    """Squares of the photographs as they are, none of sky alone; each one's class is its photograph."""
    found = load_labelled("photo-crops", 64, 3)
    assert found.images.array.shape == (len(found), 64, 64, 3)
    assert len(found) > 4000
    assert found.classes == ["china", "flower"]
    assert np.bincount(found.labels).min() > 1500
    china, flower = (found.images.array[found.labels == i].mean((0, 1, 2)) for i in range(2))
    assert china[2] > 1.5 * flower[2]  # there is a lot of blue in a sky, little in an orange dahlia

    source = open_source("photo-crops")
    photograph = Image.fromarray(source.photographs[0])
    name = source.name_of(40)
    box = tuple(int(number) for number in re.findall(r"\d+", name))
    assert name.startswith("china")
    assert box[2] - box[0] == box[3] - box[1] == 128
    assert np.array_equal(source.decode(40, 128, 3), np.asarray(photograph.crop(box)))
    assert source.decode(40, 32, 1).shape == (32, 32, 1)
    assert source.decode(40, 32, 1).std() > 30
