"""Which files of a folder are data: links, what is hidden, what fastdcgan wrote itself."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from fastdcgan.cli import main
from fastdcgan.dcgan.files import MARKER, mark_written, own_folder
from fastdcgan.dcgan.folders import list_images
from fastdcgan.dcgan.sources import FolderSource
from tests.dcgan.conftest import TINY_OPTIONS


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30, 30), 90).save(folder / name)
    return folder


def test_in_the_order_of_the_parts(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a/2.png", "a-b/1.png", "a/1.JPG", "a.png", "a/b/0.png")
    assert [*list_images(tmp_path).files] == ["a/1.JPG", "a/2.png", "a/b/0.png", "a-b/1.png", "a.png", "b.png"]


def test_what_is_hidden_is_neither_data_nor_a_class(tmp_path: Path) -> None:
    hidden = (".ipynb_checkpoints/1.png", "__MACOSX/a/1.png", "a/.ipynb_checkpoints/1.png", "a/._1.png", ".x/1.png")
    folder = put(tmp_path / ".photos", "a/1.png", "b/1.png", *hidden)
    (folder / ".DS_Store").touch()
    source = FolderSource(folder)
    assert [*source.files] == ["a/1.png", "b/1.png"]
    assert source.classes()[0] == ["a", "b"]
    assert source.notes == [f"Left out of {folder}: 5 hidden"]


def test_links_are_followed(tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/1.png", "elsewhere/deep/2.png", "photos/a/0.png", "single.png")
    photos = tmp_path / "photos"
    (photos / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "c").symlink_to("a", target_is_directory=True)
    (photos / "a" / "1.png").symlink_to(tmp_path / "single.png")
    files = ["a/0.png", "a/1.png", "b/1.png", "b/deep/2.png", "c/0.png", "c/1.png"]
    assert [*list_images(photos).files] == files
    assert not list_images(photos).notes


@pytest.mark.parametrize("target", [".", "..", "/", "a", "a/b"])
def test_links_in_a_circle_are_broken(target: str, tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a/b/0.png")
    (photos / "a" / "b" / "back").symlink_to(target if target == "/" else (photos / target).resolve())
    found = list_images(photos)
    assert [*found.files] == ["a/b/0.png"]
    assert found.notes == [f"Left out of {photos}: 1 links in a circle"]


def test_what_is_no_file(tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    (tmp_path / "1.png").symlink_to("nowhere.png")
    (tmp_path / "2.png").symlink_to("2.png")
    os.mkfifo(tmp_path / "3.png")
    (tmp_path / "class").symlink_to("unplugged", target_is_directory=True)
    (tmp_path / "4.avif").touch()
    found = list_images(tmp_path)
    assert [*found.files] == ["0.png"]
    assert found.notes == [
        f"Left out of {tmp_path}: 1 no files, 1 of formats that are not read",
        "3 files and folders can't be reached and are left out:",
        "  1.png (No such file or directory)",
        "  2.png (Too many levels of symbolic links)",
        "  class (No such file or directory)",
    ]


def test_folders_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a/0.png", "b/0.png")
    real = os.listdir

    def listdir(path: Path) -> list[str]:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    found = list_images(tmp_path)
    assert [*found.files] == ["a/0.png"]
    assert found.notes == ["1 files and folders can't be reached and are left out:", "  b/ (Permission denied)"]


def test_the_digest_sees_every_change(tmp_path: Path) -> None:
    digests = []
    put(tmp_path, "a/0.png", "b/0.png")
    for change in (
        lambda: None,
        lambda: os.utime(tmp_path / "a" / "0.png", ns=(1, 1)),
        lambda: put(tmp_path, "b/1.png"),
        lambda: (tmp_path / "b" / "1.png").rename(tmp_path / "a" / "1.png"),
        lambda: (tmp_path / "b" / "0.png").write_bytes(b""),
    ):
        change()
        digests.append(list_images(tmp_path).digest)
    assert len(set(digests)) == len(digests)
    assert list_images(tmp_path).digest == digests[-1]


def test_a_file_costs_its_path_and_little_more(tmp_path: Path) -> None:
    for i in range(3000):
        (tmp_path / f"{i:020}.png").touch()
    list_images(tmp_path)
    tracemalloc.start()
    found = list_images(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.files) == 3000
    assert peak / 3000 < 24 + 49 + 2 * 8 + 2 * (24 + 8) + 10  # the folder's listing, and a quarter more than the result
    tracemalloc.start()
    found = list_images(tmp_path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [*found.files] == [f"{i:020}.png" for i in range(3000)]
    assert kept / 3000 < 1.3 * (24 + 8)  # the name's bytes and a number


# --- what fastdcgan wrote ---------------------------------------------------------------------------------------------


def test_own_folders_are_no_data(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png")
    own_folder(tmp_path / "runs" / "x")
    put(tmp_path, "runs/x/samples/1.png", "runs/x/samples/2.png", "runs/other.png")
    found = list_images(tmp_path)
    assert [*found.files] == ["a/0.png", "runs/other.png"]
    assert found.notes == [f"Left out of {tmp_path}: 2 written by fastdcgan"]
    assert [*list_images(tmp_path / "runs" / "x").files] == ["samples/1.png", "samples/2.png"]  # asked for by name


def test_a_folder_of_somebody_s_stays_data(tmp_path: Path) -> None:
    """Only what fastdcgan will write there is none."""
    put(tmp_path, "photos/a/0.png")
    own_folder(tmp_path / "photos", "samples", "losses.png")
    put(tmp_path, "photos/samples/1.png", "photos/losses.png", "photos/b.png")
    assert [*list_images(tmp_path).files] == ["photos/a/0.png", "photos/b.png"]
    assert [*list_images(tmp_path / "photos").files] == ["a/0.png", "b.png"]


def test_marking_twice_is_marking_once(tmp_path: Path) -> None:
    for _ in range(2):
        mark_written(tmp_path / "a.png")
        mark_written(tmp_path / "\udcff.png")  # a name that is no text
    assert (tmp_path / MARKER).read_bytes() == b"a.png\n\xff.png\n"


def test_a_marker_that_can_not_be_read_marks_nothing(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "b/0.png")
    os.mkfifo(tmp_path / "a" / MARKER)
    (tmp_path / "b" / MARKER).mkdir()
    mark_written(tmp_path / "a" / "0.png")
    assert [*list_images(tmp_path).files] == ["a/0.png", "b/0.png"]


def test_training_and_sampling_inside_the_data(
    tmp_path: Path, trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{i}.png" for i in range(8)]
    monkeypatch.chdir(put(tmp_path / "photos", *names))
    train = ["train", ".", *TINY_OPTIONS, "--channels", "1", "--batch-size", "4", "--max-steps", "2", "--cache", "c"]
    checkpoint = next((trained_run / "checkpoints").glob("*"))
    shutil.copy(checkpoint, "x.safetensors")
    for command in (
        train,
        [*train, "--out", "."],
        ["sample", "x.safetensors", "--count", "4", "--device", "cpu"],
        ["sample", "x.safetensors", "--count", "4", "--separate", "--out", "made", "--device", "cpu"],
        ["interpolate", "x.safetensors", "--out", "w.gif", "--device", "cpu"],
        ["style", "x.safetensors", "0.png", "1.png", "--size", "32", "--steps", "1", "--device", "cpu"],
        ["inpaint", "x.safetensors", ".", "--steps", "1", "--count", "2", "--separate", "filled", "--device", "cpu"],
        train,
    ):
        assert main(command) == 0
        assert [*list_images(Path(".")).files] == names
    assert "8 images of 28x28x1" in capsys.readouterr().out
    assert main(["train", "--resume", "runs/photos-28", "--max-steps", "3"]) == 0
