"""`fastdcgan train`: small runs from end to end, resumed and interrupted ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.cli import main
from fastdcgan.dcgan import checkpoint
from tests.dcgan.conftest import TINY_OPTIONS

SMALL = [*TINY_OPTIONS, "--batch-size", "16", "--samples", "9"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 20 colour pictures of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(20):
        pixels = random.integers(0, 255, (30 + i, 50 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_train_sample_resume(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.jpg").write_text("no picture")
    run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    assert main(["train", str(photos), *SMALL, "--epochs", "2", "--out", run, "--cache", cache]) == 0
    said = capsys.readouterr().out
    assert "1 of 21 files could not be read" in said
    assert "broken.jpg" in said
    assert "20 images of 28x28x3, batch 16, fp32 on cpu, steps 0 to 2" in said
    assert f"Done at step 2. Samples, metrics and checkpoints are in {run}" in said

    grid, again, other = (tmp_path / f"{name}.png" for name in ("grid", "again", "other"))
    assert main(["sample", run, "--count", "9", "--out", str(grid), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(grid)
    with Image.open(grid) as picture:
        assert picture.size == (92, 92)
        assert picture.mode == "RGB"
    main(["sample", str(checkpoint.find(run)), "--count", "9", "--out", str(again), "--device", "cpu"])
    main(["sample", run, "--count", "9", "--out", str(other), "--device", "cpu", "--seed", "1"])
    assert grid.read_bytes() == again.read_bytes() != other.read_bytes()

    assert (
        main(["sample", run, "--count", "11", "--separate", "--out", str(tmp_path / "files"), "--device", "cpu"]) == 0
    )
    files = sorted((tmp_path / "files").iterdir())
    assert [path.name for path in files] == [f"{i:02}.png" for i in range(11)]
    with Image.open(files[3]) as one, Image.open(grid) as sheet:  # the same seed, however many
        assert np.array_equal(np.asarray(one), np.asarray(sheet)[32:60, 2:30])

    assert main(["train", str(photos), *SMALL, "--out", run, "--cache", cache]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", "--resume", run, "--epochs", "4"]) == 0
    assert "steps 2 to 4" in capsys.readouterr().out
    assert main(["train", "--resume", run, "--nz", "9"]) == 2
    assert "nz is 9: the checkpoint's is 8" in capsys.readouterr().err


def test_ctrl_c(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fastdcgan", "train", "digits", *SMALL, "--epochs", "1000000", "--out", str(run)]
    process = subprocess.Popen(
        [
            *command,
            "--log-every",
            "1",
            "--sample-every",
            "1000000",
            "--checkpoint-every",
            "1000000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (run / "metrics.csv").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    found = re.search(r"Stopped at step (\d+)\. Go on with: fastdcgan train --resume (\S+)", out)
    assert found, out
    assert checkpoint.find(found[2]) == checkpoint.path_at(run, int(found[1]))


def test_divergence_exits_with_1(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(photos), *SMALL, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--lr-g", "1e30", "--lr-d", "1e30", "--epochs", "30"]) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "lower --lr-g and --lr-d" in err
