"""What was measured on this machine and is kept: algorithms and tiles of contractions, fusion boundaries of chains.

The autotune cache is one JSON file, `autotune.json` in `fastdcgan` of the user's cache folder, or the file that
FASTDCGAN_AUTOTUNE_CACHE names. Entries are of one processor and one set of versions. The file is never needed: one that
can't be read or written, or is not of this format, is left alone, with a warning.

Nothing is ever measured while a CUDA graph is being captured, nor on a CPU with deterministic algorithms, inside
`by_rule()` or where FASTDCGAN_AUTOTUNE is "off" as this is imported. Otherwise new calls are

    compared   our algorithms against PyTorch's own convolution: on a GPU where `torch.backends.cudnn.benchmark` is on,
               which is how PyTorch is told that measuring at first use is welcome; on a CPU when a chain is called for
               the third time, as long as measuring takes no more than a small share of the time, or inside `at_once()`
    searched   also among tiles and boundaries, which takes seconds a shape: inside `tuning()`
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.build_info import build_info
from fastdcgan.version import __version__

FORMAT = "fastdcgan-autotune"
VERSION = 1
# What is slower by less than this is taken for as fast: the choice should not change with noise.
MARGIN = 0.03

# Of a chain on a CPU: calls by the rules, so that a short script measures nothing; and what measuring may take.
CALLS_BY_RULE = 2
BUDGET_S, BUDGET_SHARE = 2.0, 0.05  # in all, and more with every second that passes

_tuning = False
_ahead = False
_comparing = False  # on a CPU: a chain is being measured, and its contractions with it
_at_once = False
_by_rule = os.environ.get("FASTDCGAN_AUTOTUNE") == "off"  # read once: each forward would take 40 us for it
_spent, _since = 0.0, time.perf_counter()
_unwritten = False
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


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside a `with`, chains on a CPU are measured at their first call, however long it takes: what runs is to run for
    long, or to be told."""
    global _at_once
    before, _at_once = _at_once, True
    try:
        yield
    finally:
        _at_once = before


@contextlib.contextmanager
def by_rule() -> Iterator[None]:
    """Inside a `with`, nothing on a CPU is measured, nor depends on what was."""
    global _by_rule
    before, _by_rule = _by_rule, True
    try:
        yield
    finally:
        _by_rule = before


@contextlib.contextmanager
def comparing() -> Iterator[None]:
    """Inside a `with`, contractions on a CPU are measured; what is remembered is written at its end."""
    global _comparing, _spent
    before, _comparing = _comparing, True
    began = time.perf_counter()
    try:
        yield
    finally:
        _comparing = before
        _spent += time.perf_counter() - began
        if _unwritten:
            _write(path())


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
    """Whether our algorithms may be measured against PyTorch's own now."""
    return _comparing if device.type == "cpu" else is_welcome() and _idle(device)


def consulted(device: torch.device) -> bool:
    """Whether what runs may depend on what was measured: not on a CPU where bits should not."""
    return not (_by_rule or torch._C._get_deterministic_algorithms()) or device.type != "cpu"


def may_begin(calls: int) -> bool:
    """Whether a chain on a CPU that was called so often may be measured now."""
    if _at_once:
        return True
    return calls > CALLS_BY_RULE and _spent < BUDGET_S + BUDGET_SHARE * (time.perf_counter() - _since)


def is_at_once() -> bool:
    """Whether this is inside of `at_once`."""
    return _at_once


def spent() -> float:
    """Seconds that measuring on a CPU has taken so far."""
    return _spent


def is_welcome() -> bool:
    """Whether measuring our algorithms against PyTorch's own is wanted where it is possible."""
    return _tuning or (torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic)


def _idle(device: torch.device) -> bool:
    return device.type == "cuda" and not _ahead and not torch.cuda.is_current_stream_capturing()


# --- how long ---------------------------------------------------------------------------------------------------------

_WARM_UPS = 3
_ROUNDS = 20
# On a CPU: rounds at least, fewer of long calls, and at most; what is slower than the fastest by a factor is out.
_CPU_ROUNDS, _CPU_SECONDS, _SLOWER = (5, 40), 0.05, 1.15
_LONG_CPU_ROUNDS, _LONG_SECONDS, _SHORT_SECONDS = 2, 0.01, 0.001
_EXTRA_ROUNDS = 9
# A first call also makes what later ones find made, as oneDNN its code: that may take it so much longer.
_FIRST_SLOWER, _FIRST_SECONDS = 1.5, 0.15
_CACHE_SIZES = 4  # bytes written between two calls, in second-level caches
_PART = 1 << 15  # numbers that PyTorch writes by the calling thread alone: it is its cache that Python runs in
# The most that malloc of Linux still takes from its heap, once so much was freed. Until then, larger and larger tensors
# are pages of their own, new at each call: a chain of PyTorch's then takes up to twice as long as in a net in training.
_HEAP_BYTES = (32 << 20) - (64 << 10)


def milliseconds(
    calls: Mapping[Any, Callable[[], object]], device: torch.device, firsts: Mapping[Any, float] | None = None
) -> dict[Any, float]:
    """The median time of each call, taken in turns, on a GPU each with a cold second-level cache; `firsts` are those of
    first calls that were made."""
    if device.type == "cpu":
        return _cpu_milliseconds(calls, firsts)
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


