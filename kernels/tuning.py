"""The tile of a contraction: measured before, or now where `measured.tuning()` asks for it, or else the heuristic's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import triton

from fastdcgan.backends import measured
from fastdcgan.kernels.tiles import Problem, TileConfig, device_of, heuristic, shortlist

KIND = "tiles"

_chosen: dict[tuple[Problem, torch.device], TileConfig] = {}  # asking the file takes longer than some kernels


def choose(problem: Problem, device: torch.device, attempt: Callable[[TileConfig], object]) -> TileConfig:
    """The tile for `problem`. `attempt` runs it with a tile; only measuring does that."""
    found = _chosen.get((problem, device))
    searching = measured.may_search(device)
    if found is None or searching:
        known = _known(problem, device)
        if known is None and searching:
            known = fastest(shortlist(problem, device_of(device)), attempt, device)
            measured.remember(KIND, measured.gpu_key(device), problem_key(problem), asdict(known))
        found = known or heuristic(problem, device_of(device))
        _chosen[problem, device] = found
    return found


def _known(problem: Problem, device: torch.device) -> TileConfig | None:
    entry = measured.lookup(KIND, measured.gpu_key(device), problem_key(problem))
    try:
        return None if entry is None else TileConfig(**entry)
    except (TypeError, ValueError) as error:
        measured.ignored(error)
        return None


def fastest(configs: list[TileConfig], attempt: Callable[[TileConfig], object], device: torch.device) -> TileConfig:
    """The config with the least time. One that the device has no room for is left out; RuntimeError if all are."""
    calls: dict[TileConfig, Callable[[], object]] = {}
    for config in configs:
        try:
            attempt(config)
        except triton.runtime.errors.OutOfResources:
            continue
        calls[config] = lambda config=config: attempt(config)  # type: ignore[misc]
    if not calls:
        raise RuntimeError(f"none of {len(configs)} tiles fits this device: {configs}")
    times: Mapping[Any, float] = measured.milliseconds(calls, device)
    return min(calls, key=lambda config: times[config])


def problem_key(problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    shape = "x".join(map(str, problem.shape))
    return f"{problem.op} {dtype} {shape} | {problem.prologue} | {problem.epilogue}"
