"""The one place that chooses by which algorithm a contraction runs, on CPUs and GPUs alike.

The backends offer algorithms in their order of preference, and PyTorch's own convolution between our passes can run
every call. What was measured on this machine decides (`autotune.py` says when that is); of two that are as fast as each
other the first is taken. Where nothing was measured, the first that can run is taken, those with a `why_last` after the
others. On a GPU "auto" tries it first: one that can't run there, for want of a compiler or of shared memory, is left
out, with a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.dispatch import autotune
from fastdcgan.spec import Algorithm, Call, Epilogue, Operand, says_channels_last

PYTORCH = "pytorch"  # the algorithm of PyTorch's own convolution
KIND = "algorithms"  # of what the autotune cache keeps
MOST_ROUTES = 4096  # that are kept: shapes may go on changing
_SILENT_S = 2.0
_COMPILING = "fastdcgan: compiling kernels for this GPU, which Triton keeps for the next time ..."

# Measured on a CPU, an algorithm that took so many times as long as the fastest for a batch of half to twice as many is
# not tried: a network has the same contraction with other prologues and epilogues, and of two batches.
SLOWER, BATCHES = 1.25, 2

# Of the time that the products of an algorithm alone take: another that was faster than that is faster. The rest is for
# the measured rate of the processor, which other work may have slowed down.
SURE = 0.9

_routes: dict[Any, Route] = {}
_alike: dict[Any, tuple[int, dict[str, float]]] = {}  # the batch, and what its algorithms took
_seen: list[str] | None = None
_measuring_s = 0.0  # that measuring contractions on this machine has taken so far


class Route(NamedTuple):
    """How a call of a contraction runs, and why."""

    algorithm: Algorithm
    tile: Any
    why: str
    settled: bool  # measured, or there was no choice

    def run(self, call: Call) -> Any:
        if _seen is not None:
            _seen.append(f"{self.algorithm.name}: {self.why}" if self.why else self.algorithm.name)
        return self.algorithm.run(call, self.tile)


def run(call: Call, backend: str) -> Any:
    """Run a contraction by the best algorithm of the backend. Shapes and results: `Call`, `dispatch/primitives.py`."""
    return route(call, backend).run(call)


def route(call: Call, backend: str) -> Route:
    """The route of a call: chosen once for its signature and PyTorch's settings, and again once it may be measured."""
    key = (backend, call.a.x.device, signature(call), settings(backend))
    found = _routes.get(key)
    if found is None or (not found.settled and autotune.may_compare(call.a.x.device)):
        if len(_routes) >= MOST_ROUTES:
            _routes.clear()
            _alike.clear()
        found = _routes[key] = _choose(call, backend)
    return found


def settings(backend: str) -> tuple:
    """What a route depends on beside the call: PyTorch's settings, and whether anything may be measured."""
    return (*autotune.state(), *backends.get(backend).settings())


@contextlib.contextmanager
def recording() -> Iterator[list[str]]:
    """Inside a `with`, every contraction that runs says in the list how, for `explain`."""
    global _seen
    before, _seen = _seen, []
    try:
        yield _seen
    finally:
        _seen = before


def milliseconds_besides(call: Callable[[], object]) -> float:
    """What `call()` takes, but for measuring the contractions that it runs."""
    began, before = time.perf_counter(), _measuring_s
    call()
    return 1000 * (time.perf_counter() - began - (_measuring_s - before))


def is_recording() -> bool:
    """Whether this is inside of `recording`."""
    return _seen is not None


@contextlib.contextmanager
def compiling_ahead(backend: str) -> Iterator[bool]:
    """Inside a `with`, kernels that the backend compiles at their first use are compiled, by several threads, and not
    run; says whether it has such. What runs meanwhile gives no numbers, and whoever runs it has to put all back."""
    found = [one for one in backends.members(backend) if one.compiles]
    say = threading.Timer(_SILENT_S, print, (_COMPILING,), {"file": sys.stderr, "flush": True})
    with contextlib.ExitStack() as stack:
        if found:
            stack.callback(say.cancel)
            say.start()
            stack.enter_context(autotune.ahead())
        for one in found:
            stack.enter_context(one.compiling_ahead())
        yield bool(found)


