"""How a whole forward runs: fused, fused in channels_last where it gets contiguous tensors (`reordered.py`), or plain.

The outermost forward decides, for the like of its call, by what is measured of the very calls that somebody makes: they
run in each way in turns, until it is known which is the fastest. So what was misjudged of a chain by itself is seen.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdcgan import backends
from fastdcgan.dispatch import autotune
from fastdcgan.engine import chain, reordered
from fastdcgan.engine.place import Kept, is_computed_again, local, place
from fastdcgan.engine.planned import followed

ValueT = TypeVar("ValueT")

KIND = "forwards"  # of what the autotune cache keeps
_WAYS = PLAIN, AS_IT_IS, CHANNELS_LAST = "PyTorch's modules", "as it is", "in channels_last"
_CPU = torch.device("cpu")
_MOST_FORWARDS = 256  # of a module, by shape and mode
_RUN = 3  # rounds of a way in a row. The first doesn't count: memory is where another way needed it
_FIRST_RUNS = 2  # of each way that don't count: chains are measured in them, and code is made
_LEAST_ROUNDS, _LEAST_SECONDS = 8, 0.1  # that count
_MOST_CALLS = 8  # of a round


class Trial:
    """Rounds of the like of a call in each way, in turns, until it is known which is the fastest.

    A round ends with a backward through what was called, or with a call that none can follow: so calls of which one
    backward computes gradients (D of real and of generated images) run in one way.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # What is measured at once is a network of which nobody expects that plain modules are faster.
        ways = _WAYS[1:] if autotune.is_at_once() else _WAYS
        found = autotune.lookup(KIND, autotune.machine(_CPU), name)
        self.way: str | None = found if found in ways else None  # not yet known
        self.why = ""
        self._seconds: dict[str, list[float]] = {way: [] for way in ways}
        self._round = 0
        self._begin()

    def _begin(self) -> None:
        self._forward, self._calls = 0.0, 0
        self._backward_since: float | None = None
        self._spent = autotune.spent()

    def _turn(self) -> str:
        """How the round runs: the first ones all in one way, so that short scripts have one. What comes every second or
        third round meets each way as often."""
        ways, run = [*self._seconds], self._round // _RUN
        return AS_IT_IS if run < _FIRST_RUNS else ways[run % len(ways)]

    def run(self, forward: Callable[[], ValueT]) -> ValueT:
        way, since = self._turn(), time.perf_counter()
        out, made = _in_way(forward, way)
        if way == CHANNELS_LAST and not made:
            del self._seconds[way]
            self._decide()
            return out
        self._calls, self._forward = self._calls + 1, self._forward + time.perf_counter() - since
        nodes = [t.grad_fn for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn is not None]
        if not nodes or self._calls >= _MOST_CALLS:
            self._end(0.0)
        for node in nodes:
            node.register_prehook(lambda grads: self._backward_begins())
        return out

    def _backward_begins(self) -> None:
        if self._backward_since is None and self.way is None:
            self._backward_since = time.perf_counter()
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        if self._backward_since is not None:
            self._end(time.perf_counter() - self._backward_since)

    def _end(self, backward: float) -> None:
        if autotune.spent() == self._spent and self._round % _RUN:
            self._seconds[self._turn()].append(self._forward + backward)
        self._round += 1
        self._begin()
        self._decide()

    def _decide(self) -> None:
        if len(self._seconds) == 1:  # nothing is contiguous, and plain modules are no candidate
            self.way = AS_IT_IS
            return
        first = _FIRST_RUNS * (_RUN - 1)
        rounds = min(map(len, self._seconds.values())) - first
        if rounds < _LEAST_ROUNDS:
            return
        seconds = {way: sorted(times[first:][:rounds]) for way, times in self._seconds.items()}
        if min(map(sum, seconds.values())) < _LEAST_SECONDS:
            return
        # By the fastest half and three quarters: something else may have run beside the others. A way has to be faster
        # than those before it, so what gains nothing runs plain.
        sums = {way: [sum(times[: rounds // 2]), sum(times[: rounds * 3 // 4])] for way, times in seconds.items()}
        self.way, *others = sums
        for way in others:
            if all(a < (1 - autotune.MARGIN) * b for a, b in zip(sums[way], sums[self.way], strict=True)):
                self.way = way
        self.why = "measured in its network: " + ", ".join(
            f"{way} {1e3 * times[rounds // 2]:.4f} ms" for way, times in seconds.items()
        )
        autotune.remember(KIND, autotune.machine(_CPU), self._name, self.way)


class Trials(Kept, dict[Hashable, Trial]):
    """By what sets calls of a module apart."""


def within() -> bool:
    """Whether a forward runs that has decided."""
    return getattr(local, "within", False)


def run(module: nn.Module, args: Sequence[Any], glance: Hashable | None, forward: Callable[[], ValueT]) -> ValueT:
    """`forward()` of a module whose calls `glance` sets apart, in the way that was measured to be the fastest."""
    if within() or glance is None or is_computed_again():
        return forward()
    trials = module.__dict__.setdefault("_trials", Trials())
    trial = trials.get(glance)
    if (trial is not None and trial.way == AS_IT_IS) or not autotune.consulted(_CPU):
        return _having_decided(forward)
    if trial is None:
        if any(a.device.type != "cpu" for a in args):
            return _having_decided(forward)
        if len(trials) >= _MOST_FORWARDS:
            trials.clear()
        trial = trials[glance] = Trial(_name(module, args, glance))
    if chain.recorder is None:
        if trial.way == PLAIN:
            return _having_decided(forward, place())
        return trial.run(forward) if trial.way is None else _in_way(forward, trial.way)[0]
    since = len(chain.recorder)
    out = _in_way(forward, CHANNELS_LAST if trial.way == CHANNELS_LAST else AS_IT_IS)[0]
    if trial.way == PLAIN:
        chain.record_plain(since, trial.why or "measured in its network")
    return out


def _name(module: nn.Module, args: Sequence[Any], glance: Hashable) -> str:
    """Sets calls apart in the autotune cache, which other processes read: by what the module is made of."""
    kinds = [(name, type(part).__qualname__) for name, part in module.named_modules()]
    tensors = [(name, tuple(t.shape), t.stride()) for name, t in module.named_parameters()]
    made_of = hashlib.sha256(repr((kinds, tensors, [a.stride() for a in args])).encode()).hexdigest()
    return f"{type(module).__qualname__} {made_of[:16]} {glance!r}"


def undecided(module: nn.Module) -> bool:
    """Whether calls of the module that were made run in several ways in turns still."""
    return any(t.way is None for m in module.modules() for t in m.__dict__.get("_trials", {}).values())


def _having_decided(forward: Callable[[], ValueT], plain: tuple | None = None) -> ValueT:
    """`forward()` as it is, or by PyTorch's modules at the place `plain`."""
    local.within, local.plain = True, plain
    try:
        return forward()
    finally:
        local.within, local.plain = False, None


def is_plain() -> bool:
    """Whether the forward that runs now, and nothing within it that may be called again, runs PyTorch's modules."""
    at = getattr(local, "plain", None)
    return at is not None and at == place()


def _in_way(forward: Callable[[], ValueT], way: str) -> tuple[ValueT, bool]:
    """`forward()`, and whether anything came in another format than by itself."""
    here = place()
    local.within, local.made = True, []
    local.reordering, local.plain = here if way == CHANNELS_LAST else None, here if way == PLAIN else None
    try:
        out = forward()
        reordered.make_contiguous(out)
        return out, bool(local.made)
    except BaseException:
        reordered.make_all_contiguous()
        raise
    finally:
        local.within, local.made, local.reordering, local.plain = False, [], None, None


def keeping(forward: Callable) -> Callable:
    """A module's forward in the way that was measured to be the fastest."""

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
        *((a.shape, a.dtype, a.device, a.requires_grad) for a in args), module.training, torch.is_grad_enabled(),
        torch._C._is_any_autocast_enabled(), backends.requested(),
    )  # fmt: skip
