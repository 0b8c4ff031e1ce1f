"""Sources of images: folders, built-in sets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.dcgan import load_images
from fastdcgan.dcgan.data import load_labelled
from fastdcgan.dcgan.sources import FolderSource, open_source
from tests.dcgan.conftest import emoji_font
from tests.machine import needs_emoji, needs_mnist


def decoded(folder: Path, name: str, size: int = 16, channels: int = 3) -> np.ndarray:
    source = FolderSource(folder)
    return source.decode([source.name_of(i) for i in range(len(source))].index(name), size, channels)


def test_centre_crop_and_antialiased_resize(tmp_path: Path) -> None:
    wide = np.zeros((32, 96), dtype=np.uint8)
    wide[:, :32] = wide[:, 64:] = 255  # black only in the middle third
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decoded(tmp_path, "wide.png").max() < 30  # the cut edges ring a little
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard of single pixels averages out
    Image.fromarray(fine.astype(np.uint8)).save(tmp_path / "fine.png")
    inside = decoded(tmp_path, "fine.png")[2:-2, 2:-2]
    assert abs(inside.astype(int) - 127).max() <= 3


def test_rotated_by_exif(tmp_path: Path) -> None:
    picture = np.zeros((32, 32), dtype=np.uint8)
    picture[:16] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert decoded(tmp_path, "turned.png")[0, 8, 0] == 0
    assert decoded(tmp_path, "turned.png")[-1, 8, 0] == 255


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder, and no built-in set"):
        load_images(str(tmp_path / "nowhere"), 16, 3, cache_folder=tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        load_images(str(tmp_path / "empty"), 16, 3, cache_folder=tmp_path / "cache")
    (tmp_path / "empty" / "broken.png").touch()
    with pytest.raises(ValueError, match=r"none of the 1 files .* could be read"):
        load_images(str(tmp_path / "empty"), 16, 3, cache_folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@needs_mnist
def test_mnist_and_digits() -> None:
    mnist = load_images("mnist", 32, 1).array
    assert mnist.shape == (5000, 32, 32, 1)
    assert mnist.max() == 255
    assert not mnist[:, :2].any()
    assert not mnist[:, :, -2:].any()
    source = open_source("mnist")
    assert np.array_equal(source.decode(7, 28, 1), mnist[7, 2:-2, 2:-2])
    assert source.decode(7, 64, 3).shape == (64, 64, 3)
    assert load_images("digits", 32, 3).array.shape == (1797, 32, 32, 3)


def test_photo_crops() -> None:
    """Squares of the photographs as they are, none of sky alone; each one's class is its photograph."""
    found = load_labelled("photo-crops", 64, 3)
    assert found.images.array.shape == (len(found), 64, 64, 3)
    assert len(found) > 4000
    assert found.classes == ["china", "flower"]
    assert np.bincount(found.labels).min() > 1500
    china, flower = (found.images.array[found.labels == i].mean((0, 1, 2)) for i in range(2))
    assert china[2] > 1.5 * flower[2]  # there is a lot of blue in a sky, little in an orange dahlia

    source = open_source("photo-crops")
    photograph = Image.fromarray(source.photographs[0])
    name = source.name_of(40)
    box = tuple(int(number) for number in re.findall(r"\d+", name))
    assert name.startswith("china")
    assert box[2] - box[0] == box[3] - box[1] == 128
    assert np.array_equal(source.decode(40, 128, 3), np.asarray(photograph.crop(box)))
    assert source.decode(40, 32, 1).shape == (32, 32, 1)
    assert source.decode(40, 32, 1).std() > 30


# --- emoji -----------------------------------------------------------------------------------------------------------


@needs_emoji
def test_emoji_are_drawn_in_colour_on_white(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the font has, of several code points too; the others are named and left out."""
    data = f"emoji:{emoji_font(tmp_path / 'squares.ttf')}"
    source = open_source(data)
    found = load_labelled(data, 16, 3, cache_folder=tmp_path / "cache")
    names = [source.name_of(i) for i in range(len(source)) if i not in found.images.left_out]
    assert names == ["thumbs_up", "thumbs_up_light_skin_tone", "grinning_face"]
    assert len(source) > 3600
    assert found.images.array[:, 8, 8].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 0]]
    assert (found.images.array[:, 0, 0] == 255).all()
    assert [found.classes[label] for label in found.labels] == ["people", "people", "faces"]
    assert found.classes == ["faces", "flags", "other", "people"]
    assert "the font doesn't have it" in capsys.readouterr().out
    again = load_labelled(data, 16, 3, cache_folder=tmp_path / "cache")
    assert np.array_equal(again.images.array, found.images.array)
    grey = load_images(data, 16, 1, cache_folder=tmp_path / "cache").array[:, 8, 8, 0]
    assert grey.tolist() == [29, 150, 76]  # ITU-R 601-2 luma


@needs_emoji
def test_classes_of_emoji(tmp_path: Path) -> None:
    font = emoji_font(tmp_path / "squares.ttf")
    source, people = (open_source(f"{name}:{font}") for name in ("emoji", "emoji-people"))
    names, labels = source.classes()
    kinds = {source.name_of(i): names[label] for i, label in enumerate(labels)}
    for name, kind in (
        ("woman_astronaut_dark_skin_tone", "people"),
        ("family_man_woman_girl", "people"),
        ("waving_hand", "people"),
        ("face_with_tears_of_joy", "faces"),
        ("dog_face", "faces"),
        ("France", "flags"),
        ("Scotland", "flags"),
        ("pirate_flag", "flags"),
        ("hot_beverage", "other"),
        ("keycap_3", "other"),
    ):
        assert kinds[name] == kind, name
    assert people.classes()[0] == ["faces", "people"]
    assert len(people) == sum(kind in ("people", "faces") for kind in kinds.values())


@needs_emoji
@pytest.mark.parametrize("name", ["emoji", "emoji-people"])
def test_no_font_with_emoji(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"NotoColorEmoji\.ttf is no font .*: expected Noto Color Emoji, as of Debian's"
    ):
        open_source(name)
    (tmp_path / "fonts").mkdir()
    emoji_font(tmp_path / "fonts" / "NotoColorEmoji.ttf")
    assert "of Squares" in open_source(name).title
    (tmp_path / "no.ttf").write_text("no font")
    with pytest.raises(ValueError, match=r"no\.ttf is no font"):
        open_source(f"{name}:{tmp_path / 'no.ttf'}")
    with pytest.raises(ValueError, match="is no folder, and no built-in set"):
        open_source(f"mnist:{tmp_path / 'no.ttf'}")