# --- choosing ---------------------------------------------------------------------------------------------------------


def offered(backend: str, op: str) -> list[Algorithm]:
    """The algorithms of a backend, PyTorch's own convolution at last; "auto" has those of all backends on the GPU."""
    found = [a for one in backends.members(backend) for a in one.algorithms(op)]
    own = backends.get(backend)
    return [*found, Algorithm(PYTORCH, lambda call: None, own.pytorch, least_ms=own.direct_ms)]


def _choose(call: Call, backend: str) -> Route:
    global _measuring_s
    algorithms = offered(backend, call.op)
    reasons = {a.name: a.why_not(call) for a in algorithms}
    able = [a for a in algorithms if reasons[a.name] is None]
    late = {a.name: a.why_last(call) for a in able}
    able.sort(key=lambda a: late[a.name] is not None)
    device = call.a.x.device
    others: dict[str, list[str]] = {}
    for name, why in (reasons | late).items():
        if why is not None:
            others.setdefault(why, []).append(name)
    why_others = "; ".join(f"not {', '.join(names)}: {why}" for why, names in others.items())
    if len(able) == 1 and able[0].tiles is None:
        return Route(able[0], None, why_others, True)
    name, searching = repr(signature(call)), autotune.may_search(device)
    entry = autotune.lookup(KIND, autotune.machine(device), name) if autotune.consulted(device) else None
    known = _known(entry, able, call)
    if known is not None and not (searching and not known.searched) and _runs(known.route, call, backend):
        return known.route
    if autotune.is_ahead():
        for algorithm in able if autotune.is_welcome() else able[:1]:
            if algorithm.name != PYTORCH:
                _attempt(algorithm, call, None)
        return Route(able[0], None, "", False)
    if searching or autotune.may_compare(device):
        likely = able if device.type == "cuda" else _likely(able, call)
        began = time.perf_counter()
        made = _measure(likely, call, searching)
        _measuring_s += time.perf_counter() - began
        if likely is able:
            least = {a.name: a.least_ms(call) for a in able}  # of what was not tried
            _alike[_but_batch(call)] = (len(call.a.x), least | made["milliseconds"])
        autotune.remember(KIND, autotune.machine(device), name, made)
        known = _known(made, able, call)
        assert known is not None
        return known.route
    routes = (Route(a, None, why_others if a.name == PYTORCH else "not measured", False) for a in able)
    return next(route for route in routes if _runs(route, call, backend))


def _runs(route: Route, call: Call, backend: str) -> bool:
    """Whether a route can be taken: "auto" finds out by taking it, and what was asked for by name may fail later."""
    return backend != "auto" or route.algorithm.name == PYTORCH or _attempt(route.algorithm, call, route.tile)


