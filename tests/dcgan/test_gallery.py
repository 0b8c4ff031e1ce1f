"""The gallery: every picture there, small, and named on its page."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from PIL import Image

from fastdcgan.dcgan import checkpoint, gallery, inpainting
from tests.machine import needs_mnist

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, few steps."""
    for name in ("_DIGITS", "_PEOPLE"):
        config = dataclasses.replace(getattr(gallery, name), ngf=4, ndf=4, nz=8, max_steps=2)
        monkeypatch.setattr(gallery, name, config)
    monkeypatch.setattr(gallery, "_CANDIDATES", 8)
    monkeypatch.setattr(gallery, "_FILLED", 3)

    def short(*args, **options):  # type: ignore[no-untyped-def]
        return inpaint(*args, **{**options, "steps": 2, "restarts": 1})

    inpaint = inpainting.inpaint
    monkeypatch.setattr(inpainting, "inpaint", short)


def names_on(page: Path) -> list[str]:
    return re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text())


@needs_mnist
def test_gallery(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(64):
        Image.new("RGB", (40, 30), (4 * i, 90, 10)).save(photos / f"{i}.png")
    out, runs = tmp_path / "pictures", tmp_path / "runs"
    options = ["--out", str(out), "--runs", str(runs), "--data", str(photos), "--device", "cpu"]
    assert gallery.main(options) == 0
    names = names_on(out / "README.md")
    assert len(names) == 9
    assert {path.name for path in out.iterdir()} == {*names, "README.md"}
    page = (out / "README.md").read_text()
    assert "5,000 digits of MNIST, 32x32, every 10th held out; 2 steps of 32 images" in page
    assert "average of the generator" in page
    with Image.open(out / "people-samples.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (8 * 66 + 2, 8 * 66 + 2))

    # Runs that are there are not trained again.
    before = [path.stat().st_mtime_ns for path in checkpoint.all_of(runs / "digits")]
    gallery._trained(gallery._DIGITS, runs / "digits", 1.0)
    assert [path.stat().st_mtime_ns for path in checkpoint.all_of(runs / "digits")] == before


def test_large_pictures_are_refused(
    quick: None, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MOST_BYTES", 100)
    with pytest.raises(RuntimeError, match=r"a-samples\.png has \d+ bytes: expected at most 100"):
        gallery.draw(gallery.load_trained(trained_run), tmp_path, "a")


def test_what_is_committed() -> None:
    page = REPOSITORY / "docs" / "gallery" / "README.md"
    names = names_on(page)
    assert {path.name for path in page.parent.iterdir()} == {*names, page.name}
    for name in names:
        assert (page.parent / name).stat().st_size <= gallery.MOST_BYTES, name
