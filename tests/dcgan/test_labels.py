"""The classes of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.dcgan.data import load_images, load_labelled
from tests.machine import needs_mnist


def save(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 20), level).save(path)


def test_folders_are_classes(tmp_path: Path) -> None:
    """Broken files take no label with them, the first time or from the cache."""
    folder = tmp_path / "images"
    for name, level in (("dogs/deep/2.png", 20), ("cats/1.png", 10), ("dogs/4.png", 40), ("emus/3.png", 30)):
        save(folder / name, level)
    for name in ("cats/0.png", "dogs/3.png"):
        (folder / name).write_text("no image")
    for _ in range(2):
        found = load_labelled(str(folder), 16, 1, cache_folder=tmp_path / "cache")
        assert found.classes == ["cats", "dogs", "emus"]
        assert found.labels.dtype == np.int64
        levels = found.images.array[:, 0, 0, 0]
        assert dict(zip(levels.tolist(), found.labels.tolist(), strict=True)) == {10: 0, 20: 1, 40: 1, 30: 2}
        assert len(found) == 4


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["1.png", "2.png"], "0 and 2 images"),
        (["a/1.png", "a/2.png"], "1 and 0 images"),
        (["a/1.png", "b/1.png", "1.png"], "2 and 1 images"),
    ],
)
def test_folders_without_classes(files: list[str], found: str, tmp_path: Path) -> None:
    for name in files:
        save(tmp_path / "images" / name, 0)
    with pytest.raises(
        ValueError, match=f"has no classes: expected a folder for each of two or more, found {found} outside"
    ):
        load_labelled(str(tmp_path / "images"), 16, 1, cache_folder=tmp_path / "cache")
    assert len(load_images(str(tmp_path / "images"), 16, 1, cache_folder=tmp_path / "cache")) == len(files)


@needs_mnist
def test_mnist_and_digits() -> None:
    mnist = load_labelled("mnist", 32, 1)
    assert mnist.classes == list("0123456789")
    assert np.bincount(mnist.labels).tolist() == [500] * 10
    # The mean zero has a hole, the mean one has none.
    centre = [mnist.images.array[mnist.labels == digit, 14:18, 14:18].mean() for digit in (0, 1)]
    assert centre[0] < 20
    assert centre[1] > 150
    digits = load_labelled("digits", 32, 1)
    assert len(digits.labels) == len(digits.images) == 1797
    assert sorted(set(digits.labels.tolist())) == list(range(10))
