"""A chain of blocks: planned once for a signature, run many times behind a guard.

Where its blocks come from is a subclass's matter: modules of a Sequential (`module_chain.py`), or functions that a
forward calls (`deferred.py`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import autotune, primitives, router
from fastdcgan.engine import choice
from fastdcgan.engine.match import WHY_BARE
from fastdcgan.engine.place import is_computed_again
from fastdcgan.engine.planned import Planned, autocast_dtype, compute_dtype
from fastdcgan.spec import Block, BlockTensors, Running, says_channels_last

_PLANS = 64  # of a chain, for as many signatures


@dataclass
class Record:
    """What `explain` saw of one block that ran."""

    conv: Any  # its first module, or the weight of that
    pattern: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    backend: str | None  # None: PyTorch's own modules ran
    route: str  # how its contraction ran, or why PyTorch's modules did


recorder: list[Record] | None = None  # where `explain` collects them


def fuses_too_little(gain: float | None, cost: Callable[[], float], since: int) -> bool:
    """Whether chains that together `gain` so many milliseconds over PyTorch's modules should run as those, since what
    comes before any chain runs has a cost; the blocks recorded `since` then say so. Not where a gain isn't known, nor
    where the backward computes the call again: it has to save the same tensors."""
    if gain is None or is_computed_again() or (gain > 0 and gain > (least := cost())):
        return False
    if gain > 0:
        record_plain(since, f"its module would gain {gain:.3f} ms, and guarding that costs {least:.3f} ms")
    return True


def record_plain(since: int, why: str) -> None:
    """That the blocks recorded `since` then don't run fused."""
    for i in range(since, len(recorder or ())):
        if recorder is not None and recorder[i].backend is not None:
            recorder[i] = replace(recorder[i], backend=None, route=why)


_METADATA = operator.attrgetter("dtype", "device", "shape", "requires_grad", "__class__")


