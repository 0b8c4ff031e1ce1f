"""The tile of a contraction: measured before, or now where `measured.tuning()` asks for it, or else the heuristic's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import triton

from fastdcgan.dispatch import autotune
from fastdcgan.kernels.tiles import Problem, TileConfig, device_of, heuristic, shortlist

KIND = "tiles"


def _choices() -> autotune.Choices[TileConfig]:
    return autotune.Choices(KIND, lambda entry: TileConfig(**entry), asdict)


_chosen = _choices()


def choose(problem: Problem, device: torch.device, attempt: Callable[[TileConfig], object]) -> TileConfig:
    """The tile for `problem`. `attempt` runs it with a tile; only measuring does that."""
    return _chosen.choose(
        problem,
        lambda: problem_key(problem),
        device,
        lambda: heuristic(problem, device_of(device)),
        lambda: fastest(shortlist(problem, device_of(device)), attempt, device),
    )


def fastest(configs: list[TileConfig], attempt: Callable[[TileConfig], object], device: torch.device) -> TileConfig:
    """The config with the least time. One that the device has no room for is left out; RuntimeError if all are."""
    return autotune.fastest(configs, attempt, device, (triton.runtime.errors.OutOfResources,))


def problem_key(problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    shape = "x".join(map(str, problem.shape))
    return f"{problem.op} {dtype} {shape} | {problem.prologue} | {problem.epilogue}"
