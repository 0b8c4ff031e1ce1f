"""The classifier whose features judge a generator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastdcgan.dcgan import judge, tensor_files
from tests.dcgan.conftest import squares


def test_classifier_learns(tmp_path: Path) -> None:
    """On large images than it was made for too; the same bits again."""
    pixels, labels = squares(60)
    net = judge.train_classifier(pixels, labels, 3, steps=60, batch=16)
    assert judge.accuracy(net, *squares(30, seed=1)) > 0.9
    assert judge.accuracy(net, pixels, np.roll(labels, 1)) < 0.1
    again = judge.train_classifier(pixels, labels, 3, steps=60, batch=16)
    assert torch.equal(net.head.weight, again.head.weight)


def test_shifts() -> None:
    x = torch.arange(36.0).view(1, 1, 6, 6).expand(200, 1, 6, 6)
    moved = judge._shifted(x, 2, torch.Generator().manual_seed(0))
    centres = {(round(value) // 6, round(value) % 6) for value in moved[:, 0, 2, 2].tolist()}
    assert centres == {(row, column) for row in range(5) for column in range(5)}
    for picture in moved[:, 0]:  # moved as a whole
        assert torch.equal(picture[2:4, 2:4] - picture[2, 2], x[0, 0, 2:4, 2:4] - x[0, 0, 2, 2])
    assert torch.equal(judge._shifted(x, 0, torch.Generator()), x)


def test_classifier_is_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def quickly(pixels: np.ndarray, labels: np.ndarray, classes: int, **settings: object) -> judge.Classifier:
        trained.append(classes)
        return judge.Classifier(pixels.shape[3], classes).eval()

    monkeypatch.setattr(judge, "train_classifier", quickly)
    pixels, labels = squares(12)
    path = tmp_path / "deep" / "classifier.safetensors"
    first = judge.cached_classifier(path, pixels, labels, 3)
    again = judge.cached_classifier(path, pixels, labels, 3)
    assert torch.equal(first.head.weight, again.head.weight)
    assert trained == [3]
    judge.cached_classifier(path, pixels, np.roll(labels, 1), 3)
    assert "was trained on other images" in capsys.readouterr().out
    path.write_text("broken")
    judge.cached_classifier(path, pixels, labels, 3)
    assert "can't be read" in capsys.readouterr().out
    assert len(trained) == 3
    whole = path.read_bytes()
    for at in (len(whole) - 1, len(whole) - 3000):  # a bit of a weight
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        judge.cached_classifier(path, pixels, labels, 3)
        assert "its checksum is another" in capsys.readouterr().out
    tensors, identity = tensor_files.read(path)
    identity.pop(tensor_files.CHECKSUM)
    tensor_files.write(path, {**tensors, "head.weight": tensors["head.weight"] * torch.nan}, identity)
    judge.cached_classifier(path, pixels, labels, 3)
    assert "head.weight has values that are not finite" in capsys.readouterr().out
    assert len(trained) == 6
