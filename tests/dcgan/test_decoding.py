"""Which files are opened as images, within which limits, and what becomes of their modes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.dcgan import decoding, masks, pictures
from fastdcgan.dcgan.decoding import FORMATS, open_image, read_image
from fastdcgan.dcgan.files import SUFFIXES
from fastdcgan.dcgan.images import save_gif
from fastdcgan.dcgan.sources import FolderSource
from tests.machine import ROOT


def test_suffixes_are_of_the_formats() -> None:
    Image.init()
    known = {suffix: name for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    assert set(known) <= SUFFIXES
    assert set(known.values()) == set(FORMATS)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: FolderSource(path.parent).decode(0, 16, 3),
        lambda path: pictures.load_picture(path, 3, 16),
        lambda path: masks.from_file(path, 16),
        lambda path: save_gif([path], path.with_suffix(".gif")),
    ],
)
def test_no_outside_program_runs(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow gives an EPS file to whatever `gs` is in the PATH."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "x.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="no image in one of the formats JPEG, PNG,"):
        read(path)
    assert not ran.exists()


def test_images_are_opened_in_one_place() -> None:
    found = [path.name for path in (ROOT / "fastdcgan").rglob("*.py") if "Image.open(" in path.read_text()]
    assert found == ["decoding.py"]


# --- modes ------------------------------------------------------------------------------------------------------------


def numbers(value: float, dtype: type) -> Image.Image:
    return Image.fromarray(np.full((30, 20), value, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "image", "grey"),
    [
        # The upper 8 of 16 bits: what OpenCV's imread, torchvision's to_dtype(scale=True) and Pillow's RGB give
        *(
            (f"a.{suffix}", numbers(value, np.uint16), value >> 8)
            for suffix in ("png", "tiff", "pgm")
            for value in (0, 200, 300, 0x8080, 0xFFFF)
        ),
        *(("a.tiff", numbers(value, np.float32), grey) for value, grey in ((0, 0), (0.25, 64), (0.5, 128), (1, 255))),
        ("a.pfm", numbers(0.25, np.float32), 64),
        ("a.tiff", Image.new("LAB", (20, 30), (136, 128, 128)), 127),  # L* of 53.3
        ("a.png", Image.new("LA", (20, 30), (0, 128)), 127),
        ("a.png", Image.new("1", (20, 30), 1), 255),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(name: str, image: Image.Image, grey: int, channels: int, tmp_path: Path) -> None:
    image.save(tmp_path / name)
    found = np.asarray(read_image(tmp_path / name, channels), dtype=int)
    assert found.shape == ((30, 20) if channels == 1 else (30, 20, 3))
    assert abs(found - grey).max() <= (image.mode == "LAB")


@pytest.mark.parametrize(
    ("image", "extra", "grey"),
    [
        (numbers(0x3000, np.uint16), {"tiffinfo": {262: 0}}, 255 - 0x30),
        (numbers(0.25, np.float32), {"tiffinfo": {262: 0}}, 255 - 64),
        (numbers(500, np.uint16), {"transparency": 500}, 255),
    ],
    ids=["white is zero, 16 bits", "white is zero, floats", "one value is transparent"],
)
def test_what_a_file_says_of_its_numbers(image: Image.Image, extra: dict, grey: int, tmp_path: Path) -> None:
    path = tmp_path / ("a.tiff" if "tiffinfo" in extra else "a.png")
    image.save(path, **extra)
    assert set(np.asarray(read_image(path, 1)).flat) == {grey}


def test_colour_and_grey_of_16_bits_agree(tmp_path: Path) -> None:
    """A hand-made PNG of 16 bits a channel: Pillow can't write one."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for colour, samples in ((0, 1), (2, 3)):
        rows = b"".join(b"\0" + struct.pack(">H", 0x12FF) * 16 * samples for _ in range(16))
        header = struct.pack(">IIBBBBB", 16, 16, 16, colour, 0, 0, 0)
        (tmp_path / f"{colour}.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        )
    assert np.array_equal(*(np.asarray(read_image(tmp_path / f"{colour}.png", 3)) for colour in (0, 2)))


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (numbers(1.5, np.float32), "floats go from 1.5 to 1.5: expected 0 to 1"),
        (numbers(-0.1, np.float32), "expected 0 to 1"),
        (numbers(float("nan"), np.float32), "floats go from nan to nan: expected 0 to 1"),
        (numbers(7, np.int32), "sign or 32 bits: expected 8 or 16 bits"),
    ],
)
def test_numbers_without_a_range(image: Image.Image, why: str, tmp_path: Path) -> None:
    image.save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=why):
        read_image(tmp_path / "a.tiff", 3)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_most_pixels(tmp_path: Path) -> None:
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="169000000 pixels: expected at most 89478485"),
    ):
        read_image(tmp_path / "bomb.png", 3)


def test_a_jpeg_counts_as_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an eighth of its sides; but of a progressive one all of it is held."""
    monkeypatch.setattr(decoding, "MOST_PIXELS", 5000)
    image = Image.new("RGB", (256, 256), (9, 9, 9))
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "b.jpg", progressive=True)
    with open_image(tmp_path / "a.jpg", 32) as opened:
        assert opened.size == (32, 32)
    for name, side in (("a.jpg", None), ("b.jpg", 32)):
        with pytest.raises(ValueError, match="65536 pixels: expected at most 5000"), open_image(tmp_path / name, side):
            pass


def test_first_frame_only(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (10, 20, 30)]
    for name in ("a.gif", "a.tiff", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with open_image(tmp_path / name) as image:
            assert image.tell() == 0
        assert abs(int(np.asarray(read_image(tmp_path / name, 1))[4, 4]) - 10) <= 2


def test_most_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a JPEG that is small, but has its last scan thousands of times."""
    path = tmp_path / "a.jpg"
    Image.new("L", (500, 500), 7).save(path, progressive=True)
    data = path.read_bytes()
    scan = data[data.rfind(b"\xff\xda") : -2]
    path.write_bytes(data[: -2 - len(scan)] + scan * 20_000 + b"\xff\xd9")
    monkeypatch.setattr(decoding, "MOST_SECONDS", 0.05)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"more than 0\.05 seconds"):
        read_image(path, 3)
    assert time.monotonic() - began < 30


def test_waiting_for_others_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (30, 20), 7).save(tmp_path / "a.png")
    monkeypatch.setattr(decoding, "MOST_SECONDS", 0.2)
    with ThreadPoolExecutor(1) as pool:
        with decoding._in_flight.take(decoding.MOST_PIXELS):
            reading = pool.submit(read_image, tmp_path / "a.png", 1)
            time.sleep(0.4)
        assert reading.result().size == (30, 20)


def test_pixels_in_flight() -> None:
    """All threads together hold no more than the budget, and none waits for ever."""
    budget, lock, held, most = decoding._Budget(10), threading.Lock(), 0, 0

    def take(pixels: int) -> None:
        nonlocal held, most
        with budget.take(pixels):
            with lock:
                held += pixels
                most = max(most, held)
            time.sleep(0.002)
            with lock:
                held -= pixels

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [4, 10, 1, 3, 6, 5] * 10))
    assert most == 10
    assert budget.left == 10


def test_an_image_counts_while_it_is_open(tmp_path: Path) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    before = decoding._in_flight.left
    with open_image(tmp_path / "a.png"):
        assert decoding._in_flight.left == before - 600
    assert decoding._in_flight.left == before
