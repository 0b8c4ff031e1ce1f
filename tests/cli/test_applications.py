"""The commands features, evaluate and style: small runs from end to end, and what they say to bad input."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastdcgan.cli import main
from fastdcgan.dcgan import TrainConfig, Trainer, augmentation, checkpoint, judge, patches
from fastdcgan.dcgan.classify import LinearSVM
from tests.dcgan.conftest import TINY


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` in three classes, their squares in three corners, and a `run` of four steps on them."""
    place = tmp_path_factory.mktemp("applications")
    random = np.random.default_rng(0)
    for name, top, left in (("a", 2, 2), ("b", 2, 18), ("c", 18, 2)):
        (place / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 60, (28, 28), dtype=np.uint8)
            pixels[top : top + 8, left : left + 8] += 190
            Image.fromarray(pixels).save(place / "images" / name / f"{i:02}.png")
    config = TrainConfig(
        data=str(place / "images"),
        out=str(place / "run"),
        cache=str(place / "cache"),
        **TINY,
        batch_size=16,
        max_steps=4,
        checkpoint_every=2,
        holdout=4,
        ema=0.5,
    )
    Trainer(config).run()
    return place


def command(place: Path, line: str, out: Path) -> list[str]:
    words = [str(place / word[1:]) if word.startswith("@") else word for word in line.split()]
    return [*words, "--device", "cpu", "--out", str(out)]


def test_features_are_exported(place: Path, tmp_path: Path) -> None:
    """With labels where there are some; of layers by name; without labels for a folder without classes."""
    assert main(command(place, "features @run", tmp_path)) == 0
    with np.load(tmp_path / "features.npz") as found:
        assert found["features"].shape == (60, 16 * (4 + 8))
        assert found["labels"].tolist() == [0] * 20 + [1] * 20 + [2] * 20
        assert found["classes"].tolist() == ["a", "b", "c"]
    assert main(command(place, "features @run @images/a --layers image --pool 2", tmp_path)) == 0
    with np.load(tmp_path / "features.npz") as found:
        assert found["features"].shape == (20, 4 * 4)
        assert "labels" not in found
    for layers, dimensions in (("z", 8), ("generator.up1,generator.project", 16 * (4 + 8))):
        assert main(command(place, f"features @run --layers {layers} --search-steps 2", tmp_path)) == 0
        with np.load(tmp_path / "features.npz") as found:
            assert found["features"].shape == (60, dimensions)


