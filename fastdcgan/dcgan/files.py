"""Files and folders that appear whole or not at all. Whatever this package writes for its user goes through here.

What can't be written (a full disk, a read-only place) raises an OSError of one line that names the file. A process that
is killed leaves its temporary file behind; the next one that writes into the same folder removes it.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

LOCK = ".lock"
_SUFFIX = ".fastdcgan.tmp"
# Of image files in the `decoding.FORMATS`
_JPEG, _NETPBM = {".jpg", ".jpeg", ".jpe", ".jfif"}, {".ppm", ".pgm", ".pbm", ".pnm", ".pfm"}
SUFFIXES = {".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"} | _JPEG | _NETPBM
MARKER = ".fastdcgan"  # a file that lists what of its folder fastdcgan wrote, a name a line
WHOLE = "."  # all that is in the folder, and below it
_NAME_BYTES = 200  # of the 255 that most file systems allow
_MOST_BYTES = 2**26  # of a text that is read at once


def check_suffix(path: Path, *suffixes: str, name: str = "path") -> None:
    """Raise ValueError for a file to be written whose name says that it is of another kind; `name` is the argument's.
    So no file has a name that programs would open it wrongly by."""
    if path.suffix.lower() not in suffixes:
        *others, last = suffixes
        kinds = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name} is {path}: expected the name of a file {kinds}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the `with` ends well, on disk before it does; else it
    goes, and `path` stays as it was. Raises IsADirectoryError where `path` is a folder, OSError for a failed write."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected the name of a file")
    with _named(path), _temporary(path, folder=False) as temporary:
        yield temporary
        # mkstemp makes files private; a result gets the mode that any new file gets.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[Any]:
    """An open binary file in place of `replacing`'s path."""
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        yield _Writer(file)


def write(path: Path, content: str | bytes) -> None:
    """A whole file at once; text in UTF-8."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(path: Path, text: str) -> None:
    """`text` at the end of a file: all of it or, where that raises OSError, nothing."""
    rest = text.encode("utf-8", "surrogateescape")
    with _named(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the `with` ends well; else it goes.

    Raises FileExistsError where `path` has something in it, or is a file: what is there stays as it is.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} has something in it: expected a new or an empty folder")
    with _named(path), _temporary(path, folder=True) as temporary:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder`, which is made if need be, to this process. Raises BlockingIOError while another one has it.

    The lock is the kernel's and ends with its process, however that ends; what the file says is for people.
    """
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise BlockingIOError(f"{folder} is in use by {owner}: wait for it, or take another folder") from None
        except OSError as error:
            warnings.warn(f"{folder} can't be locked: {error.strerror}", RuntimeWarning, stacklevel=3)
        with _named(folder):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
        yield


def clean(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`: what is still being written is locked, and stays."""
    for path in folder.glob(f".*{_SUFFIX}"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            continue  # it is gone already, or nothing that was left by this package
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        except OSError:
            pass  # nor is anything removed where a file system knows no locks
        finally:
            os.close(handle)


class _Writer:
    """An open file that forgets what is written once a write has failed: an archive that is closed after that would
    fail again, where nobody can catch it. `file` has no buffer, so that nothing but a write can fail."""

    def __init__(self, file: io.RawIOBase | io.BytesIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> int:
        rest = content = memoryview(content).cast("B")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file = io.BytesIO()
            raise
        return len(content)


@contextmanager
def _temporary(path: Path, *, folder: bool) -> Iterator[Path]:
    """A new file or folder beside `path`, locked for as long as it has that name, which is at most until the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent)
    prefix = f".{short_name(path)}."
    while True:
        if folder:
            temporary = Path(tempfile.mkdtemp(_SUFFIX, prefix, path.parent))
            handle = os.open(temporary, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(_SUFFIX, prefix, path.parent)
            temporary = Path(name)
        with suppress(OSError):  # of a file system without locks, where `clean` removes nothing
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():  # not cleaned away before it was locked
            break
        os.close(handle)
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name `path` in the errors of writing it: libraries name a temporary file, or none."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from error
    except OSError as error:
        place = error.filename
        if place is not None and _SUFFIX not in str(place) and not path.is_relative_to(str(place)):
            raise  # of another file
        if len(error.args) == 1 and str(path) in str(error):
            raise  # a line that names it already
        raise type(error)(f"{path} can't be written: {error.strerror or error}") from error


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
        append(marker, f"{name}\n")


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
