"""Measured tiles: a cache on disk, and measuring for it, only where `tuning()` asks for that.

The cache is one JSON file, `tiles.json` in `fastdcgan` of the user's cache folder, or the file that FASTDCGAN_TILES
names. Entries are of one GPU and one set of versions; a file that is not of this format is left alone, with a warning.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from fastdcgan.kernels.tiles import Device, Problem, TileConfig, device_of, heuristic, search_space

FORMAT = "fastdcgan-tiles"
VERSION = 1

_tuning = False
_files: dict[Path, dict[str, dict[str, TileConfig]]] = {}  # each file is read once


def path() -> Path:
    """The cache file."""
    named = os.environ.get("FASTDCGAN_TILES")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdcgan"
    return Path(named) if named else folder / "tiles.json"


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Inside a `with`, contractions whose tile was never measured here are measured, and the best tile is kept."""
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before


def choose(problem: Problem, device: torch.device, attempt: Callable[[TileConfig], object]) -> TileConfig:
    """The tile for `problem`: measured before, or measured now by running `attempt`, or else the heuristic's."""
    found = device_of(device)
    known = _read(path()).get(device_key(found), {}).get(problem_key(problem))
    if known is not None:
        return known
    if not _tuning or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return heuristic(problem, found)
    best = fastest(search_space(problem, found), attempt, _milliseconds)
    remember(path(), found, problem, best)
    return best


def fastest(
    configs: list[TileConfig],
    attempt: Callable[[TileConfig], object],
    time: Callable[[Callable[[], object]], float],
) -> TileConfig:
    """The config with the least `time`. One that the device has no room for is left out; RuntimeError if all are."""
    times: dict[TileConfig, float] = {}
    for config in configs:
        try:
            times[config] = time(lambda config=config: attempt(config))  # type: ignore[misc]
        except triton.runtime.errors.OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"none of {len(configs)} tiles fits this device: {configs}")
    return min(times, key=lambda config: times[config])


def _milliseconds(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")


# --- the cache -------------------------------------------------------------------------------------------------------


def device_key(device: Device) -> str:
    """What measured times hold for: the GPU, and what generates its code."""
    return f"{device.name} | triton {triton.__version__} | torch {torch.__version__}"


def problem_key(problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    shape = "x".join(map(str, problem.shape))
    return f"{problem.op} {dtype} {shape} | {problem.prologue} | {problem.epilogue}"


def remember(file: Path, device: Device, problem: Problem, config: TileConfig) -> None:
    """Add an entry to the file, which is replaced as a whole: a reader sees the old one or the new one."""
    _files.pop(file, None)  # another process may have written since
    entries = _read(file)
    entries.setdefault(device_key(device), {})[problem_key(problem)] = config
    plain = {gpu: {key: asdict(tile) for key, tile in tiles.items()} for gpu, tiles in entries.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w") as out:
            json.dump({"format": FORMAT, "version": VERSION, "tiles": plain}, out, indent=1, sort_keys=True)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _read(file: Path) -> dict[str, dict[str, TileConfig]]:
    if file not in _files:
        try:
            _files[file] = _parsed(json.loads(file.read_text())) if file.exists() else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"measured tiles in {file} are ignored: {type(error).__name__}: {error}", stacklevel=2)
            _files[file] = {}
    return _files[file]


def _parsed(content: Any) -> dict[str, dict[str, TileConfig]]:
    found = {key: content[key] for key in ("format", "version")}
    if found != {"format": FORMAT, "version": VERSION}:
        raise ValueError(f"is {found}: expected {FORMAT}, version {VERSION}")
    return {gpu: {key: TileConfig(**tile) for key, tile in tiles.items()} for gpu, tiles in content["tiles"].items()}
