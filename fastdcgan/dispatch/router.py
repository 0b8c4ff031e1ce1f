"""What "auto" is on a GPU: each contraction runs wherever it is fastest.

The routes are the kernels of our own backends, and PyTorch's convolution (cuDNN) between our passes for normalisation
and activation. What was measured decides (`measured.py` says when that is); of two routes as fast as each other ours is
taken, which gives the same bits on every run. Where nothing was measured, our kernels run if they cover the call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdcgan.backends.base import Backend
from fastdcgan.dispatch import autotune
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Boundaries, Epilogue, Operand, memory_format

KIND = "routes"
LIBRARY = "pytorch"  # the name of the route through PyTorch's own convolution


@dataclass(frozen=True)
class Route:
    """Where one call of a contraction goes, and why."""

    name: str
    call: Callable[..., Any]
    why: str
    settled: bool  # measured, or there was no choice


class AutoBackend(Backend):
    """The best of `candidates`, in their order of preference; the first also does all that is no contraction."""

    name = "auto"
    chooses_boundaries = True

    def __init__(self, candidates: Sequence[Backend]) -> None:
        self.candidates = list(candidates)
        self.passes = self.candidates[0]
        self._routes: dict[Any, Route] = {}

    def covers(self, device_type: str, dtype: torch.dtype) -> str | None:
        return self.passes.covers(device_type, dtype)

    def boundaries(self, blocks: Sequence, weights: Sequence[Tensor], size: Pair, needs: Sequence[bool]) -> Boundaries:
        return self.passes.boundaries(blocks, weights, size, needs)

    # --- contractions ---

    def conv(self, a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
        key = ("conv", _operand(a), _tensor(weight), geometry, _epilogue(epilogue))
        return self._run(key, a.x.device, a, weight, geometry, epilogue)

    def conv_transpose(
        self, a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor]:
        key = ("conv_transpose", _operand(a), _tensor(weight), geometry, tuple(output_size), _epilogue(epilogue))
        return self._run(key, a.x.device, a, weight, geometry, output_size, epilogue)

    def weight_grad(self, gathered: Operand, linear: Operand, geometry: Geometry) -> Tensor:
        key = ("weight_grad", _operand(gathered), _operand(linear), geometry)
        return self._run(key, gathered.x.device, gathered, linear, geometry)

    def _run(self, key: tuple, device: torch.device, *args: Any) -> Any:
        route = self._routes.get((device, key))
        if route is None or (not route.settled and autotune.may_compare(device)):
            route = self._routes[device, key] = self._choose(key, device, args)
        if self.seen is not None:
            self.seen.append(f"{route.name}: {route.why}")
        return route.call(*args)

    def _choose(self, key: tuple, device: torch.device, args: tuple) -> Route:
        op = key[0]
        library = getattr(super(), op)  # with this backend's passes before and after it
        reasons = {b.name: b.why_not(op, *args) for b in self.candidates}
        calls = {b.name: getattr(b, op) for b in self.candidates if reasons[b.name] is None}
        if not calls:
            return Route(LIBRARY, library, "; ".join(f"not {name}: {why}" for name, why in reasons.items()), True)
        calls[LIBRARY] = library
        gpu, name = autotune.gpu_key(device), repr(key)
        times = _parsed(autotune.lookup(KIND, gpu, name), calls)
        if times is None and autotune.may_compare(device):
            times = self._measure(calls, device, args)
            autotune.remember(KIND, gpu, name, times)
        if times is None:
            first = next(iter(calls))
            return Route(first, calls[first], "not measured", False)
        best = fastest(times)
        found = ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items())
        return Route(best, calls[best], f"measured: {found}", True)

    def _measure(self, calls: dict[str, Callable], device: torch.device, args: tuple) -> dict[str, float]:
        able = {}
        for name, call in calls.items():
            try:
                call(*args)
            # Whatever keeps one of our kernels from running here, PyTorch's own is there.
            except Exception as error:
                if name == LIBRARY:
                    raise
                warnings.warn(f"'auto' leaves out backend {name!r}: {type(error).__name__}: {error}", stacklevel=2)
                continue
            able[name] = functools.partial(call, *args)
        return autotune.milliseconds(able, device)

    # --- all else ---

    def norm_act(self, a: Operand) -> Tensor:
        return self.passes.norm_act(a)

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        return self.passes.norm_act_reduce(da, y, coef, act, slope)

    def grad_stats(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        return self.passes.grad_stats(da, y, coef, act, slope)

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        return self.passes.batch_stats(y, stat_groups)

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        return self.passes.coefficients(mean, var, weight, bias, shift, eps)

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: float) -> Tensor:
        return self.passes.grad_coefficients(sums, coef, count)

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        self.passes.update_running(mean, var, stats, shift, factor, momentum)


def fastest(times: dict[str, float]) -> str:
    """The name with the least time; of those within `measured.MARGIN` of it the first."""
    least = min(times.values())
    return next(name for name, ms in times.items() if ms * (1 - autotune.MARGIN) <= least)


def _parsed(entry: Any, calls: dict[str, Callable]) -> dict[str, float] | None:
    """Times by route in the order of preference, or None where they are not of these routes."""
    if entry is None:
        return None
    try:
        times = {name: float(entry[name]) for name in calls if name in entry}
        if not times or not set(entry) <= set(calls):
            return None  # of an installation with other backends
    except (TypeError, ValueError) as error:
        autotune.ignored(error)
        return None
    return times


# --- what sets one call apart from others -----------------------------------------------------------------------------


def _tensor(x: Tensor) -> tuple:
    return (tuple(x.shape), x.dtype, memory_format(x))


def _operand(a: Operand) -> tuple:
    return (_tensor(a.x), a.y is not None, None if a.coef is None else tuple(a.coef.shape), a.act)


def _epilogue(e: Epilogue) -> tuple:
    return (e.kind, None if e.coef is None else tuple(e.coef.shape), e.act, e.stat_groups)
