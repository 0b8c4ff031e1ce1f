"""Masks: what is missing of an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.dcgan import masks


def test_centre() -> None:
    known = masks.make("centre", 32)
    assert known.shape == (1, 1, 32, 32)
    hole = ~known[0, 0]
    assert hole[8:24, 8:24].all()
    assert hole.sum() == 256
    assert (~masks.make("centre", 28, share=0.5)).sum() == 20**2  # the nearest square to half of 784


def test_scattered() -> None:
    known = masks.make("random", 32, 3, seed=1)
    assert known.shape == (3, 1, 32, 32)
    assert (~known).flatten(1).sum(1).tolist() == [round(0.8 * 1024)] * 3
    assert not torch.equal(known[0], known[1])
    assert torch.equal(masks.make("random", 32, 3, seed=1), known)
    assert not torch.equal(masks.make("random", 32, 3, seed=2), known)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("top", slice(0, 7), slice(None)),
        ("bottom", slice(21, 28), slice(None)),
        ("left", slice(None), slice(0, 7)),
        ("right", slice(None), slice(21, 28)),
    ],
)
def test_sides(name: str, rows: slice, columns: slice) -> None:
    hole = ~masks.make(name, 28, share=0.25)[0, 0]
    assert hole[rows, columns].all()
    assert hole.sum() == 7 * 28
    assert (~masks.make(name, 28)).sum() == 14 * 28


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("name", masks.MASKS)
def test_masks_leave_something_to_do_and_to_go_by(name: str, share: float) -> None:
    masks.check(masks.make(name, 28, 2, share=share))


def test_mask_of_a_file(tmp_path: Path) -> None:
    """White is missing."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[3:5, 7] = [127, 128]
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert (~masks.make(str(tmp_path / "mask.png"), 28)).nonzero().tolist() == [[0, 0, 4, 7]]
