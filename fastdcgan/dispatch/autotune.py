"""What was measured on this machine and is kept: tiles, routes of contractions, boundaries of chains.

One JSON file, `measured.json` in `fastdcgan` of the user's cache folder, or the file that FASTDCGAN_MEASURED names.
Entries are of one processor and one set of versions; a file that is not of this format is left alone, with a warning.

Nothing is ever measured while a CUDA graph is being captured. Otherwise new shapes are

    compared   our kernels against PyTorch's own convolution: where `torch.backends.cudnn.benchmark` is on, which is how
               PyTorch is told that measuring at first use is welcome
    searched   also among tiles and boundaries, which takes seconds a shape: inside `tuning()`

On a CPU (`cpu_times`) calls that can go two ways are compared at first use.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

FORMAT = "fastdcgan-measured"
VERSION = 1
# What is slower by less than this is taken for as fast: the choice should not change with noise.
MARGIN = 0.03

Choice = TypeVar("Choice", bound=Hashable)

_tuning = False
_files: dict[Path, dict[str, Any]] = {}  # each file is read once


# --- when ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Inside a `with`, what was never measured on this GPU is: tiles, routes and boundaries; and the best is kept."""
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before


def may_search(device: torch.device) -> bool:
    """Whether tiles and boundaries may be measured now."""
    return _tuning and _idle(device)


def may_compare(device: torch.device) -> bool:
    """Whether our kernels may be measured against PyTorch's own now."""
    asked = torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    return (_tuning or asked) and _idle(device)


def _idle(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


# --- how long ---------------------------------------------------------------------------------------------------------

_WARM_UPS = 3
_ROUNDS = 20
_CACHE_SIZES = 4  # bytes written between two calls, in second-level caches


def milliseconds(calls: Mapping[Any, Callable[[], object]], device: torch.device) -> dict[Any, float]:
    """The median time on the GPU of each call, taken in turns, each with a cold second-level cache.

    The writes that empty the cache also give the host the time to launch what comes next.
    """
    with torch.cuda.device(device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(_CACHE_SIZES * cache, dtype=torch.uint8, device=device)
        for call in calls.values():
            for _ in range(_WARM_UPS):
                call()
        pairs: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.zero_()
                begin.record()
                call()
                end.record()
                pairs[name].append((begin, end))
        torch.cuda.synchronize(device)
        return {name: _median([begin.elapsed_time(end) for begin, end in found]) for name, found in pairs.items()}


_CPU_ROUNDS = 5
_in_process: dict[tuple[str, str], dict[str, float]] = {}


def cpu_times(kind: str, key: str, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds that each call takes on the CPU: what is known of `key`, else the medians of rounds in turns."""
    found = _in_process.get((kind, key)) or lookup(kind, cpu_key(), key)
    if found is None or set(found) != set(calls):
        found = _cpu_milliseconds(calls)
        try:
            remember(kind, cpu_key(), key, found)
        except OSError as error:  # this process knows all the same
            ignored(error)
    _in_process[kind, key] = found
    return found


def _cpu_milliseconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(_CPU_ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - begin))
    return {name: _median(found) for name, found in times.items()}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def fastest(
    choices: Sequence[Choice],
    attempt: Callable[[Choice], object],
    device: torch.device,
    no_room: tuple[type[Exception], ...] = (),
) -> Choice:
    """The choice with the least time; `attempt` runs one. What raises `no_room` is left out; RuntimeError if all do."""
    calls: dict[Choice, Callable[[], object]] = {}
    for choice in choices:
        try:
            attempt(choice)
        except no_room:
            continue
        calls[choice] = lambda choice=choice: attempt(choice)  # type: ignore[misc]
    if not calls:
        raise RuntimeError(f"none of {len(choices)} tiles fits this device: {choices}")
    times = milliseconds(calls, device)
    return min(calls, key=lambda choice: times[choice])


# --- choices ----------------------------------------------------------------------------------------------------------


class Choices(Generic[Choice]):
    """The ways to run each problem: measured before, or now inside `tuning()`, or else by a rule.

    `kind` names the entries of the file; `choice_of` makes a choice from an entry, or raises TypeError or ValueError;
    `entry_of` is the other way.
    """

    def __init__(self, kind: str, choice_of: Callable[[Any], Choice], entry_of: Callable[[Choice], Any]) -> None:
        self.kind, self._choice_of, self._entry_of = kind, choice_of, entry_of
        self._chosen: dict[Hashable, Choice] = {}  # asking the file takes longer than some kernels

    def choose(
        self,
        problem: Hashable,
        key: Callable[[], str],
        device: torch.device,
        rule: Callable[[], Choice],
        search: Callable[[], Choice],
    ) -> Choice:
        """The choice for `problem`, which the file knows by key(): rule() where nothing was, nor may be, measured."""
        found = self._chosen.get((problem, device))
        searching = may_search(device)
        if found is None or searching:
            known = self._known(key(), device)
            if known is None and searching:
                known = search()
                remember(self.kind, gpu_key(device), key(), self._entry_of(known))
            found = known or rule()
            self._chosen[problem, device] = found
        return found

    def _known(self, key: str, device: torch.device) -> Choice | None:
        entry = lookup(self.kind, gpu_key(device), key)
        try:
            return None if entry is None else self._choice_of(entry)
        except (TypeError, ValueError) as error:
            ignored(error)
            return None


# --- the file ---------------------------------------------------------------------------------------------------------


def path() -> Path:
    """The file of measurements."""
    named = os.environ.get("FASTDCGAN_MEASURED")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdcgan"
    return Path(named) if named else folder / "measured.json"


@lru_cache
def gpu_key(device: torch.device) -> str:
    """What measured times hold for: the GPU, and what makes its code."""
    from fastdcgan import __version__

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} | fastdcgan {__version__} | torch {torch.__version__} | triton {triton}"


@lru_cache
def cpu_key() -> str:
    """The same for the CPU."""
    from fastdcgan import __version__

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor()} | fastdcgan {__version__} | torch {torch.__version__}"


def lookup(kind: str, gpu: str, key: str) -> Any:
    """What `remember` was given, or None."""
    return _read(path()).get(gpu, {}).get(kind, {}).get(key)


def remember(kind: str, gpu: str, key: str, value: Any) -> None:
    """Add an entry to the file, which is replaced as a whole: a reader sees the old one or the new one."""
    file = path()
    _files.pop(file, None)  # another process may have written since
    entries = _read(file)
    entries.setdefault(gpu, {}).setdefault(kind, {})[key] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w") as out:
            json.dump({"format": FORMAT, "version": VERSION, "gpus": entries}, out, indent=1, sort_keys=True)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def ignored(error: Exception) -> None:
    """Say that the file, or an entry of it, is not what this version writes."""
    reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"measurements in {path()} are ignored: {reason}", stacklevel=3)


def _read(file: Path) -> dict[str, Any]:
    if file not in _files:
        _files[file] = {}
        try:
            if file.exists():
                _files[file] = _parsed(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            ignored(error)
    return _files[file]


def _parsed(content: Any) -> dict[str, Any]:
    found = {key: content[key] for key in ("format", "version")}
    if found != {"format": FORMAT, "version": VERSION}:
        raise ValueError(f"is {found}: expected {FORMAT}, version {VERSION}")
    for kinds in content["gpus"].values():
        for entries in kinds.values():
            if not isinstance(entries, dict):
                raise TypeError(f"expected entries by name, got {entries!r}")
    return content["gpus"]
