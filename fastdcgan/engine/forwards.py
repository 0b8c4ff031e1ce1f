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
from fastdcgan.engine.pending import Waiting
from fastdcgan.engine.place import Kept, is_computed_again, local, place
from fastdcgan.engine.planned import followed

ValueT = TypeVar("ValueT")

KIND = "forwards"  # of what the autotune cache keeps
_WAYS = PLAIN, AS_IT_IS, CHANNELS_LAST = "PyTorch's modules", "as it is", "in channels_last"
TENSORS = (Tensor, nn.Parameter)  # of which it can be told what they are at a glance
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

    def run(self, plain: Callable[[], ValueT], fused: Callable[[], ValueT]) -> ValueT:
        way, since = self._turn(), time.perf_counter()
        out, made = _in_way(plain if way == PLAIN else fused, way)
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


def run(
    module: nn.Module, plain: Callable[..., ValueT], fused: Callable[..., ValueT], args: tuple,
    kwargs: dict[str, Any], settings: tuple = (),
) -> ValueT:  # fmt: skip
    """A module's forward, `plain` or `fused`, with `settings` after its `args`: as the forward runs that calls it, or
    in the way that was measured to be the fastest for the like of the call."""
    if torch.compiler.is_compiling():
        return fused(module, *args, *settings, **kwargs)
    if local.within:
        return (plain if is_plain() else fused)(module, *args, *settings, **kwargs)
    known, trials = glance(module, args, kwargs, settings), module.__dict__.get("_trials")
    trial = None if trials is None else trials.get(known)
    # Asked first, since the shortest forwards come to it. Plain modules are right whoever follows the call.
    plain_now = trial is not None and trial.way == PLAIN and chain.recorder is None and not is_computed_again()
    if plain_now and autotune.consulted(_CPU):
        return _having_decided(place(), plain, module, *args, *settings, **kwargs)
    if known is None or is_computed_again() or is_followed(args[0] if args else None):
        return fused(module, *args, *settings, **kwargs)
    if (trial is not None and trial.way == AS_IT_IS) or not autotune.consulted(_CPU):
        return _having_decided(None, fused, module, *args, *settings, **kwargs)
    if trial is None:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if any(t.device.type != "cpu" for t in tensors):
            return _having_decided(None, fused, module, *args, *settings, **kwargs)
        if trials is None or len(trials) >= _MOST_FORWARDS:
            trials = module.__dict__["_trials"] = Trials()
        trial = trials[known] = Trial(_name(module, tensors, known))
    call = functools.partial(fused, module, *args, *settings, **kwargs)
    if chain.recorder is None:
        if trial.way is None:
            return trial.run(functools.partial(plain, module, *args, *settings, **kwargs), call)
        return _in_way(call, trial.way)[0]
    since = len(chain.recorder)
    out = _in_way(call, CHANNELS_LAST if trial.way == CHANNELS_LAST else AS_IT_IS)[0]
    if trial.way == PLAIN:
        chain.record_plain(since, trial.why or "measured in its network")
    return out


def glance(module: nn.Module, args: tuple, kwargs: dict[str, Any], settings: tuple = ()) -> tuple | None:
    """Sets calls of a forward apart whose blocks are measured to be the same; None where it can't tell."""
    found = [module.training, torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(), backends.requested()]
    for a in (*args, *kwargs, *kwargs.values()):
        if type(a) in TENSORS and not a.is_nested:
            found += (a.shape, a.dtype, a.device, a.requires_grad)
        elif a is None or type(a) in (bool, str):
            found.append(a)
        else:  # of numbers there may be a new one in each call
            return None
    return (*found, *settings)


def is_followed(x: Any) -> bool:
    """Whether somebody else follows what is called, out of whose sight blocks would be computed, or `x` is none that a
    chain takes."""
    if followed(x):
        return True
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    # That of torch.set_default_device only adds a device to what is made anew.
    return not all(isinstance(mode, Waiting) or type(mode).__name__ == "DeviceContext" for mode in modes)


def _name(module: nn.Module, tensors: Sequence[Tensor], glance: tuple) -> str:
    """Sets calls apart in the autotune cache, which other processes read: by what the module is made of."""
    kinds = [(name, type(part).__qualname__) for name, part in module.named_modules()]
    parameters = [(name, tuple(t.shape), t.stride()) for name, t in module.named_parameters()]
    made_of = hashlib.sha256(repr((kinds, parameters, [t.stride() for t in tensors])).encode()).hexdigest()
    return f"{type(module).__qualname__} {made_of[:16]} {glance!r}"


def undecided(module: nn.Module) -> bool:
    """Whether calls of the module that were made run in several ways in turns still."""
    return any(t.way is None for m in module.modules() for t in m.__dict__.get("_trials", {}).values())


def _having_decided(plain: tuple | None, forward: Callable[..., ValueT], *args: Any, **kwargs: Any) -> ValueT:
    """A forward as it is, or by PyTorch's modules at the place `plain`."""
    local.within, local.plain = True, plain
    try:
        return forward(*args, **kwargs)
    finally:
        local.within, local.plain = False, None


def is_plain() -> bool:
    """Whether the forward that runs now, and nothing within it that may be called again, runs PyTorch's modules."""
    return local.plain is not None and local.plain == place()


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
        return run(self, forward, forward, args, kwargs)

    return kept
