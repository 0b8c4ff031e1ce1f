"""Pictures from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.dcgan import pictures


def test_pictures_from_files(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = (255, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    wide = pictures.load_picture(tmp_path / "wide.png", 3, 80)
    assert wide.shape == (1, 3, 40, 80)
    assert wide[0, :, 20, 10].tolist() == [-1, -1, -1]
    assert wide[0, :, 20, 70].tolist() == [1, -1, 1]
    square = pictures.load_picture(tmp_path / "wide.png", 1, 16, square=True)
    assert square.shape == (1, 1, 16, 16)
    sheet = np.asarray(pictures.beside([wide, wide[:, :, :10]], gap=3))
    assert sheet.shape == (40, 163, 3)
    assert (sheet[:, 80:83] == 255).all()
    assert (sheet[:15, 83:] == 255).all()
    assert (sheet[15:25, 90] == 0).all()
    (tmp_path / "text.png").write_text("text")
    for name, message in (("none.png", "there is no picture"), ("text.png", "is no picture that can be read")):
        with pytest.raises(ValueError, match=message):
            pictures.load_picture(tmp_path / name, 3, 16)
