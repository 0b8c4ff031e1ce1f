"""`fastdcgan sample`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.cli import main
from fastdcgan.dcgan import load_generator, sample
from fastdcgan.dcgan.images import to_pixels


def stray(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_command_writes_what_the_name_says(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [str(trained_run), "--device", "cpu", "--count", "5", "--seed", "7"]
    for out in ("a.npy", "a.npz", "a.png"):
        assert main(["sample", *options, "--out", out]) == 0
        assert capsys.readouterr().out == f"{out}\n"
    expected = to_pixels(sample(load_generator(trained_run), 5, 7))
    assert np.array_equal(np.load("a.npy"), expected)
    assert np.array_equal(np.load("a.npz")["images"], expected)

    assert main(["sample", *options, "--as-folder"]) == 0
    assert capsys.readouterr().out == "samples/digits\n"
    assert stray(tmp_path / "samples") == ["digits", *(f"digits/{i}.png" for i in range(5))]

    main(["sample", *options, "--ema", "--out", "ema.npy"])
    main(["sample", *options, "--truncation", "0.4", "--out", "truncated.npy"])
    assert np.array_equal(np.load("ema.npy"), to_pixels(sample(load_generator(trained_run, ema=True), 5, 7)))
    assert np.array_equal(np.load("truncated.npy"), to_pixels(sample(load_generator(trained_run), 5, 7, 0.4)))
    assert len({Path(f"{name}.npy").read_bytes() for name in ("a", "ema", "truncated")}) == 3


def test_command_per_class(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = trained_run / "checkpoints" / "step-00000004.safetensors"
    out = tmp_path / "set"
    pairs = [f"early={early}", f"late={trained_run}"]
    assert main(["sample", "--per-class", *pairs, "--count", "3", "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert stray(out) == sorted(["early", "late", *(f"{c}/{i}.png" for c in ("early", "late") for i in range(3))])
    for name, place in (("early", early), ("late", trained_run)):
        found = np.stack([np.asarray(Image.open(path)) for path in sorted((out / name).iterdir())])
        assert np.array_equal(found, to_pixels(sample(load_generator(place), 3))[..., 0])
