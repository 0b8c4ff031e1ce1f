"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of image files in the `decoding.FORMATS`
_JPEG, _NETPBM = {".jpg", ".jpeg", ".jpe", ".jfif"}, {".ppm", ".pgm", ".pbm", ".pnm", ".pfm"}
SUFFIXES = {".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"} | _JPEG | _NETPBM
MARKER = ".fastdcgan"  # a file that lists what of its folder fastdcgan wrote, a name a line
WHOLE = "."  # all that is in the folder, and below it
_NAME_BYTES = 200  # of the 255 that most file systems allow
_MOST_BYTES = 2**26  # of a text that is read at once


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the `with` ends well, on disk before it does; else it
    goes, and `path` stays as it was. Raises IsADirectoryError where `path` is a folder."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a result gets the mode that any new file gets.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the `with` ends well; else it goes.

    Raises FileExistsError where `path` has something in it, or is a file: what is there stays as it is.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} has something in it: expected a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def short_name(path: Path) -> str:
    """The name of a file or folder, cut to what leaves room to make another name of it."""
    return os.fsencode(path.name)[:_NAME_BYTES].decode("utf-8", "ignore")


def own_folder(path: Path, *pictures: str) -> None:
    """Make a folder for what fastdcgan writes: whatever will be in it is no data. One that has pictures or folders in
    it already is somebody's: then only those of these names, pictures and folders of them, are no data."""
    path.mkdir(parents=True, exist_ok=True)
    if not any(entry.suffix.lower() in SUFFIXES or entry.is_dir() for entry in path.iterdir()):
        _mark(path, WHOLE)
    for name in pictures:
        mark_written(path / name)


def mark_written(path: Path) -> None:
    """Note beside a picture, or a folder of pictures, that it is no data, unless it lies in a folder of our own."""
    if WHOLE not in read_marker(path.parent):
        _mark(path.parent, path.name)


def _mark(folder: Path, name: str) -> None:
    marker = folder / MARKER
    if name not in read_marker(folder) and (marker.is_file() or not marker.exists()):
        with marker.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{name}\n")


def read_marker(folder: Path) -> set[str]:
    """The names in a folder's marker: of what fastdcgan wrote there, or `WHOLE`. One that can't be read has none."""
    try:
        return set(read_text(folder / MARKER).splitlines())
    except (OSError, ValueError):
        return set()


def read_text(path: Path) -> str:
    """A whole file, of at most 64 MiB. Raises OSError for what is no file (a pipe would never end), ValueError for a
    larger one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes")
    return data.decode("utf-8", "surrogateescape")


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