def _cpu_milliseconds(
    calls: Mapping[Any, Callable[[], object]], firsts: Mapping[Any, float] | None = None
) -> dict[Any, float]:
    """The median time of each call: at least `_CPU_ROUNDS[0]` rounds, more where they are short; what is clearly slower
    leaves early, and what is left is measured no further when it is alone. The first call counts only for what leaves
    after it, and for what was alone from the beginning."""
    times = {name: [cpu_milliseconds(call) if firsts is None else firsts[name]] for name, call in calls.items()}
    limit = _FIRST_SLOWER * min(found[0] for found in times.values()) + 1000 * _FIRST_SECONDS
    left, spent = [name for name in times if times[name][0] <= limit], 0.0
    if len(times) == 1:
        return {name: found[0] for name, found in times.items()}
    times |= {name: [] for name in left}
    for i in range(_CPU_ROUNDS[1] if len(left) > 1 else 1):
        for name in left if i % 2 else reversed(left):
            times[name].append(cpu_milliseconds(calls[name]))
        spent += sum(times[name][-1] for name in left) / 1000
        least = min(map(min, times.values()))
        if i or least > 1000 * _SHORT_SECONDS:  # a short call may take long once for no reason of its own
            left = [name for name in left if min(times[name]) <= least * _SLOWER]
        rounds = _LONG_CPU_ROUNDS if least > 1000 * _LONG_SECONDS else _CPU_ROUNDS[0]
        if len(left) == 1 or (i + 1 >= rounds and spent > _CPU_SECONDS):
            break
    return {name: _median(found) for name, found in times.items()}


def cpu_milliseconds(call: Callable[[], object]) -> float:
    """One call on the CPU: the mean of one after other work and, where that is short, one after itself. In a net of
    large layers the caches hold none of what it needs, in one of small layers most of it."""
    first = _after_other_work(call)
    return first if first > 1000 * _LONG_SECONDS else (first + _timed(call)) / 2


def _after_other_work(call: Callable[[], object]) -> float:
    _something_else()
    return _timed(call)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def extra_milliseconds(name: str, call: Callable[[], object], part: Callable[[], object]) -> float:
    """How much longer a call on the CPU takes than a part of it, after other work: what the cache has under `name`, or
    is measured now. Chains in it run by the rule, and nothing else is measured."""
    where = machine(torch.device("cpu"))
    known = lookup("costs", where, name)
    if isinstance(known, float):
        return known
    with by_rule():
        extra = [_after_other_work(call) - _after_other_work(part) for _ in range(_EXTRA_ROUNDS)]
    found = max(0.0, _median(extra))
    remember("costs", where, name, found)
    return found


def _something_else() -> None:
    """What comes between two calls of a layer in a net: other layers' tensors, and other Python code. A call that is
    repeated at once finds its code, and the interpreter's objects, in the caches; a short one is then up to twice as
    fast as in a net."""
    # Also where images are only generated: tensors that are made in inference mode know no gradients ever after.
    with torch.inference_mode(False), torch.enable_grad():
        x, w, ones, written = _other_tensors()
        y = F.max_pool2d(F.batch_norm(F.conv2d(x, w, None, 1, 1), None, None, ones, ones, True), 2)
        y = F.interpolate(torch.cat([torch.sigmoid(y), y]), scale_factor=2.0)
        torch.autograd.grad(y.flatten(1).mean(), (x, w))
    for part in written.split(_PART):
        part.add_(1)
    textwrap.fill(__doc__, 40)


@lru_cache
def _other_tensors() -> tuple[Tensor, ...]:
    torch.empty(_HEAP_BYTES, dtype=torch.uint8)  # and freed
    x, w = torch.ones(4, 16, 16, 16).requires_grad_(), torch.ones(16, 16, 3, 3).requires_grad_()
    return x, w, torch.ones(16), torch.zeros(1 << 20)


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
        name = f"{processor()} | {instructions} | {torch.get_num_threads()} threads"
    found = [name, f"fastdcgan {__version__}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        # What our library was built for decides which of its kernels and tiles there are.
        found += [f"triton {_triton_version()}", f"built for {' '.join(build_info().cuda.architectures) or 'none'}"]
    return " | ".join(found)


@lru_cache
def processor() -> str:
    """The CPU's name, with family and model where Linux tells them: hypervisors give several generations one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # Each core has the same lines: the first core's are taken.
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{what} {facts[key]}" for key, what in (("cpu family", "family"), ("model", "model")) if key in facts]
    return f"{name} ({', '.join(numbers)})" if numbers else name


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
    """Add an entry to the file; where it can't be written, this process knows the entry all the same."""
    global _unwritten
    _read(path()).setdefault(where, {}).setdefault(kind, {})[key] = value
    _unwritten = True
    if not _comparing:
        _write(path())


def _write(file: Path) -> None:
    """The file is replaced as a whole: a reader sees the old one or the new one."""
    global _unwritten
    _unwritten = False
    known = _files.pop(file, {})  # another process may have written since
    entries = _read(file)
    for where, kinds in known.items():
        for kind, found in kinds.items():
            entries.setdefault(where, {}).setdefault(kind, {}).update(found)
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
