"""A run's evaluation, and Inception's FID."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdcgan.dcgan import CheckpointError, TrainConfig, Trainer, checkpoint, evaluation, judge, load_trained
from fastdcgan.dcgan.data import Images, Labelled
from fastdcgan.dcgan.feature_report import Split

# --- the classifier --------------------------------------------------------------------------------------------------
from tests.dcgan.conftest import squares

# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split() -> Split:
    pixels, labels = squares(120)
    return Split(Labelled(Images(pixels), labels, list("abc")), np.arange(120) % 4 == 3)


def test_evaluation_of_a_run(
    split: Split,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Checkpoints of noise are far from the images, and the images themselves are near."""
    monkeypatch.setattr(judge, "train_classifier", functools.partial(judge.train_classifier, steps=60, batch=16))
    config = dataclasses.replace(config, max_steps=4, checkpoint_every=2)
    Trainer(config, split.data.images).run()
    yardstick = evaluation.Yardstick.make(split, tmp_path / "out", torch.device("cpu"))
    assert yardstick.accuracy > 0.9
    paths = sorted((Path(config.out) / "checkpoints").iterdir())
    found = evaluation.evaluate(paths, yardstick, count=30)
    assert [e.step for e in found] == [2, 4]
    real = evaluation.real_images(yardstick, 60)
    assert real.frechet < 0.1 * min(e.frechet for e in found)
    assert real.precision > 0.8
    assert all(e.precision < 0.5 for e in found)
    assert "step 2: Fréchet distance" in capsys.readouterr().out
    evaluation.write(found, real, yardstick, tmp_path / "out", data="squares")
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    table = evaluation.to_markdown(found, real).splitlines()
    assert table[-1].startswith(f"| training images | {real.frechet:.3f} |")


def test_evaluation_without_labels(split: Split, config: TrainConfig) -> None:
    """By the run's discriminator: its checkpoints of noise are further from the images than these are."""
    pixels, test = split.data.images.array, split.test
    Trainer(dataclasses.replace(config, max_steps=6, checkpoint_every=3), split.data.images).run()
    trained = load_trained(config.out)
    yardstick = evaluation.Yardstick.without_labels(pixels, test, trained, torch.device("cpu"))
    assert (yardstick.accuracy, yardstick.features.shape) == (None, (30, 8))
    found = evaluation.evaluate(checkpoint.all_of(config.out), yardstick, count=30)
    real = evaluation.real_images(yardstick, 60)
    assert [e.step for e in found] == [3, 6]
    assert real.frechet < 0.1 * min(e.frechet for e in found)
    assert min(real.precision, real.recall) > 0.7
    assert all(e.precision < 0.5 for e in found)
    with pytest.raises(ValueError, match="3 of 120 images are held out: expected at least 4"):
        evaluation.Yardstick.without_labels(pixels, np.arange(120) < 3, trained, torch.device("cpu"))


def test_damaged_checkpoints_are_passed_over(
    split: Split, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_trained(run)
    yardstick = evaluation.Yardstick.without_labels(split.data.images.array, split.test, trained, torch.device("cpu"))
    paths = checkpoint.all_of(run)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    assert [e.step for e in evaluation.evaluate(paths, yardstick, count=10)] == [1, 3]
    assert "Passed over: " in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluation.evaluate(paths[1:2], yardstick, count=10)


def test_fid_comes_from_torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, split: Split) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match="torch_fidelity"):
        evaluation.check_fid()

    def calculate_metrics(**given: object) -> dict[str, float]:
        asked.update(given)
        return {"frechet_inception_distance": 12.5}

    asked: dict[str, object] = {}
    stand_in = types.ModuleType("torch_fidelity")
    stand_in.calculate_metrics = calculate_metrics  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", stand_in)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="need torch-fidelity's weights"):
        evaluation.check_fid()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / evaluation._INCEPTION).touch()
    pixels = split.data.images.array
    assert evaluation.inception_fid(pixels[:3], pixels[3:8]) == 12.5
    generated, real = asked["input1"], asked["input2"]
    assert (len(generated), len(real)) == (5, 3)  # type: ignore[arg-type]
    image = real[0]  # type: ignore[index]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 28, 28)
    assert np.array_equal(image[2], pixels[0, :, :, 0])
