"""`fastdcgan inpaint`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.cli import main


@pytest.mark.parametrize("mask", ["centre", "random", "top"])
def test_command(mask: str, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, files = tmp_path / "filled.png", tmp_path / "files"
    options = ["--mask", mask, "--count", "5", "--steps", "3", "--device", "cpu", "--separate", str(files)]
    assert main(["inpaint", str(trained_run), *options, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(out)
    assert f"PSNR over the missing pixels of 5 images of 28x28, mask {mask}:" in said
    figures = [float(line.split()[-2]) for line in said if line.endswith(" dB")]
    assert len(figures) == 3
    assert all(np.isfinite(figures))
    assert "The run was trained on all of digits: these are images that it has seen." in said
    with Image.open(out) as picture:
        assert picture.size == (5 * 30 + 2, 3 * 30 + 2)
    assert sorted(path.name for path in files.iterdir()) == [f"{i}.png" for i in range(5)]


def test_command_on_a_folder_and_a_mask_of_a_file(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (50 * i, 90, 10)).save(folder / f"{i}.png")
    (folder / "broken.png").write_text("no picture")
    mask = np.zeros((28, 28), np.uint8)
    mask[10:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--mask", str(tmp_path / "mask.png"), "--steps", "2", "--device", "cpu"]
    out = tmp_path / "filled.png"
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["inpaint", str(trained_run), str(folder), *options, *cache, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 of 4 files could not be read" in said
    assert "of 3 images of 28x28" in said
    assert "trained on" not in said


@pytest.mark.parametrize(("levels", "words"), [([0], ["1 of 1 without error"]), ([0, 200], ["dB", "1 of 2 without"])])
def test_images_of_one_colour(
    levels: list[int], words: list[str], trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean of a black image's known pixels fills it in without any error."""
    for level in levels:
        pixels = np.zeros((28, 28), np.uint8)
        pixels[:14] = level
        save_to = tmp_path / "images" / f"{level}.png"
        save_to.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(save_to)
    options = ["--mask", "top", "--steps", "1", "--device", "cpu", "--cache", str(tmp_path / "cache")]
    command = ["inpaint", str(trained_run), str(tmp_path / "images"), *options, "--out", str(tmp_path / "filled.png")]
    assert main(command) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "mean of the image's known pixels" in line]
    assert all(word in line for word in words)
    assert "inf" not in line.removesuffix("filled.png")
