"""Decoded images on disk: a memory-mapped uint8 array [N, H, W, C] (.npy), and a JSON header says when to trust it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from fastdcgan.dcgan.files import replacing

FORMAT = "fastdcgan-images"
VERSION = 1


class Untrusted(Exception):
    """Why a cache can't be used; it gets rebuilt."""


def default_folder() -> Path:
    """Where caches go unless told: `fastdcgan` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdcgan"


def read(array_path: Path, fingerprint: str) -> tuple[np.ndarray, list[str], list[int]]:
    """The cached array (memory-mapped, read-only), and of the files that were skipped when it was made the names and
    the numbers in the source.

    Raises Untrusted unless header and array are whole, of this version, made from the source that `fingerprint` stands
    for, and the array has the checksum that was written with it.
    """
    header = _read_header(header_path(array_path))
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise Untrusted(f"is not a cache of version {VERSION}")
    if header.get("fingerprint") != fingerprint:
        raise Untrusted("was made from other images, or they have changed since")
    try:
        if array_path.stat().st_size != header["size"]:
            raise Untrusted(f"has {array_path.stat().st_size} bytes: expected {header['size']}")
        if _digest(array_path) != header["sha256"]:
            raise Untrusted("is damaged: its checksum is another than the one written with it")
        array = np.load(array_path, mmap_mode="r", allow_pickle=False)
        skipped = [str(name) for name in header["skipped"]]
        left_out = [int(number) for number in header["left_out"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Untrusted(f"can't be read: {error}") from error
    if array.dtype != np.uint8 or list(array.shape) != header.get("shape"):
        raise Untrusted(f"holds {array.dtype} {list(array.shape)}: expected uint8 {header.get('shape')}")
    return array, skipped, left_out


def write_header(array_path: Path, fingerprint: str, skipped: list[str], left_out: list[int]) -> None:
    """Vouch for the array that is in place. Until this is done, nothing trusts it."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "shape": list(np.load(array_path, mmap_mode="r", allow_pickle=False).shape),
        "size": array_path.stat().st_size,
        "sha256": _digest(array_path),
        "skipped": skipped,
        "left_out": left_out,
    }
    with replacing(header_path(array_path)) as path:
        path.write_text(json.dumps(header, indent=1))


def header_path(array_path: Path) -> Path:
    return array_path.with_suffix(".json")


def _read_header(path: Path) -> dict:
    try:
        header = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Untrusted(f"has no readable header: {error}") from error
    if not isinstance(header, dict):
        raise Untrusted("has no readable header")
    return header


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
