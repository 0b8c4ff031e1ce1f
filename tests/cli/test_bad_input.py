"""What the commands on a trained run say to input that they can't take: one line, exit code 2, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.cli import main
from fastdcgan.dcgan import TrainConfig, Trainer, checkpoint

GIVEN = {"place", "file", "broken", "empty", "mask.png", "white.png"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with files that are not what the commands want."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("file").write_text("something")
    Path("empty").mkdir()
    Path("broken").mkdir()
    for name in ("a.png", "b.jpg"):
        Path("broken", name).write_text("no picture")
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save("mask.png")
    Image.new("L", (28, 28), 255).save("white.png")
    return folder


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on other images than `trained_run`: 32x32 in colour."""
    run = tmp_path_factory.mktemp("colour") / "run"
    config = TrainConfig(
        data="digits", channels=3, nz=8, ngf=4, ndf=4, batch_size=16, max_steps=1, samples=4, device="cpu", out=str(run)
    )
    Trainer(config).run()
    return run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        # No checkpoint, or a wrong one
        ("sample nowhere", "there is no checkpoint and no run's folder nowhere"),
        ("sample file", "file is damaged, or no checkpoint"),
        ("sample empty", "empty has no checkpoints"),
        ("sample WRONG", "does not fit this network"),
        ("sample PLAIN --ema", "has no moving average"),
        ("sample --per-class a=RUN b=nowhere --out set", "there is no checkpoint and no run's folder nowhere"),
        ("sample --per-class a=RUN b=COLOUR --out set", "b makes images of 32x32x3: expected 28x28x1, as a does"),
        ("interpolate nowhere", "there is no checkpoint and no run's folder nowhere"),
        ("interpolate file", "file is damaged, or no checkpoint"),
        ("interpolate PLAIN --ema", "has no moving average"),
        ("inpaint nowhere", "there is no checkpoint and no run's folder nowhere"),
        ("inpaint empty", "empty has no checkpoints"),
        ("inpaint WRONG", "does not fit this network"),
        # Images and masks
        ("inpaint RUN empty", "empty has no images"),
        ("inpaint RUN broken", "none of the 2 files in broken could be read"),
        ("inpaint RUN file", "file is no folder, and no built-in set"),
        ("inpaint RUN --mask nowhere.png", "there is no mask nowhere.png: expected a file, or one of centre"),
        ("inpaint RUN --mask file", "the mask file can't be read"),
        ("inpaint RUN --mask mask.png", "the mask mask.png is 32x32: expected 28x28, as the images are"),
        ("inpaint RUN --mask white.png", "the mask leaves nothing known"),
        ("inpaint RUN --mask mask.png --share 0.5", "the mask mask.png is a file: expected no share"),
        ("inpaint RUN --share 1", "--share is 1.0: expected more than 0 and below 1"),
        # Where to write to
        ("sample RUN --out file/a.png", "file"),
        ("sample RUN --out empty", "--out is empty: expected the name of a file .png, .npy or .npz"),
        ("sample RUN --out samples.jpg", "--out is samples.jpg: expected the name of a file .png, .npy or .npz"),
        ("sample RUN --separate --out broken", "broken has something in it: expected a new or an empty folder"),
        ("sample RUN --separate --out file", "file has something in it: expected a new or an empty folder"),
        ("sample RUN --as-folder --out file", "file"),
        ("sample --per-class a=RUN --out broken", "broken has something in it"),
        ("interpolate RUN --out walk.jpg", "--out is walk.jpg: expected the name of a file .png or .gif"),
        ("interpolate RUN --arithmetic 1-2 --out a.gif", "--out is a.gif: expected the name of a file .png"),
        ("interpolate RUN --out file/a.png", "file"),
        ("interpolate RUN --out file/a.gif", "file"),
        ("inpaint RUN --out file/a.png", "file"),
        ("inpaint RUN --out inpainted", "--out is inpainted: expected the name of a file .png"),
        ("inpaint RUN --separate broken", "broken has something in it"),
        # Numbers and names
        ("sample RUN --count 0", "--count is 0: expected at least 1"),
        ("sample RUN --truncation -1", "truncation is -1.0: expected more than 0"),
        ("sample RUN --count 10001", "a grid of 10001 images: expected at most 10000"),
        ("sample --per-class a", "--per-class has 'a': expected NAME=CHECKPOINT"),
        ("sample --per-class =RUN", "expected NAME=CHECKPOINT"),
        ("sample --per-class a=RUN a=RUN", "--per-class names a twice"),
        ("sample --per-class a/b=RUN", "the class 'a/b' can't be a folder"),
        ("sample --per-class ..=RUN", "the class '..' can't be a folder"),
        ("interpolate RUN --seeds 1", "a walk between 1 inputs: expected at least 2"),
        (
            "interpolate RUN --seeds 0:999999999 1",
            "the number of an image is 999999999: expected at least 0 and at most 99",
        ),
        (f"interpolate RUN --seeds {10**23} 1", "a seed is 100000000000000000000000: expected at least 0 and at most"),
        (
            f"interpolate RUN --arithmetic {10**23}-1",
            "a seed is 100000000000000000000000: expected at least 0 and at most",
        ),
        ("interpolate RUN --seeds 1 two", "'two' names no input: expected a seed, or SEED:NUMBER"),
        ("sample ABOVE --as-folder --out set", "was trained on '/x/..': expected the name of a folder"),
        ("sample --per-class a=RUN --as-folder", "expected neither --separate nor --as-folder with it"),
        ("interpolate RUN --arithmetic 1-2 --steps 9", "--steps is of a walk: expected none with --arithmetic"),
        ("interpolate RUN --noise 1", "--noise is around a result: expected --arithmetic with it"),
        ("interpolate RUN --steps 1", "steps is 1: expected at least 2"),
        ("interpolate RUN --steps 0 --out walk.gif", "steps is 0: expected at least 1"),
        ("interpolate RUN --arithmetic 1*2", "'1*2' has '1*2': expected something like"),
        ("interpolate RUN --arithmetic 1+2 --noise -1", "--noise is -1.0: expected at least 0"),
        ("inpaint RUN --count 0", "--count is 0: expected at least 1"),
        ("inpaint RUN --steps 0", "--steps is 0: expected at least 1"),
        ("inpaint RUN --restarts 0", "--restarts is 0: expected at least 1"),
        *((f"{command} RUN --device tpu", "device is 'tpu'") for command in ("sample", "interpolate", "inpaint")),
    ],
)
def test_one_line(
    command: str,
    message: str,
    place: Path,
    trained_run: Path,
    colour_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = checkpoint.load(checkpoint.find(trained_run), "generator", "discriminator")
    checkpoint.save(tmp_path / "plain.safetensors", saved)
    saved.state["config"]["data"] = "/x/.."
    checkpoint.save(tmp_path / "above.safetensors", saved)
    saved.state["config"]["nz"] += 1
    checkpoint.save(tmp_path / "wrong.safetensors", saved)
    names = {
        "RUN": str(trained_run),
        "COLOUR": str(colour_run),
        "PLAIN": str(tmp_path / "plain.safetensors"),
        "ABOVE": str(tmp_path / "above.safetensors"),
        "WRONG": str(tmp_path / "wrong.safetensors"),
    }
    for name, path in names.items():
        command = command.replace(name, path)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(path for path in tmp_path.rglob("*")) == before
