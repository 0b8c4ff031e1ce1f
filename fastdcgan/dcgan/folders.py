"""Which files of a folder are data."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastdcgan.dcgan.files import MARKER, SUFFIXES, WHOLE, read_marker

_NAMED_IN_FULL = 10


class Names(Sequence[str]):
    """Very many strings, of which none is an object: so they take little memory, and forked processes share it.
    Of objects each would soon have a copy, because their references are counted in them."""

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("Q")

    def append(self, name: str) -> None:
        self._text += os.fsencode(name)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """One of them, counted from 0."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._text[start : self._ends[index]]))


@dataclass(frozen=True)
class Listing:
    """The images below a folder: their paths within it, in the order of the paths' parts; a digest, which is another
    one when a path, a size or a time has changed; and what a person should know of the rest, a line each."""

    files: Names
    digest: str
    notes: list[str]


def list_images(folder: Path) -> Listing:
    """Every file below `folder` that has the suffix of an image, through links to files and folders as well.

    Never data are what is hidden (a leading dot, `__MACOSX`), what fastdcgan wrote (`files.MARKER`), and links to a
    folder that they lie in themselves; but `folder` is read even if it is hidden, or was written by fastdcgan.
    """
    return _Walk(folder).listing()


class _Walk:
    """Depth first, with a stack of our own: folders may lie deeper than Python's goes. Nothing
    but its name is kept of a file, because there may be millions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = Names()
        self.digest = hashlib.sha256()
        self.left_out: Counter[str] = Counter()
        self.unread: list[str] = []
        self.other_suffixes = set(Image.registered_extensions()) - SUFFIXES
        # Of each folder that is being read: the names to come, its path with a slash, and what fastdcgan wrote there.
        self.stack: list[tuple[Iterator[str], str, set[str]]] = []
        self.above = [_identity(parent.stat()) for parent in folder.resolve().parents]  # and of those on the stack

    def listing(self) -> Listing:
        self._enter("", self.folder.stat(), set())
        if self.stack:
            self.stack[0][2].discard(WHOLE)
        while self.stack:
            names, prefix, written = self.stack[-1]
            name = next(names, None)
            if name is None:
                self.stack.pop()
                self.above.pop()
            else:
                self._look(name, prefix, written)
        return Listing(self.files, self.digest.hexdigest(), self._notes())

    def _enter(self, prefix: str, status: os.stat_result, written: set[str]) -> None:
        try:
            names = sorted(os.listdir(self.folder / prefix))
        except OSError as error:
            self.unread.append(f"{prefix or self.folder} ({error.strerror})")
            return
        if MARKER in names:
            written = written | read_marker(self.folder / prefix)
        self.stack.append((iter(names), prefix, written))
        self.above.append(_identity(status))

    def _look(self, name: str, prefix: str, written: set[str]) -> None:
        path, suffix = prefix + name, os.path.splitext(name)[1].lower()
        hidden = is_hidden(name)
        try:
            status = os.stat(os.path.join(self.folder, path))
        except OSError as error:  # a link to nowhere, or a folder whose names can be read and no more
            if not hidden:
                self.unread.append(f"{path} ({error.strerror})")
            return
        folder = stat.S_ISDIR(status.st_mode)
        if hidden:
            if folder or suffix in SUFFIXES:
                self.left_out["hidden"] += 1
        elif folder:
            if _identity(status) in self.above:
                self.left_out["links in a circle"] += 1
            else:
                self._enter(f"{path}/", status, {WHOLE} if written & {WHOLE, name} else set())
        elif suffix in self.other_suffixes:
            self.left_out["of formats that are not read"] += 1
        elif suffix in SUFFIXES:
            if written & {WHOLE, name}:
                self.left_out["written by fastdcgan"] += 1
            elif not stat.S_ISREG(status.st_mode):
                self.left_out["no files"] += 1
            else:
                self.files.append(path)
                self.digest.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0"))

    def _notes(self) -> list[str]:
        notes = []
        if self.left_out:
            notes.append(f"Left out of {self.folder}: " + ", ".join(f"{n} {why}" for why, n in self.left_out.items()))
        if self.unread:
            more = len(self.unread) - _NAMED_IN_FULL
            notes.append(f"{len(self.unread)} files and folders can't be reached and are left out:")
            notes += [f"  {name}" for name in self.unread[:_NAMED_IN_FULL]]
            notes += [f"  ... and {more} more"] if more > 0 else []
        return notes


def is_hidden(name: str) -> bool:
    """Whether a file or a folder is none of the user's: `.DS_Store`, and what macOS puts into archives."""
    return name == "__MACOSX" or name.startswith(".")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
