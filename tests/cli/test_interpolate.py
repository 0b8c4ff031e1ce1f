"""`fastdcgan interpolate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastdcgan.cli import main


def test_command(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [str(trained_run), "--device", "cpu"]
    for arguments, out, size in (
        (["--seeds", "3", "0:5", "7", "--steps", "6"], "walk.png", (182, 62)),
        (["--seeds", "3", "4", "--out", "there/walk.gif", "--steps", "3"], "there/walk.gif", (140, 140)),
        (["--arithmetic", "1,2 - 3 + 4"], "arithmetic.png", (3 * 32 + 3 * 14 + 92, 107)),
        (["--ema", "--out", "average.png"], "average.png", (8 * 30 + 2, 4 * 30 + 2)),
    ):
        assert main(["interpolate", *options, *arguments]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        with Image.open(out) as picture:
            assert picture.size == size
