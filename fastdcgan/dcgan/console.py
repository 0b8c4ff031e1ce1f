"""What a person sees while something runs: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastdcgan.checks import printable
from fastdcgan.dcgan.files import mark_written

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """One line on standard output, above a live bar where there is one."""
    if _muted:
        return
    text = printable(text)
    try:
        if _live is not None:
            _live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        hang_up()


def hang_up() -> None:
    """Say nothing from here on to a pipe or a terminal that is closed: each further word would raise an error."""
    global _closed
    _closed = True
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def closed() -> bool:
    """Whether the reader of standard output has gone."""
    return _closed


def mute(muted: bool) -> None:
    """Say nothing and show no bars: for all but one of several processes."""
    global _muted
    _muted = muted


_live: Progress | None = None
_muted = False
_closed = False


class Bar:
    """Progress of `total` steps from `start` on, with `text` behind: `with Bar(...) as bar: bar.update(n)`."""

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self.text = ""
        self.title, self.total, self.start = printable(title), total, start
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        global _live
        self._began = self._last_line = time.monotonic()
        # A bar inside a bar, or a stream that is no terminal, gets plain lines.
        if Console().is_terminal and _live is None and not _muted:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                "eta",
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._task = self._progress.add_task(self.title, total=self.total, completed=self.start, text="")
            self._progress.start()
            _live = self._progress
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _live
        if self._progress is not None:
            self._progress.stop()
            _live = None

    def update(self, done: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, text=self.text)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or (done == self.total and now - self._began > 1):
            self._last_line = now
            eta = (now - self._began) / max(done - self.start, 1) * (self.total - done)
            say(f"{self.title} {done}/{self.total}  eta {_clock(eta)}  {self.text}".rstrip())


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """`items`, with their progress shown."""
    with Bar(title, total) as bar:
        for i, item in enumerate(items, start=1):
            yield item
            bar.update(i)


def warn(text: str) -> None:
    """One line on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def wrote(path: Path) -> None:
    """Say where a result is, and mark it as no data (`files.mark_written`)."""
    try:
        mark_written(path)
    except OSError as error:
        warn(f"{path} could not be marked as written by fastdcgan: {error}")
    print(printable(path))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
