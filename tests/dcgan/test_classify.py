"""The linear SVM, and draws of labels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastdcgan.dcgan import classify
from fastdcgan.dcgan.classify import LinearSVM, balanced
from tests.dcgan.conftest import clouds


@pytest.mark.parametrize("classes", [2, 3])
def test_svm(classes: int, tmp_path: Path) -> None:
    svm = LinearSVM.fit(*clouds(60, 5, classes))
    x, labels = clouds(300, 5, classes, seed=1)
    assert svm.accuracy(x, labels) > 0.95
    assert svm.accuracy(x, np.roll(labels, 1)) < 0.1
    svm.save(tmp_path / "svm.npz", note=np.arange(3))
    again = LinearSVM.load(tmp_path / "svm.npz")
    assert np.array_equal(again.predict(x), svm.predict(x))
    with pytest.raises(ValueError, match=r"expected \[N, 5\]"):
        svm.predict(x[:, :4])


def test_svm_of_fewer_points_than_dimensions_is_the_same() -> None:
    """Fitting in the space of the points against fitting with all dimensions."""
    from sklearn.svm import LinearSVC

    x, labels = clouds(12, 40)
    found = LinearSVM.fit(x, labels)
    centred = x - x.mean(0)
    scaled = centred / np.sqrt(np.square(centred).sum(1).mean())
    direct = LinearSVC(C=found.c, tol=1e-7, max_iter=100_000).fit(scaled, labels)
    np.testing.assert_allclose(found.decision(x), direct.decision_function(scaled), atol=2e-3)


def test_svm_chooses_its_regularisation() -> None:
    """Strong where the classes lie along the longest direction and the rest is noise, weak where they lie along a short
    one; with one label of each class there is nothing to choose by."""
    x = np.random.default_rng(0).normal(size=(200, 100))
    x[:, 0] *= 10
    assert LinearSVM.fit(x, x[:, 0] > 0).c == 0.1
    x[:, 0] *= 3
    assert LinearSVM.fit(x[:, :10], x[:, 1] > 0).c == 10.0
    assert LinearSVM.fit(*clouds(3, 5)).c == 1.0


def test_svm_of_one_class() -> None:
    with pytest.raises(ValueError, match="the labels are of 1 class: expected at least 2"):
        LinearSVM.fit(np.zeros((4, 2)), np.zeros(4, int))


def test_file_that_is_no_classifier(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    os.mkfifo(tmp_path / "pipe.npz")
    good = {"weight": np.zeros((2, 3)), "bias": np.zeros(2), "classes": np.arange(2), "c": 1.0}
    np.savez(tmp_path / "cut.npz", **good)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
    np.savez(tmp_path / "nan.npz", **{**good, "weight": np.full((2, 3), np.nan)})
    changes = {"bias": np.zeros(3), "weight": np.array("x"), "classes": np.zeros((2, 1), int), "c": np.zeros(2)}
    for key, value in changes.items():
        np.savez(tmp_path / f"{key}.npz", **{**good, key: value})
    for name in (
        "other.npz",
        "text.npz",
        "none.npz",
        "pipe.npz",
        "cut.npz",
        "nan.npz",
        *(f"{key}.npz" for key in changes),
    ):
        with pytest.raises(ValueError, match=f"{name} is no classifier"):
            LinearSVM.load(tmp_path / name)


def test_balanced_draws() -> None:
    labels = np.array([0] * 50 + [1] * 50 + [2] * 3)
    chosen = balanced(labels, 30, np.random.RandomState(0))
    assert len({*chosen.tolist()}) == 30
    counts = np.bincount(labels[chosen])
    assert counts[2] == 3
    assert sorted(counts[:2].tolist()) == [13, 14]
    assert not np.array_equal(chosen, balanced(labels, 30, np.random.RandomState(1)))
    for count in (2, 104):
        with pytest.raises(ValueError, match=f"can't draw {count} labels"):
            balanced(labels, count, np.random.RandomState(0))


def test_few_bytes_that_unpack_to_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "_MOST_BYTES", 100_000)
    good = {"bias": np.zeros(2), "classes": np.arange(2), "c": 1.0}
    np.savez_compressed(tmp_path / "bomb.npz", weight=np.zeros((2, 7000)), **good)
    with pytest.raises(ValueError, match="bytes when unpacked, of at most 100000"):
        LinearSVM.load(tmp_path / "bomb.npz")
    np.savez_compressed(tmp_path / "small.npz", weight=np.zeros((2, 7000), np.float32), **good)
    LinearSVM.load(tmp_path / "small.npz")