def test_features_fit_and_eval(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "_SAMPLES", 2000)
    line = "features @run --fit --eval --export --labels 3 12 1000 --draws 2"
    assert main(command(place, line, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "% of 15 test images right, with C = " in said
    svm = LinearSVM.load(tmp_path / "classifier.npz")
    with np.load(tmp_path / "features.npz") as found:
        assert svm.accuracy(found["features"], found["labels"]) > 0.9
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert result["held_out_of_training"] is True
    assert result["test_images"] == 15
    scores = {(score["features"], score["labels"]): score for score in result["scores"]}
    names = ("trained D", "random D", "raw pixels", "k-means of patches")
    assert list(scores) == [(name, count) for name in names for count in (3, 12, 45)]
    assert scores["trained D", 12]["mean"] > 0.8
    assert scores["raw pixels", 3]["dimensions"] == 28 * 28
    table = (tmp_path / "accuracy.md").read_text()
    assert table in said
    assert "| features | dimensions | 3 labels | 12 labels | 45 labels |" in table


def test_runs_that_held_nothing_out(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = checkpoint.load(checkpoint.find(place / "run"))
    saved.state["config"]["holdout"] = 0
    checkpoint.save(tmp_path / "seen.safetensors", saved)
    seen, data = str(tmp_path / "seen.safetensors"), str(place / "images")
    assert main(["features", seen, "--fit", "--out", str(tmp_path / "out")]) == 2
    assert "name them" in capsys.readouterr().err  # a checkpoint's word is not enough
    assert main(["features", seen, data, "--fit", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "The networks have seen the test images too" in said
    assert "% of 12 test images right" in said


def test_augmentation(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def spy(pixels: np.ndarray, labels: np.ndarray, classes: int, **settings: object) -> judge.Classifier:
        given.append((len(pixels), len(labels), settings["title"]))
        return judge.Classifier(1, classes).eval()

    monkeypatch.setattr(judge, "train_classifier", spy)
    monkeypatch.setattr(
        augmentation, "Settings", functools.partial(augmentation.Settings, generated=30, steps=2, gan_steps=2)
    )
    assert main(command(place, "features @run --augment --per-class 4 --draws 2", tmp_path)) == 0
    # 12 labels; with 30 of the DCGANs per class, 15 of the run's and 16 of the 33 real images that are left.
    assert [(pixels, title.partition(", ")[0]) for pixels, _, title in given] == [
        (count, f"draw {draw}") for draw in (0, 1) for count in (12, 2 * 12 + 30, 12 + 15, 12 + 16)
    ]
    assert all(pixels == labels for pixels, labels, _ in given)
    result = json.loads((tmp_path / "augmentation.json").read_text())
    assert list(result["accuracies"]) == [
        augmentation.ALONE,
        augmentation.PER_CLASS,
        augmentation.PSEUDO,
        augmentation.REAL,
        augmentation.SVM,
    ]
    assert np.mean(result["accuracies"][augmentation.SVM]) > 0.8
    assert "augmentation.md" in {path.name for path in tmp_path.iterdir()}
    assert f"| {augmentation.PSEUDO} | " in capsys.readouterr().out


def test_evaluate_all(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "train_classifier", functools.partial(judge.train_classifier, steps=20, batch=16))
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    assert main(["evaluate", str(run), "--all", "--ema", "--count", "20", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "20 generated images against 15 held-out ones" in said
    result = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert [row["step"] for row in result["checkpoints"]] == [2, 4]
    assert all(row["fid"] is None and row["frechet"] > 0 for row in result["checkpoints"])
    with Image.open(run / "evaluation" / "evaluation.png") as plot:
        assert plot.size == (960, 720)
    first = checkpoint.all_of(run)[0]
    assert main(["evaluate", str(first), "--count", "20", "--device", "cpu", "--out", str(tmp_path / "one")]) == 0
    assert [row["step"] for row in json.loads((tmp_path / "one" / "evaluation.json").read_text())["checkpoints"]] == [2]


@pytest.mark.parametrize("data", ["images/a", "single/a"])
def test_evaluate_without_classes(data: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a flat folder, and of one whose folders have too few images to be learned."""
    for path in (place / "images").rglob("*.png"):
        folder = tmp_path / "single" / path.parent.name / path.stem
        folder.mkdir(parents=True)
        shutil.copyfile(path, folder / path.name)
    (tmp_path / "images").symlink_to(place / "images")
    images, out = str(tmp_path / data), tmp_path / "out"
    assert main(["evaluate", str(place / "run"), images, "--all", "--count", "20", "--out", str(out)]) == 0
    assert "in the feature space of the discriminator of step 4" in capsys.readouterr().out
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["held_out_images"], result["classifier_accuracy"]) == (5, None)
    assert all(row["frechet"] > 0 for row in result["checkpoints"])
    assert not (out / "classifier.safetensors").exists()


@pytest.mark.parametrize(("how", "size"), [("--size 40", (40, 20)), ("--optimize z", (28, 28))])
def test_style(how: str, size: tuple[int, int], place: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    arguments = ["style", str(place / "run"), str(tmp_path / "wide.png"), str(tmp_path / "wide.png"), *how.split()]
    assert main([*arguments, "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out" / "sheet.png")]) == 0
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size == (3 * size[0] + 2 * 4, size[1])
        assert sheet.mode == "L"


@pytest.fixture
def bad(place: Path, tmp_path: Path) -> Path:
    """Beside the good things, all kinds of bad ones."""
    for name in ("run", "images"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "1.png").write_text("no image")
        (tmp_path / "single" / name).mkdir(parents=True)
        shutil.copyfile(place / "images" / name / "00.png", tmp_path / "single" / name / "1.png")
    saved = checkpoint.load(checkpoint.find(place / "run"))
    for name, change in (("size", {"image_size": 64}), ("channels", {"channels": 3})):
        saved.state["config"] = {**saved.state["config"], **change}
        checkpoint.save(tmp_path / f"{name}.safetensors", saved)
        saved.state["config"] = {**saved.state["config"], "image_size": 28, "channels": 1}
    return tmp_path


PICTURE = "@images/a/00.png"


@pytest.mark.parametrize("name", ["features", "evaluate", "style"])
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("@nowhere", "there is no checkpoint"),
        ("@empty", "has no checkpoints"),
        ("@text", "is damaged, or no checkpoint"),
        ("@other.safetensors", "is no checkpoint of fastdcgan"),
        ("@size.safetensors", "does not fit this network"),
        ("@channels.safetensors", "does not fit this network"),
        ("@run --device tpu", "device is 'tpu'"),
    ],
)
def test_wrong_checkpoints(name: str, which: str, message: str, bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{name} {which}" + (f" {PICTURE} {PICTURE}" if name == "style" else "")
    fails(line, message, bad, capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("features @run @nowhere", "is no folder, and no built-in set"),
        ("features @run @empty", "has no images"),
        ("features @run @broken", "could be read"),
        ("features @run @images/a --fit", "has no classes"),
        ("features @run @images/a --eval", "has no classes"),
        ("features @run @images/a --augment", "has no classes"),
        ("features @run @single --eval", "the class a of"),
        ("features @run --layers lips", "there is no layer 'lips'"),
        ("features @run --layers z,image", "expected layers of one network"),
        ("features @run --layers generator.lips", "there is no layer 'lips'"),
        ("features @run --pool -1", "--pool is -1"),
        ("features @run --draws 0 --eval", "--draws is 0"),
        ("features @run --labels 0 --eval", "--labels is 0"),
        ("features @run --augment --per-class 1", "per_class is 1"),
        ("features @run --augment --per-class 16", "the smallest class has 15 images"),
        ("evaluate @run @nowhere", "is no folder, and no built-in set"),
        ("evaluate @run @broken", "could be read"),
        ("evaluate @run @single", "0 of 2 images are held out: expected at least 4"),
        ("evaluate @run --count 3", "--count is 3"),
        (f"style @run @nowhere.png {PICTURE}", "there is no picture"),
        (f"style @run {PICTURE} @text", "is no picture that can be read"),
        (f"style @run {PICTURE} @broken/a/1.png", "is no picture that can be read"),
        (f"style @run {PICTURE} {PICTURE} --layers lips", "there is no layer 'lips'"),
        (f"style @run {PICTURE} {PICTURE} --size 8", "--size is 8"),
        (f"style @run {PICTURE} {PICTURE} --out style.jpg", "--out is style.jpg: expected the name of a file .png"),
        (f"style @run {PICTURE} {PICTURE} --steps 0", "--steps is 0"),
        (f"style @run {PICTURE} {PICTURE} --style-weight -1", "--style-weight is -1.0: expected at least 0"),
    ],
)
def test_wrong_input(line: str, message: str, bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(line, message, bad, capsys)


@pytest.mark.parametrize(
    ("line", "out"),
    [
        ("features @run", "text"),
        ("features @run", "text/below"),
        ("evaluate @run", "text"),
        ("evaluate @run", "text/below"),
        (f"style @run {PICTURE} {PICTURE}", "empty"),
        (f"style @run {PICTURE} {PICTURE}", "text/below"),
    ],
)
def test_places_that_can_not_be_written(line: str, out: str, bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the way of a folder, and a folder in the way of a file."""
    assert main(command(bad, line, bad / out)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert (bad / "text").read_text() == "text"
    assert not any((bad / "empty").iterdir())


def fails(line: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, and no file."""
    out = place / "out"
    device = [] if "--device" in line else ["--device", "cpu"]
    words = [str(place / word[1:]) if word.startswith("@") else word for word in line.split()]
    given = [] if "--out" in line else ["--out", str(out / "sheet.png" if words[0] == "style" else out)]
    assert main([*words, *device, *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not [path for path in out.rglob("*") if path.is_file()]
