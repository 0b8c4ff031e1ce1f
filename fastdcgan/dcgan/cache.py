"""Decoded images on disk: a memory-mapped uint8 array [N, H, W, C] (.npy), and a JSON header says when to trust it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastdcgan.dcgan.files import read_text, replacing

Shape = tuple[int, ...]  # of one image: [H, W, C]

FORMAT = "fastdcgan-images"
VERSION = 2


class Untrusted(Exception):
    """Why a cache can't be used; it gets rebuilt."""


def default_folder() -> Path:
    """Where caches go unless told: `fastdcgan` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdcgan"


def read(array_path: Path, fingerprint: str, shape: Shape) -> tuple[np.ndarray, list[str], list[int]]:
    """The cached array (memory-mapped, read-only), and of the files that were skipped when it was made the names and
    the numbers in the source.

    Raises Untrusted unless header and array are whole, of this version, made from the source that `fingerprint` stands
    for, the array has images of this `shape`, and the checksum that was written with it.
    """
    try:
        header = json.loads(read_text(header_path(array_path)))
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise Untrusted(f"is not a cache of version {VERSION}")
    except Untrusted:
        raise
    except Exception as error:  # no file, no JSON, JSON that is nested too deeply, no dictionary
        raise Untrusted(f"has no readable header: {error or type(error).__name__}") from error
    if header.get("fingerprint") != fingerprint:
        raise Untrusted("was made from other images, or they have changed since")
    try:
        size = array_path.stat().st_size
        if size != header["size"]:
            raise Untrusted(f"has {size} bytes: expected {header['size']}")
        if not array_path.is_file() or _digest(array_path) != header["sha256"]:
            raise Untrusted("is damaged: its checksum is another than the one written with it")
        array = np.load(array_path, mmap_mode="r", allow_pickle=False)
        skipped, left_out = header["skipped"], header["left_out"]
        expected = [len(np.delete(np.arange(len(array) + len(left_out)), left_out)), *shape]
        if len(skipped) != len(left_out) or not all(isinstance(name, str) for name in skipped):
            raise Untrusted("has a header that contradicts itself")
    except Untrusted:
        raise
    except Exception as error:  # whatever values of other types make of these
        raise Untrusted(f"can't be read: {error or type(error).__name__}") from error
    if array.dtype != np.uint8 or not list(array.shape) == header.get("shape") == expected:
        raise Untrusted(f"holds {array.dtype} {list(array.shape)}: expected uint8 {expected}")
    return array, skipped, left_out


def write_array(path: Path, count: int, shape: Shape, images: Iterable[tuple[int, np.ndarray]]) -> None:
    """Write images, uint8 `shape`, in the order of their numbers below `count`, whatever order they come in; where
    numbers never come, the images behind them move up. Raises OSError, before the first one, where there is no space
    for all of them."""
    size, header = math.prod(shape), _npy_header((count, *shape))
    there = np.zeros(count, bool)
    with path.open("w+b") as file:
        _reserve(file.fileno(), count * size, path.parent)
        for number, image in images:
            file.seek(len(header) + number * size)
            file.write(image.tobytes())
            there[number] = True
        kept = np.flatnonzero(there)
        for place in np.flatnonzero(kept != np.arange(len(kept))).tolist():
            file.seek(len(header) + int(kept[place]) * size)
            image_there = file.read(size)
            file.seek(len(header) + place * size)
            file.write(image_there)
        file.truncate(len(header) + len(kept) * size)
        file.seek(0)
        file.write(_npy_header((len(kept), *shape)))  # as long as the first one: numpy pads it


def describe(array_path: Path) -> dict:
    """What a header says of a finished array, taken while nobody else knows the file: once it has its place, another
    process's may be there."""
    shape = list(np.load(array_path, mmap_mode="r", allow_pickle=False).shape)
    return {"shape": shape, "size": array_path.stat().st_size, "sha256": _digest(array_path)}


def write_header(array_path: Path, fingerprint: str, described: dict, skipped: list[str], left_out: list[int]) -> None:
    """Vouch for the array of that description. Until this is done, nothing trusts it."""
    header = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, **described}
    with replacing(header_path(array_path)) as path:
        path.write_text(json.dumps({**header, "skipped": skipped, "left_out": left_out}, indent=1))


def header_path(array_path: Path) -> Path:
    return array_path.with_suffix(".json")


def _npy_header(shape: Shape) -> bytes:
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(text, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return text.getvalue()


def _reserve(file: int, size: int, folder: Path) -> None:
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # this file system can't: then writing finds out
            return
        why = f"{error.strerror} for {size / 1e6:.1f} MB of decoded images"
        raise OSError(error.errno, why, str(folder)) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
