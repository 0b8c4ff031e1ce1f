"""Distances between sets of features, the classifier whose features they are, and a run's evaluation."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan.dcgan import TrainConfig, Trainer, evaluation, judge
from fastdcgan.dcgan.data import Images, Labelled
from fastdcgan.dcgan.distances import Moments, frechet_distance, moments, precision_recall
from fastdcgan.dcgan.feature_report import Split

# --- Fréchet distance ------------------------------------------------------------------------------------------------


def covariance(dimensions: int, rank: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(dimensions, rank))
    return factor @ factor.T


def test_frechet_of_one_dimension() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2."""
    a, b = Moments(np.array([1.0]), np.array([[4.0]])), Moments(np.array([-2.0]), np.array([[25.0]]))
    assert frechet_distance(a, b) == pytest.approx(9 + 9)


@given(st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_frechet_of_commuting_covariances(dimensions: int, seed: int) -> None:
    """With common axes, the sum over them of the distances in one dimension; zeros among the variances too."""
    random = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(random.normal(size=(dimensions, dimensions)))
    s1, s2 = random.uniform(0, 3, (2, dimensions)) * (random.random((2, dimensions)) > 0.3)
    m1, m2 = random.normal(size=(2, dimensions))
    a, b = Moments(m1, (axes * s1**2) @ axes.T), Moments(m2, (axes * s2**2) @ axes.T)
    expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rank", [3, 8, 20])
def test_frechet_against_a_general_square_root(rank: int) -> None:
    """SciPy's square root of the product, where that has one; symmetric, and zero for the same."""
    from scipy.linalg import sqrtm

    a, b = Moments(np.zeros(8), covariance(8, 20, 0)), Moments(np.ones(8), covariance(8, rank, 1))
    found = frechet_distance(a, b)
    if rank >= 8:
        cross = np.trace(sqrtm(a.covariance @ b.covariance)).real
        assert found == pytest.approx(8 + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
    assert found == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(b, b) == pytest.approx(0, abs=1e-5)


def test_frechet_of_samples() -> None:
    """Of many points, near the distance of what they were drawn from."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(20_000, 3)), 2 * random.normal(size=(20_000, 3)) + 1
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(3 + 3, rel=0.05)
    with pytest.raises(ValueError, match="N of at least 2"):
        moments(a[:1])
    a[3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        moments(a)


# --- precision and recall --------------------------------------------------------------------------------------------


def test_precision_and_recall_of_halves() -> None:
    """Real: two far clusters. Generated in one of them alone: precise, half of the recall; in both and elsewhere: the
    other way round."""
    random = np.random.default_rng(0)
    here, there, elsewhere = (random.normal(size=(200, 4)) + centre for centre in (0, 100, -100))
    real = np.concatenate([here, there])
    again, other = random.normal(size=(2, 200, 4))
    one = precision_recall(real, again)
    assert one.precision > 0.85
    assert 0.4 < one.recall < 0.5
    two = precision_recall(real, np.concatenate([again, other + 100, elsewhere, elsewhere + 500]))
    assert 0.4 < two.precision < 0.5
    assert two.recall > 0.85
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, elsewhere) == (0, 0)


def test_manifolds_by_hand() -> None:
    """On a line, k=1: the balls' radii are the distances to the nearest other point."""
    real, generated = np.array([[0.0], [1.0], [5.0]]), np.array([[1.9], [2.1], [9.1], [0.5]])
    # Balls of the real: [-1, 1], [0, 2], [1, 9]; of the generated: [1.7, 2.1], [1.9, 2.3], [2.1, 16.1], [-0.9, 1.9].
    assert precision_recall(real, generated, k=1) == (0.75, 1)
    with pytest.raises(ValueError, match="k is 3 for 3 points"):
        precision_recall(real, generated)


# --- the classifier --------------------------------------------------------------------------------------------------


def squares(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square in one of three corners, which is the class."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 60, (count, 28, 28, 1), dtype=np.uint8)
    labels = np.arange(count) % 3
    for picture, label in zip(pixels, labels, strict=True):
        top, left = ((2, 2), (2, 18), (18, 2))[label]
        picture[top : top + 8, left : left + 8] += 190
    return pixels, labels


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
    real = evaluation.real_images(split, yardstick, 60)
    assert real.frechet < 0.1 * min(e.frechet for e in found)
    assert real.precision > 0.8
    assert all(e.precision < 0.5 for e in found)
    assert "step 2: Fréchet distance" in capsys.readouterr().out
    evaluation.write(found, real, yardstick, tmp_path / "out", data="squares")
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    table = evaluation.to_markdown(found, real).splitlines()
    assert table[-1].startswith(f"| training images | {real.frechet:.3f} |")


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