class Chain:
    """A chain, with its plans."""

    bare = False  # it is one convolution with nothing to fuse to it
    convolves = True  # at all: autocast then casts what comes in

    def __init__(self) -> None:
        self._plans: dict[tuple, Planned] = {}
        # `brief`s of calls that PyTorch's modules run fastest, and why that is known.
        self._plain: dict[tuple, str] = {}
        self.gain: float | None = None  # `Planned.gain` of what `run` ran last

    # --- what a subclass says of its blocks ---

    def blocks(self, backend: str) -> list[Block]:
        """What is to be run."""
        raise NotImplementedError

    def entered(self, x: Tensor) -> Tensor:
        """What the first block gets for an input: a batch, with the padding that it does not apply itself."""
        return x

    def shared(self) -> tuple[Hashable, ...]:
        """For each norm that may share its statistics with other processes: with which, or None."""
        return ()

    def records(self) -> list[tuple[Any, str, bool]]:
        """`Record.conv` and `Record.pattern` of each block, and whether it convolves."""
        raise NotImplementedError

    # --- for all of them ---

    def run(
        self,
        x: Tensor,
        tensors: Sequence[BlockTensors],
        running: Sequence[Running | None],
        stat_groups: int,
        boundaries: str,
        brief: tuple,
    ) -> Tensor | None:
        """The output for `x` [N, C, H, W] or [C, H, W]; `running` is updated. None, and nothing is done, where
        PyTorch's modules should run: `brief` sets a call apart from those that they don't run fastest."""
        given = [x, *(t for block in tensors for t in block)]
        direct = primitives.unwatched(*given)
        if not direct and not torch.compiler.is_compiling() and any(map(_knows_only_torch, given)):
            return None
        given[0] = entered = self.entered(x)
        autocast = autocast_dtype(x) if self.convolves else None
        backend = backends.select(backends.requested(), x.device.type, autocast or x.dtype)
        planned = None
        if direct:
            key = self._key(entered, tensors, stat_groups, boundaries, backend, autocast, given)
            planned = self._plans.get(key)
        if planned is None:
            planned = self._planned(entered, tensors, stat_groups, boundaries, backend, direct)
            if direct:
                if len(self._plans) >= _PLANS:
                    self._plans.clear()
                self._plans[key] = planned
                planned.settled = not self.has_choice(entered, boundaries, backend)
        if not planned.settled:
            planned = self._plans[key] = self._choose(planned, x, tensors, running, stat_groups, backend)
        self.gain = planned.gain
        if self.bare and not planned.settled:
            self._record(x, None, [WHY_BARE])
            return None
        if planned.why_modules is not None and not is_computed_again():
            if len(self._plain) >= _PLANS:
                self._plain.clear()
            self._plain[brief] = planned.why_modules  # from the next call on
        if recorder is None or torch.compiler.is_compiling():
            out = planned(entered, tensors, running)
        else:
            with router.recording() as routes:
                out = planned(entered, tensors, running)
            why = planned.why_contiguous
            self._record(entered, backend if why is None else None, routes if why is None else [why])
        return out if entered.dim() == x.dim() else out[0]

    def why_plain(self, x: Tensor, brief: tuple) -> str | None:
        """Why PyTorch's modules run fastest, or None where that isn't known."""
        why = self._plain.get(brief) if self._plain else None
        if why is not None:
            self._record(x, None, [why])
        return why

    def _record(self, x: Tensor, backend: str | None, routes: Sequence[str]) -> None:
        if recorder is None or torch.compiler.is_compiling():
            return
        contracted = 0
        for conv, pattern, convolves in self.records():
            route = routes[min(contracted, len(routes) - 1)] if convolves or backend is None else "no contraction"
            contracted += convolves
            recorder.append(Record(conv, pattern, tuple(x.shape), compute_dtype(x), backend, route))

    def _key(
        self,
        x: Tensor,
        tensors: Sequence[BlockTensors],
        stat_groups: int,
        boundaries: str,
        backend: str,
        autocast: torch.dtype | None,
        given: Sequence[Tensor | None],
    ) -> tuple:
        """All that a plan is made for."""
        return (
            x.stride(), stat_groups, boundaries, backends.requested(), backend, torch.is_grad_enabled(), autocast,
            router.settings(backend), *self.shared(),
            *(None if t is None else _METADATA(t) for t in given), *(w.stride() for w in _weights(tensors)),
        )  # fmt: skip

    def _planned(
        self,
        x: Tensor,
        tensors: Sequence[BlockTensors],
        stat_groups: int,
        boundaries: str,
        backend: str,
        direct: bool,
        channels_last: bool | None = None,
    ) -> Planned:
        return Planned(self.blocks(backend), x, tensors, stat_groups, boundaries, direct, channels_last)

    def has_choice(self, x: Tensor, boundaries: str, backend: str) -> bool:
        """Whether there is anything to measure (`choice.py`)."""
        if backend != "cpu" or boundaries != "auto" or x.numel() == 0 or not autotune.consulted(x.device):
            return False
        return all(group is None for group in self.shared())  # processes would have to agree

    def _choose(
        self,
        rule: Planned,
        x: Tensor,
        tensors: Sequence[BlockTensors],
        running: Sequence[Running | None],
        stat_groups: int,
        backend: str,
    ) -> Planned:
        """The plan that was measured to be the fastest, or is now; or else that of the rule."""
        rule.calls += 1
        begin = autotune.may_begin(rule.calls) and not is_computed_again()
        if rule.calls > 1 and not begin:
            return rule
        plans, entered, auto = {"fused": rule}, self.entered(x), backends.requested() == "auto"
        if self.convolves and any(map(says_channels_last, (entered, *_weights(tensors)))):
            if auto and x.dim() == 4:
                plans[choice.CONTIGUOUS] = self._planned(entered, tensors, stat_groups, "auto", backend, True)
                plans[choice.CONTIGUOUS].in_contiguous = True
        elif self.convolves:
            for format, last in (("contiguous", False), ("channels_last", True)):
                other = self._planned(entered, tensors, stat_groups, "auto", backend, True, last)
                plans[f"fused in {format}"] = rule if last == rule.plan.channels_last else other
            del plans["fused"]
        runs: dict[str, choice.Run] = {name: self._fused(p, stat_groups, backend) for name, p in plans.items()}
        if auto:
            plain = functools.partial(choice.modules, rule.plan.blocks, self.entered, stat_groups)
            runs = {choice.MODULES: plain, **runs}
        found = self._fastest(rule, runs, x, tensors, running, begin)
        if found is None:
            return rule
        planned = plans.get(found.name, rule)
        planned.settled = True
        planned.why_modules = found.why if found.name == choice.MODULES else None
        planned.why_contiguous = found.why if planned.in_contiguous else None
        planned.gain = found.gain
        return planned

    def _fused(self, planned: Planned, stat_groups: int, backend: str) -> choice.Run:
        def run(x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]) -> Tensor:
            entered = self.entered(x)
            given = [entered, *(t for block in tensors for t in block)]
            if primitives.unwatched(*given):  # what comes before any plan runs is timed too
                self._key(entered, tensors, stat_groups, "auto", backend, autocast_dtype(x), given)
            return planned(entered, tensors, running)

        return run

    def _fastest(
        self,
        rule: Planned,
        runs: dict[str, choice.Run],
        x: Tensor,
        tensors: Sequence[BlockTensors],
        running: Sequence[Running | None],
        begin: bool,
    ) -> choice.Choice | None:
        """The candidate that is known to be the fastest, or is measured now if it may `begin`."""
        plan = rule.plan
        blocks = tuple(replace(b, slope=ACTIVATIONS[b.act].default_slope) for b in plan.blocks)
        given = [x, *(t for block in tensors for t in block)]
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in given]
        formats = [says_channels_last(t) for t in (x if x.dim() == 4 else x[None], *_weights(tensors))]
        problem = (blocks, plan.stat_groups, tuple(x.shape), x.dtype, autocast_dtype(x), needs, formats)
        name = repr((*problem, [tuple(w.shape) for w in _weights(tensors)], list(runs)))
        found = choice.known(name, runs, x.device)
        return choice.measure(name, runs, x, tensors, running) if found is None and begin else found

    def compiles_to_modules(
        self, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None], stat_groups: int
    ) -> bool:
        """Whether torch.compile gets PyTorch's modules for calls with tensors like these, since it was measured to make
        of them what is as fast as this chain, or is now."""
        backend = backends.select(backends.requested(), x.device.type, compute_dtype(x))
        free = primitives.unwatched(x, *(t for block in tensors for t in block))
        if not free or not self.has_choice(x, "auto", backend) or backends.requested() != "auto":
            return self.bare
        rule = self._planned(self.entered(x), tensors, stat_groups, "auto", backend, direct=False)
        runs: dict[str, choice.Run] = {
            choice.COMPILED: functools.partial(choice.compiled, rule.plan.blocks, self.entered),
            "fused": self._fused(rule, stat_groups, backend),
        }
        with primitives.watched():
            fastest = self._fastest(rule, runs, x, tensors, running, begin=True)
        return fastest is not None and fastest.name == choice.COMPILED


def _weights(tensors: Sequence[BlockTensors]) -> list[Tensor]:
    return [t.weight for t in tensors if t.weight is not None]


def _knows_only_torch(t: Tensor | None) -> bool:
    """Whether a tensor is of a class with a `__torch_dispatch__` of its own, and so of PyTorch's operators alone."""
    if t is None:
        return False
    kind = type(t)
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not kind.__module__.startswith(
        "torch._subclasses"
    )
