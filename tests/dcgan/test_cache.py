"""When a cache of decoded images is trusted, and that it is written whole or not at all."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastdcgan.dcgan import cache, load_images
from tests.dcgan.conftest import save

Damage = Callable[[Path, Path], None]


@pytest.fixture
def cached(tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
    """A folder of images, the .npy file of its cache, and what is in it."""
    folder = tmp_path / "photos"
    for i in range(6):
        save(folder / f"{i}.png", 40 * i)
    array = np.array(load_images(str(folder), 16, 3, cache_folder=tmp_path / "cache").array)
    (path,) = (tmp_path / "cache").glob("*.npy")
    return folder, path, array


def test_a_good_cache_is_used(cached: tuple[Path, Path, np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    folder, path, array = cached
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    again = load_images(str(folder), 16, 3, cache_folder=path.parent)
    assert np.array_equal(again.array, array)
    assert isinstance(again.array, np.memmap)
    assert path.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def truncate(folder: Path, path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def flip_a_bit(folder: Path, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def swap_the_array(folder: Path, path: Path) -> None:
    np.save(path, np.zeros((6, 16, 16, 3), np.uint8))


def lose_the_header(folder: Path, path: Path) -> None:
    cache.header_path(path).unlink()


def lose_the_array(folder: Path, path: Path) -> None:
    path.unlink()


def spoil_the_header(folder: Path, path: Path) -> None:
    cache.header_path(path).write_text("{" + cache.header_path(path).read_text())


def empty_the_header(folder: Path, path: Path) -> None:
    cache.header_path(path).write_text("[]")


def change_header(path: Path, key: str, value: object) -> None:
    header = json.loads(cache.header_path(path).read_text())
    cache.header_path(path).write_text(json.dumps({**header, key: value}))


def nest_the_header(folder: Path, path: Path) -> None:
    cache.header_path(path).write_text("[" * 200_000)


def pipe_as_header(folder: Path, path: Path) -> None:
    cache.header_path(path).unlink()
    os.mkfifo(cache.header_path(path))


def huge_header(folder: Path, path: Path) -> None:
    with cache.header_path(path).open("r+b") as file:
        file.truncate(2**40)


def value_in_header(key: str, text: str) -> Damage:
    """`key` set to a value that JSON has and `text` writes."""

    def damage(folder: Path, path: Path) -> None:
        header = cache.header_path(path)
        entries = {**json.loads(header.read_text()), key: "HERE"}
        header.write_text(json.dumps(entries).replace('"HERE"', text))

    damage.__name__ = f"{key} is {text}"
    return damage


def age(folder: Path, path: Path) -> None:
    change_header(path, "version", cache.VERSION - 1)


def foreign(folder: Path, path: Path) -> None:
    change_header(path, "fingerprint", "0" * 64)


def reshaped(folder: Path, path: Path) -> None:
    change_header(path, "shape", [6, 16, 48])


def change_an_image(folder: Path, path: Path) -> None:
    save(folder / "0.png", 99)
    os.utime(folder / "0.png", ns=(1, 1))


def add_an_image(folder: Path, path: Path) -> None:
    save(folder / "9.png", 99)


def rename_an_image(folder: Path, path: Path) -> None:
    (folder / "5.png").rename(folder / "A.png")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "bytes: expected"),
        (flip_a_bit, "damaged"),
        (swap_the_array, "damaged"),
        (lose_the_header, "no readable header"),
        (lose_the_array, "can't be read"),
        (spoil_the_header, "no readable header"),
        (empty_the_header, "no readable header"),
        (age, "not a cache of version"),
        (foreign, "other images"),
        (reshaped, "expected uint8"),
        (change_an_image, "other images"),
        (add_an_image, "other images"),
        (rename_an_image, "other images"),
        (nest_the_header, "no readable header"),
        (pipe_as_header, "no readable header"),
        (huge_header, "no readable header"),
        *(
            (value_in_header(key, text), "the cache ")
            for key in ("format", "version", "fingerprint", "shape", "size", "sha256", "skipped", "left_out")
            for text in ("5", '"x"', "1e999", "null", "[1e999]", "[2, 2]", "[[]]", "{}")
            if (key, text) not in (("skipped", "{}"), ("left_out", "{}"))
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_cache_is_made_anew(
    damage, why: str, cached: tuple[Path, Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path, _ = cached
    damage(folder, path)
    capsys.readouterr()
    again = load_images(str(folder), 16, 3, cache_folder=path.parent)
    said = capsys.readouterr().out
    assert "Decoding again" in said
    assert why in said
    assert str(path) in said
    fresh = load_images(str(folder), 16, 3, cache_folder=tmp_path / "other cache")
    assert np.array_equal(again.array, fresh.array)
    capsys.readouterr()
    load_images(str(folder), 16, 3, cache_folder=path.parent)
    assert capsys.readouterr().out == ""  # and from now on it is trusted


def test_a_header_vouches_for_the_array_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes decode a folder that changes meanwhile: between the array and the header of the first one comes the
    array of the second."""
    save(tmp_path / "images" / "0.png", 10)
    save(tmp_path / "images" / "1.png", 20)
    write_header = cache.write_header

    def other_process_first(path: Path, *args: object) -> None:
        other = path.with_name("other.npy")
        np.save(other, np.zeros((3, 16, 16, 1), np.uint8))
        other.replace(path)
        write_header(path, *args)

    monkeypatch.setattr(cache, "write_header", other_process_first)
    found = load_images(str(tmp_path / "images"), 16, 1, cache_folder=tmp_path / "cache")
    assert found.array[:, 0, 0, 0].tolist() == [10, 20]
    monkeypatch.undo()
    again = load_images(str(tmp_path / "images"), 16, 1, cache_folder=tmp_path / "cache")
    assert again.array[:, 0, 0, 0].tolist() == [10, 20]
    assert "Decoding again" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x" * 255, "\N{SNOWMAN}" * 80, "\udcff"], ids=["long", "long in bytes", "no text"])
def test_names_of_folders(name: str, tmp_path: Path) -> None:
    save(tmp_path / name / "0.png", 10)
    for _ in range(2):
        assert len(load_images(str(tmp_path / name), 16, 1, cache_folder=tmp_path / "cache")) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_full_disk(tmp_path: Path, cached: tuple[Path, Path, np.ndarray]) -> None:
    """Space for all images is reserved before the first one is decoded; a cache that was there stays."""
    folder, path, _ = cached
    save(folder / "6.png", 10)
    before = {path.name: path.read_bytes() for path in path.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"for 0\.0 MB of decoded images"):
            load_images(str(folder), 16, 3, cache_folder=path.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in path.parent.iterdir()} == before
