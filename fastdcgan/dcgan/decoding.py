"""Image files, read: which formats, how large, and what becomes of the modes that they come in.

No outside program is ever run on a file: only Pillow's decoders of `FORMATS` are tried, whatever its name ends in. Of
an animation, or a file of several pages, the first picture is read.
"""

from __future__ import annotations

import io
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Of one image, and of all that are being decoded at a time: where Pillow begins to warn of decompression bombs. A pixel
# takes up to 16 bytes meanwhile.
MOST_PIXELS = 89_478_485
MOST_SECONDS = 60  # for one image


class _TimedFile(io.BufferedReader):
    """A file that can be read for `MOST_SECONDS` from its opening, or its `restart`: decoders ask for a piece at a
    time."""

    def __init__(self, file: Path | bytes) -> None:
        super().__init__(io.BytesIO(file) if isinstance(file, bytes) else io.FileIO(file))
        self.restart()

    def restart(self) -> None:
        self._end = time.monotonic() + MOST_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._end:
            raise TimeoutError(f"decoding takes more than {MOST_SECONDS} seconds")
        return super().read(size)


class _Budget:
    """Pixels that this process's threads and its forks may hold together: `with budget.take(n)` waits until there is
    room for n more."""

    def __init__(self, most: int) -> None:
        context = multiprocessing.get_context("fork")
        self._left, self._changed = context.RawValue("q", most), context.Condition()

    @property
    def left(self) -> int:
        return self._left.value

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self.left >= pixels)
            self._left.value -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left.value += pixels
                self._changed.notify_all()


_in_flight = _Budget(MOST_PIXELS)


@contextmanager
def open_image(file: Path | bytes, side: int | None = None) -> Iterator[Image.Image]:
    """The image in a file, or in the bytes of one, not yet decoded; with `side` a JPEG is decoded at a fraction of its
    size where that is no smaller. While it is open its pixels count among those in flight.

    Raises ValueError for another format, and for more than `MOST_PIXELS`; decoding raises anything for a broken file.
    """
    Image.init()  # some formats are not registered before
    with _TimedFile(file) as timed:
        try:
            image = Image.open(timed, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is no image in one of the formats {', '.join(FORMATS)}") from None
        with image:
            held = image.width * image.height
            if side is not None:
                image.draft(None, (side, side))
            if not image.info.get("progressive"):  # of a progressive JPEG all coefficients are held
                held = image.width * image.height
            if held > MOST_PIXELS:
                raise ValueError(f"it has {held} pixels: expected at most {MOST_PIXELS}")
            with _in_flight.take(held):
                timed.restart()  # to have waited for others is not the file's fault
                yield image


def upright(image: Image.Image, channels: int) -> Image.Image:
    """An open image decoded and turned as its EXIF says, as "RGB", or "L" for 1 channel."""
    ImageOps.exif_transpose(image, in_place=True)
    return as_rgb_or_grey(image, channels)


def read_image(path: Path, channels: int) -> Image.Image:
    """The image in a file, `upright`. Raises ValueError for whatever can't be read, with the reason."""
    try:
        with open_image(path) as image:
            return upright(image, channels)
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise ValueError(str(error) or type(error).__name__) from error


def as_rgb_or_grey(image: Image.Image, channels: int) -> Image.Image:
    """Any mode as "RGB", or "L" for 1 channel: numbers by `_as_bytes`, transparency laid over white.

    Raises ValueError for pixels without a range.
    """
    if image.mode.startswith(("I", "F")):
        image = _as_bytes(image)
    elif image.mode == "LAB":  # which Pillow converts to nothing else
        image = image.convert("RGB")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _as_bytes(image: Image.Image) -> Image.Image:
    """Numbers of more than 8 bits as "L", scaled by what the format can hold, never by what an image happens to hold:
    of integers the upper 8 bits, as OpenCV, torchvision and Pillow's own decoders of colour do it; floats from 0 to 1.

    Raises ValueError for floats beyond, and for integers of 32 bits or with a sign, which don't say their range.
    """
    tags = getattr(image, "tag_v2", {})  # only a TIFF has them
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also where one is not a number
            raise ValueError(f"its floats go from {values.min():g} to {values.max():g}: expected 0 to 1")
        grey = (values * np.float32(255)).round().astype(np.uint8)
    elif image.mode == "I" and tags:
        raise ValueError("its integers have a sign or 32 bits: expected 8 or 16 bits without a sign")
    else:
        grey = (values >> (tags.get(_BITS, (16,))[0] - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow leaves it to us for these modes
        np.subtract(255, grey, out=grey)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


# TIFF tags
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