def _attempt(algorithm: Algorithm, call: Call, tile: Any) -> bool:
    """Whether an algorithm runs a call here, with a warning if not; PyTorch's own has to run."""
    try:
        algorithm.run(call, tile)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Whatever keeps one of our kernels from running here, PyTorch's own is there.
        if algorithm.name == PYTORCH:
            raise
        what = f"algorithm {algorithm.name!r}" + ("" if tile is None else f" with {tile}")
        warnings.warn(f"fastdcgan leaves {what} out: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


class _Known(NamedTuple):
    route: Route
    searched: bool  # among tiles too


def _known(entry: Any, able: Sequence[Algorithm], call: Call) -> _Known | None:
    """The route that an entry of the autotune cache says, or None where it is of other algorithms or tiles than this
    installation has."""
    if entry is None:
        return None
    try:
        times = {str(name): float(ms) for name, ms in entry["milliseconds"].items()}
        algorithm = next((a for a in able if a.name == entry["algorithm"]), None)
        if algorithm is None or not set(times) <= {a.name for a in able}:
            return None
        tile = entry["tile"]
        if tile is not None:
            if algorithm.tiles is None or algorithm.tile_type is None:
                return None
            tile = algorithm.tile_type(**tile)
            if tile not in algorithm.tiles(call):
                return None
        searched = bool(entry["searched"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        autotune.ignored(error)
        return None
    why = ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items())
    return _Known(Route(algorithm, tile, f"measured: {why}", True), searched)


def _likely(able: Sequence[Algorithm], call: Call) -> Sequence[Algorithm]:
    """Those that may be the fastest, by what was measured of a call that differs in its prologue, its epilogue and its
    batch at most."""
    batch, times = _alike.get(_but_batch(call), (0, {}))
    known = [times[a.name] for a in able if a.name in times]
    if not known or max(batch, len(call.a.x)) > BATCHES * min(batch, len(call.a.x)):
        return able
    return [a for a in able if times.get(a.name, 0.0) <= SLOWER * min(known)]


def _measure(able: Sequence[Algorithm], call: Call, searching: bool) -> dict[str, Any]:
    """An entry for the autotune cache: the least time of each algorithm, and the best of them with its tile.

    An algorithm, or a tile of one, that can't run here is left out with a warning; PyTorch's own has to run. What can't
    be faster than another was is not tried.
    """
    calls: dict[tuple[str, Any], Callable[[], object]] = {}
    firsts: dict[tuple[str, Any], float] = {}

    def attempt(algorithms: Sequence[Algorithm]) -> None:
        for algorithm in algorithms:
            choices = list(algorithm.tiles(call)) if searching and algorithm.tiles is not None else [None]
            for tile in choices:
                since = time.perf_counter()
                if _attempt(algorithm, call, tile):
                    firsts[algorithm.name, tile] = 1000 * (time.perf_counter() - since)
                    calls[algorithm.name, tile] = functools.partial(algorithm.run, call, tile)

    least = {a.name: a.least_ms(call) for a in able}
    attempt([a for a in able if not least[a.name]])
    rest = [a for a in able if least[a.name]]
    if rest and firsts:
        bound, soonest = SURE * min(least[a.name] for a in rest), min(firsts, key=firsts.__getitem__)
        if firsts[soonest] >= bound:  # a first call may make what later ones find made
            firsts[soonest] = min(firsts[soonest], autotune.cpu_milliseconds(calls[soonest]))
        rest = rest if firsts[soonest] >= bound else []
    attempt(rest)
    times = autotune.milliseconds(calls, call.a.x.device, firsts)
    best: dict[str, tuple[float, Any]] = {}
    for (name, tile), ms in times.items():
        if name not in best or ms < best[name][0]:
            best[name] = ms, tile
    in_order = {a.name: best[a.name][0] for a in able if a.name in best}
    name = fastest(in_order)
    tile = best[name][1]
    return {
        "algorithm": name,
        "tile": None if tile is None else dataclasses.asdict(tile),
        "milliseconds": in_order,
        "searched": searching,
    }


def fastest(times: dict[str, float]) -> str:
    """The name with the least time; of those within `autotune.MARGIN` of it the first."""
    least = min(times.values())
    return next(name for name, ms in times.items() if ms * (1 - autotune.MARGIN) <= least)


# --- what sets one call apart from others -----------------------------------------------------------------------------


def signature(call: Call) -> tuple:
    """All that the choice of an algorithm depends on: shapes, dtypes, memory formats, prologue and epilogue."""
    b = _operand(call.b) if call.op == "weight_grad" else _tensor(call.b)
    return (call.op, _operand(call.a), b, call.geometry, call.size, _epilogue(call.epilogue), call.stays)


def _but_batch(call: Call) -> tuple:
    """What `_likely` compares."""
    grad = call.op == "weight_grad"
    (x_shape, *x), (b_shape, *b) = _tensor(call.a.x), _tensor(call.b.x if grad else call.b)
    return (call.op, x_shape[1:], *x, b_shape[1:] if grad else b_shape, *b, call.geometry, call.size, call.stays)


def _tensor(x: Tensor) -> tuple:
    return (tuple(x.shape), x.dtype, says_channels_last(x))


def _operand(a: Operand) -> tuple:
    return (_tensor(a.x), a.y is not None, None if a.coef is None else tuple(a.coef.shape), a.act)


def _epilogue(e: Epilogue) -> tuple:
    return (e.kind, None if e.coef is None else tuple(e.coef.shape), e.act, e.stat_groups)
