"""In which format a forward runs that gets contiguous tensors: as they are, or in channels_last (`reordered.py`).

The outermost forward decides, for the like of its call, by what is measured of the very calls that somebody makes: they
run in both formats in turns, until it is known which is faster.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdcgan import backends
from fastdcgan.dispatch import autotune
from fastdcgan.engine import chain, reordered
from fastdcgan.engine.place import Kept, is_computed_again, local, place
from fastdcgan.engine.planned import followed

ValueT = TypeVar("ValueT")

KIND = "formats"  # of what the autotune cache keeps
_CPU = torch.device("cpu")
_MOST_FORWARDS = 256  # of a module, by shape and mode
_FIRST_ROUNDS = 6  # of each format that don't count: chains are measured in them, and code is made
_LEAST_ROUNDS, _LEAST_SECONDS = 8, 0.1  # that count
_ORDER = (False, True, True, False)  # so that what comes every second or third round doesn't meet one format alone
_MOST_CALLS = 8  # of a round


class Trial:
    """Rounds of the like of a call in both formats, in turns, until it is known which is faster.

    A round ends with a backward through what was called, or with a call that none can follow: so calls of which one
    backward computes gradients (D of real and of generated images) are of one format.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        found = autotune.lookup(KIND, autotune.machine(_CPU), name)
        self.reorders = found if isinstance(found, bool) else None  # not yet known
        self._round = 0
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        self._begin()

    def _begin(self) -> None:
        self._forward, self._calls = 0.0, 0
        self._backward_since: float | None = None
        self._spent = autotune.spent()

    def _turn(self) -> bool:
        """Whether the round that runs is in channels_last: none of the first ones, so that short scripts have one
        format."""
        return self._round >= _FIRST_ROUNDS and _ORDER[self._round % len(_ORDER)]

    def run(self, forward: Callable[[], ValueT]) -> ValueT:
        turn, since = self._turn(), time.perf_counter()
        out, made = _in_format(forward, turn)
        if turn and not made:
            self.reorders = False
            return out
        self._calls, self._forward = self._calls + 1, self._forward + time.perf_counter() - since
        nodes = [t.grad_fn for t in _tensors(out) if t.grad_fn is not None]
        if not nodes or self._calls >= _MOST_CALLS:
            self._end(0.0)
        for node in nodes:
            node.register_prehook(lambda grads: self._backward_begins())
        return out

    def _backward_begins(self) -> None:
        if self._backward_since is None and self.reorders is None:
            self._backward_since = time.perf_counter()
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        if self._backward_since is not None:
            self._end(time.perf_counter() - self._backward_since)

    def _end(self, backward: float) -> None:
        if autotune.spent() == self._spent:
            self._seconds[self._turn()].append(self._forward + backward)
        self._round += 1
        self._begin()
        rounds = min(map(len, self._seconds.values())) - _FIRST_ROUNDS
        if rounds >= _LEAST_ROUNDS:
            as_it_is, other = (sorted(times[_FIRST_ROUNDS:][:rounds]) for times in self._seconds.values())
            if min(sum(as_it_is), sum(other)) > _LEAST_SECONDS:
                # Of the fastest half and three quarters: something else may have run beside the others.
                most = (rounds // 2, rounds * 3 // 4)
                self._decide(all(sum(other[:n]) < (1 - autotune.MARGIN) * sum(as_it_is[:n]) for n in most))

    def _decide(self, reorders: bool) -> None:
        self.reorders = reorders
        autotune.remember(KIND, autotune.machine(_CPU), self._name, reorders)


class Trials(Kept, dict[Hashable, Trial]):
    """By what sets calls of a module apart."""


def within() -> bool:
    """Whether a forward runs that has decided."""
    return getattr(local, "within", False)


def run(module: nn.Module, args: Sequence[Any], glance: Hashable | None, forward: Callable[[], ValueT]) -> ValueT:
    """`forward()` of a module whose calls `glance` sets apart, in the format that was measured to be faster."""
    if within() or glance is None or is_computed_again():
        return forward()
    trials = module.__dict__.setdefault("_trials", Trials())
    trial = trials.get(glance)
    if trial is not None and trial.reorders is False:
        return _as_it_is(forward)
    if not autotune.consulted(_CPU) or any(a.device.type != "cpu" for a in args):
        return _as_it_is(forward)
    if trial is None:
        if len(trials) >= _MOST_FORWARDS:
            trials.clear()
        trial = trials[glance] = Trial(_name(module, glance))
    if trial.reorders is None and chain.recorder is None:
        return trial.run(forward)
    return _in_format(forward, True)[0] if trial.reorders else _as_it_is(forward)


def _name(module: nn.Module, glance: Hashable) -> str:
    """Sets calls apart in the autotune cache, which other processes read: by what the module is made of."""
    kinds = [(name, type(part).__qualname__) for name, part in module.named_modules()]
    shapes = [(name, tuple(t.shape)) for name, t in module.named_parameters()]
    made_of = hashlib.sha256(repr((kinds, shapes)).encode()).hexdigest()
    return f"{type(module).__qualname__} {made_of[:16]} {glance!r}"


def undecided(module: nn.Module) -> bool:
    """Whether calls of the module that were made run in both formats in turns still."""
    return any(t.reorders is None for m in module.modules() for t in m.__dict__.get("_trials", {}).values())


def _as_it_is(forward: Callable[[], ValueT]) -> ValueT:
    local.within = True
    try:
        return forward()
    finally:
        local.within = False


def _in_format(forward: Callable[[], ValueT], reorders: bool) -> tuple[ValueT, bool]:
    """`forward()`, in channels_last or as it is, and whether anything came in the other format."""
    local.within, local.reordering, local.made = True, place() if reorders else None, []
    try:
        out = forward()
        reordered.make_contiguous(out)
        return out, bool(local.made)
    except BaseException:
        reordered.make_all_contiguous()
        raise
    finally:
        local.within, local.reordering, local.made = False, None, []


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, dict):
        values = [*values.values()]
    if isinstance(values, (tuple, list)):
        return [t for value in values for t in _tensors(value)]
    return [values] if isinstance(values, Tensor) else []


def keeping(forward: Callable) -> Callable:
    """A module's forward in the format that was measured to be faster."""

    @functools.wraps(forward)
    def kept(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or within() or followed(args[0] if args else None):
            return forward(self, *args, **kwargs)
        return run(self, args, glance(self, args, kwargs), lambda: forward(self, *args, **kwargs))

    return kept


def glance(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple | None:
    """Sets calls of a forward apart whose blocks are measured to be the same; None where it can't tell."""
    if kwargs or not all(type(a) is Tensor for a in args):
        return None
    return (
        *((a.shape, a.dtype, a.requires_grad) for a in args), module.training, torch.is_grad_enabled(),
        torch._C._is_any_autocast_enabled(), backends.requested(),
    )  # fmt: skip
