"""WebDataset shards: which members are images, that what is broken is named, and runs that go on with them."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastdcgan.cli import main
from fastdcgan.dcgan import checkpoint, load_images, sources
from fastdcgan.dcgan.data import load_labelled
from fastdcgan.dcgan.shards import list_members
from tests.dcgan.conftest import TINY_OPTIONS
from tests.machine import needs_webdataset

pytestmark = needs_webdataset


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (20, 20), level).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """Five shards of one to nine images, each of a grey level of its own."""
    level = 0
    for shard, count in enumerate((9, 1, 6, 7, 3)):
        members: dict[str, bytes] = {}
        for _ in range(count):
            members |= {f"{level:03}.png": png(level), f"{level:03}.json": b"{}"}
            level += 9
        write_shard(tmp_path / "shards" / f"s-{shard}.tar", members)
    return str(tmp_path / "shards" / "s-{0..4}.tar")


def levels(data: str, cache: Path, workers: int = 2) -> list[int]:
    return load_images(data, 28, 1, cache_folder=cache, workers=workers).array[:, 0, 0, 0].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_order_is_that_of_the_shards_however_many_read_them(workers: int, pattern: str, tmp_path: Path) -> None:
    assert levels(pattern, tmp_path / "cache", workers) == list(range(0, 26 * 9, 9))


def test_patterns(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "shards")
    assert levels("s-1.tar", tmp_path / "cache") == [81]
    assert levels("s-{1,0,1}.tar", tmp_path / "cache") == [81, *range(0, 81, 9)]
    assert levels("s-*.tar", tmp_path / "cache") == levels(pattern, tmp_path / "cache")


def test_a_folder_may_have_the_name_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "0.png").write_bytes(png(7))
    assert levels(str(tmp_path / "a.tar"), tmp_path / "cache") == [7]


def test_a_cache_is_found_without_a_look_into_the_shards(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = levels(pattern, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "list_members", None)
        assert levels(pattern, tmp_path / "cache") == first
    os.utime(tmp_path / "shards" / "s-2.tar", ns=(1, 1))
    capsys.readouterr()
    assert levels(pattern, tmp_path / "cache") == first
    assert "was made from other images" in capsys.readouterr().out


def test_which_members_are_images(tmp_path: Path) -> None:
    names = ["./a/1.png", "a/1.cls", "b/2.JPG", "._3.png", "__MACOSX/4.png", "c/.x/5.png", "__meta__/6.png", "7.txt"]
    shard = write_shard(tmp_path / "x.tar", {name: png(1) for name in names})
    with tarfile.open(shard, "a") as tar:
        (tmp_path / "outside.png").write_bytes(png(2))
        (tmp_path / "link.png").symlink_to("outside.png")
        tar.add(tmp_path / "link.png", "link.png")
    assert list_members(shard) == ["a/1.png", "b/2.JPG"]
    assert levels(str(shard), tmp_path / "cache") == [1, 1]


def test_what_is_corrupt_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    write_shard(shards / "0.tar", {"a.png": png(10), "b.png": b"no image", "c.png": png(30), "d.png": png(40)[:50]})
    # Each member has a block of 512 bytes for its header and one for its content.
    cut = write_shard(shards / "1.tar", {"e.png": png(50), "f.png": png(60)})
    os.truncate(cut, 3 * 512 + 20)
    damaged = write_shard(shards / "2.tar", {"g.png": png(70), "h.png": png(80), "i.png": png(90)})
    with damaged.open("r+b") as file:
        file.seek(2 * 512)
        file.write(b"x" * 512)
    write_shard(shards / "3.tar", {"j.png": png(100)})
    for _ in range(2):  # the second time from the cache
        assert levels(str(shards / "{0,1,2,3}.tar"), tmp_path / "cache") == [10, 30, 50, 70, 100]
        said = capsys.readouterr().out
        assert "5 of 10 files could not be read" in said
        for name, reason in (
            ("0.tar: b.png", "ValueError: it is no image"),
            ("0.tar: d.png", ""),
            ("1.tar: f.png", "the shard is damaged or cut short there"),
            ("1.tar: f.png and what lies behind it", "the shard is damaged or cut short there"),
            ("2.tar: g.png and what lies behind it", "the shard is damaged or cut short there"),
        ):
            assert f"{shards}/{name} ({reason}" in said


def test_folders_in_shards_are_classes(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"dog/1.png": png(20), "cat/1.png": png(10), "dog/2.png": b"no image"})
    write_shard(tmp_path / "1.tar", {"cat/2.png": png(11)})
    found = load_labelled(str(tmp_path / "{0,1}.tar"), 28, 1, cache_folder=tmp_path / "cache")
    assert (found.classes, found.labels.tolist()) == (["cat", "dog"], [1, 0, 0])
    assert found.images.array[:, 0, 0, 0].tolist() == [20, 10, 11]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s-{0..5}.tar", "there is no shard HERE/s-5.tar: expected a file for each name in HERE/s-{0..5}.tar"),
        ("t-*.tar", "no file has a name like HERE/t-*.tar: expected shards, as in 'shards-{000..099}.tar'"),
        ("{}.tar", "there is no shard HERE/{}.tar"),
        ("s-{0..4.tar", "Unbalanced braces: 'HERE/s-{0..4.tar'"),
        ("texts.tar", "HERE/texts.tar has no images: no member has a suffix of JPEG, PNG"),
        ("bytes.tar", "HERE/bytes.tar is no tar file, or is damaged before its first image: "),
    ],
)
def test_what_can_not_be_trained_on(
    pattern: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for shard in range(5):
        write_shard(Path(f"s-{shard}.tar"), {"0.png": png(1)})
    write_shard(Path("texts.tar"), {"a.txt": b"a"})
    Path("bytes.tar").write_bytes(b"x" * 2000)
    assert main(["train", pattern, *TINY_OPTIONS]) == 2
    assert message.replace("HERE", str(tmp_path)) in capsys.readouterr().err


def test_without_the_package(pattern: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert main(["train", pattern, *TINY_OPTIONS]) == 2
    assert 'needs the package webdataset: pip install "fastdcgan[webdataset]"' in capsys.readouterr().err


def test_a_resumed_run_goes_on_to_the_same_bits(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another epoch than it stopped in, and with another number of workers."""
    monkeypatch.chdir(tmp_path)
    options = [pattern, *TINY_OPTIONS, "--channels", "1", "--batch-size", "8", "--samples", "4"]
    assert main(["train", *options, "--max-steps", "5", "--out", "whole", "--cache", "a"]) == 0
    assert main(["train", *options, "--max-steps", "2", "--cache", "b"]) == 0
    assert main(["train", "--resume", "runs/s-28", "--max-steps", "5", "--cache", "c", "--workers", "1"]) == 0
    whole, resumed = (checkpoint.load(checkpoint.path_at(run, 5)) for run in ("whole", "runs/s-28"))
    assert whole.state["data"] == resumed.state["data"]
    for key, value in whole.tensors.items():
        assert torch.equal(value, resumed.tensors[key]), key
