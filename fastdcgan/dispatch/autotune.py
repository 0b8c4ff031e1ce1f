"""What was measured on this machine and is kept: algorithms and tiles of contractions, fusion boundaries of chains.

The autotune cache is one JSON file, `autotune.json` in `fastdcgan` of the user's cache folder, or the file that
FASTDCGAN_AUTOTUNE_CACHE names. Entries are of one processor and one set of versions. The file is never needed: one that
can't be read or written, or is not of this format, is left alone, with a warning.

Nothing is ever measured while a CUDA graph is being captured. Otherwise new calls are

    compared   our algorithms against PyTorch's own convolution: on a GPU where `torch.backends.cudnn.benchmark` is on,
               which is how PyTorch is told that measuring at first use is welcome; on a CPU where no rule is known
    searched   also among tiles and boundaries, which takes seconds a shape: inside `tuning()`
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastdcgan.build_info import build_info
from fastdcgan.version import __version__

FORMAT = "fastdcgan-autotune"
VERSION = 1
# What is slower by less than this is taken for as fast: the choice should not change with noise.
MARGIN = 0.03

_tuning = False
_ahead = False
_files: dict[Path, dict[str, Any]] = {}  # each file is read once


# --- when ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Inside a `with`, what was never measured on this GPU is: algorithms, tiles, boundaries; and the best is kept."""
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """Inside a `with`, kernels are compiled and not run, so nothing is measured."""
    global _ahead
    before, _ahead = _ahead, True
    try:
        yield
    finally:
        _ahead = before


def is_ahead() -> bool:
    """Whether this is inside of `ahead`."""
    return _ahead


def state() -> tuple[bool, bool, bool, bool, bool]:
    """All that decides on measuring but a capture: whoever keeps a choice has to choose again once this changes."""
    cudnn = torch._C  # what torch.backends.cudnn asks, in a fifth of the time
    return (
        _tuning,
        _ahead,
        torch.are_deterministic_algorithms_enabled(),
        cudnn._get_cudnn_benchmark(),
        cudnn._get_cudnn_deterministic(),
    )


def may_search(device: torch.device) -> bool:
    """Whether tiles and boundaries may be measured now."""
    return _tuning and _idle(device)


def may_compare(device: torch.device) -> bool:
    """Whether our algorithms may be measured against PyTorch's own on a GPU now."""
    return is_welcome() and _idle(device)


def may_compare_cpu(device: torch.device) -> bool:
    """The same on a CPU; not where bits should not depend on it."""
    return device.type == "cpu" and not torch.are_deterministic_algorithms_enabled()


def is_welcome() -> bool:
    """Whether measuring our algorithms against PyTorch's own is wanted where it is possible."""
    return _tuning or (torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic)


def _idle(device: torch.device) -> bool:
    return device.type == "cuda" and not _ahead and not torch.cuda.is_current_stream_capturing()


# --- how long ---------------------------------------------------------------------------------------------------------

_WARM_UPS = 3
_ROUNDS = 20
_CPU_ROUNDS = 5
_CACHE_SIZES = 4  # bytes written between two calls, in second-level caches


def milliseconds(calls: Mapping[Any, Callable[[], object]], device: torch.device) -> dict[Any, float]:
    """The median time of each call, taken in turns; on a GPU each with a cold second-level cache."""
    if device.type == "cpu":
        return _cpu_milliseconds(calls)
    with torch.cuda.device(device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        # The writes that empty the cache also give the host the time to launch what comes next.
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


def _cpu_milliseconds(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    times: dict[Any, list[float]] = {name: [] for name in calls}
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


# --- the file ---------------------------------------------------------------------------------------------------------


def path() -> Path:
    """The file of the autotune cache."""
    named = os.environ.get("FASTDCGAN_AUTOTUNE_CACHE")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdcgan"
    return Path(named) if named else folder / "autotune.json"


def machine(device: torch.device) -> str:
    """What measured times hold for: the processor, and what makes its code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        instructions = torch.backends.cpu.get_cpu_capability() + (" AMX" if torch.cpu._is_amx_tile_supported() else "")
        name = f"{_processor()} | {instructions} | {torch.get_num_threads()} threads"
    found = [name, f"fastdcgan {__version__}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        # What our library was built for decides which of its kernels and tiles there are.
        found += [f"triton {_triton_version()}", f"built for {' '.join(build_info().cuda.architectures) or 'none'}"]
    return " | ".join(found)


@lru_cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor()


@lru_cache
def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def lookup(kind: str, where: str, key: str) -> Any:
    """What `remember` was given for this kind of choice on this `machine`, or None."""
    return _read(path()).get(where, {}).get(kind, {}).get(key)


def remember(kind: str, where: str, key: str, value: Any) -> None:
    """Add an entry to the file, which is replaced as a whole: a reader sees the old one or the new one. Where it can't
    be written, this process knows the entry all the same."""
    file = path()
    before = _files.pop(file, {})  # another process may have written since
    entries = _read(file)
    for other, kinds in before.items():
        for of, known in kinds.items():
            entries.setdefault(other, {}).setdefault(of, {}).update(known)
    entries.setdefault(where, {}).setdefault(kind, {})[key] = value
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump({"format": FORMAT, "version": VERSION, "machines": entries}, out, indent=1, sort_keys=True)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        ignored(error)


def ignored(error: Exception) -> None:
    """Say that the file, or an entry of it, is not what this version writes, or that it can't be written."""
    reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"the autotune cache {path()} is ignored: {reason}", stacklevel=3)


def _read(file: Path) -> dict[str, Any]:
    if file not in _files:
        _files[file] = {}
        try:
            if file.exists():
                _files[file] = _parsed(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            ignored(error)
    return _files[file]


def _parsed(content: Any) -> dict[str, Any]:
    found = {key: content[key] for key in ("format", "version")}
    if found != {"format": FORMAT, "version": VERSION}:
        raise ValueError(f"is {found}: expected {FORMAT}, version {VERSION}")
    for kinds in content["machines"].values():
        for entries in kinds.values():
            if not isinstance(entries, dict):
                raise TypeError(f"expected entries by name, got {entries!r}")
    return content["machines"]
