"""A chain of a Sequential: planned once for a signature, run many times behind a guard."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import autotune, primitives, router
from fastdcgan.engine import choice
from fastdcgan.engine.match import WHY_BARE, FoundBlock, FoundChain, block_of, process_group, runs_blocks
from fastdcgan.engine.planned import Planned, autocast_dtype, block_backend, compute_dtype
from fastdcgan.spec import BlockTensors, Running, says_channels_last

_PLANS = 64  # of a chain, for as many signatures


def call_alone(module: nn.Module, x: Any, stat_groups: int) -> Any:
    if stat_groups == 1:
        return module(x)
    if runs_blocks(module):
        return module(x, stat_groups=stat_groups)
    if any(isinstance(m, _BatchNorm) and m.training for m in module.modules()):
        if x.shape[0] % stat_groups:
            raise ValueError(f"stat_groups={stat_groups} must divide the batch size, got a batch of {x.shape[0]}")
        return torch.cat([module(part) for part in x.chunk(stat_groups)])
    return module(x)


@dataclass
class Record:
    """What `explain` saw of one block that ran."""

    conv: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    backend: str | None  # None: PyTorch's own modules ran
    route: str  # how its contraction ran


recorder: list[Record] | None = None  # where `explain` collects them

_METADATA = operator.attrgetter("dtype", "device", "shape", "requires_grad", "__class__")


class Chain:
    """A chain of a Sequential, with its plans."""

    def __init__(self, found: FoundChain) -> None:
        self._found = found
        self._norms = [b.norm for b in found.blocks if isinstance(b.norm, nn.SyncBatchNorm)]
        self.bare = found.bare
        self._plans: dict[tuple, Planned] = {}
        self._plain: dict[
            tuple, str
        ] = {}  # `_brief`s of calls that PyTorch's modules run fastest, and why that is known

    def __call__(self, x: Tensor, stat_groups: int, boundaries: str) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a torch.Tensor as input, got {type(x).__name__}")
        found = self._found
        if self._plain and (why := self._plain.get(self._brief(x, stat_groups, boundaries))) is not None:
            return self._plainly(x, stat_groups, why)
        if self.bare and not torch.compiler.is_compiling() and not self._bare_may_gain(x, boundaries):
            return self._plainly(x, stat_groups, WHY_BARE)
        self.ran_modules = False
        tensors = [_tensors(b) for b in found.blocks]
        given = [x, *(t for block in tensors for t in block)]
        direct = primitives.unwatched(*given)
        if not direct and not torch.compiler.is_compiling() and any(map(_knows_only_torch, given)):
            return self.as_modules(x, stat_groups)
        given[0] = entered = self._entered(x)
        autocast = autocast_dtype(x)
        backend = backends.select(backends.requested(), x.device.type, autocast or x.dtype)
        arguments = (x, entered, tensors, stat_groups, boundaries, backend, autocast, given if direct else None)
        if recorder is not None and not torch.compiler.is_compiling():
            with router.recording() as routes:
                out = self._run(*arguments)
            for block, route in zip(found.blocks, routes, strict=False):
                recorder.append(Record(block.conv, tuple(entered.shape), compute_dtype(x), backend, route))
        else:
            out = self._run(*arguments)
        return out if entered.dim() == x.dim() else out[0]

    def _entered(self, x: Tensor) -> Tensor:
        """`x` as a batch, and padded where the first convolution does not pad by itself."""
        if x.dim() == 3 and all(b.norm is None for b in self._found.blocks):
            x = x[None]
        pad = self._found.pad
        return x if pad is None else F.pad(x, pad[0], pad[1])

    def _bare_may_gain(self, x: Tensor, boundaries: str) -> bool:
        """Whether it can be measured. Not where a hook or a parametrization makes the weight: until it is measured its
        module runs, which would do so again."""
        conv = self._found.blocks[0].conv
        weight = conv._parameters.get("weight")
        if weight is None or conv._forward_pre_hooks or not primitives.unwatched(x, weight):
            return False
        return self._has_choice(x, boundaries, block_backend(x))

    def _plainly(self, x: Tensor, stat_groups: int, why: str) -> Tensor:
        if recorder is not None and not torch.compiler.is_compiling():
            blocks = self._found.blocks
            recorder.extend(Record(b.conv, tuple(x.shape), compute_dtype(x), None, why) for b in blocks)
        self.ran_modules = True
        return self.as_modules(x, stat_groups)

    def as_modules(self, x: Tensor, stat_groups: int) -> Tensor:
        for block in self._found.blocks:
            for module in block.modules():
                x = call_alone(module, x, stat_groups)
        return x

    def _brief(self, x: Tensor, stat_groups: int, boundaries: str) -> tuple:
        """The little that may change which way is the fastest: PyTorch's modules are right whatever else changes."""
        first = self._found.blocks[0].conv
        weight = first._parameters.get("weight")
        return (
            x.shape, x.stride(), x.dtype, x.requires_grad, torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(),
            stat_groups, boundaries, first.training, weight is not None and weight.requires_grad, backends.requested(),
        )  # fmt: skip

    def _run(
        self,
        original: Tensor,
        x: Tensor,
        tensors: list[BlockTensors],
        stat_groups: int,
        boundaries: str,
        backend: str,
        autocast: torch.dtype | None,
        given: list[Tensor | None] | None,
    ) -> Tensor:
        planned = None
        if given is not None:  # x and the tensors, and nobody watches
            key = self._key(x, tensors, stat_groups, boundaries, backend, autocast, given)
            planned = self._plans.get(key)
        if planned is None:
            planned = self._planned(x, tensors, stat_groups, boundaries, backend, given is not None)
            if given is not None:
                if len(self._plans) >= _PLANS:
                    self._plans.clear()
                self._plans[key] = planned
                planned.settled = not self._has_choice(x, boundaries, backend)
        running = [_running(b.norm, t) for b, t in zip(self._found.blocks, tensors, strict=True)]
        if not planned.settled:
            planned = self._plans[key] = self._choose(planned, original, tensors, running, stat_groups, backend)
        if self.bare and not planned.settled:
            out = self._plainly(x, stat_groups, WHY_BARE)
            self.ran_modules = False  # it is to be called until it is measured
            return out
        if planned.why_modules is not None:
            if len(self._plain) >= _PLANS:
                self._plain.clear()
            self._plain[self._brief(original, stat_groups, boundaries)] = planned.why_modules  # from the next call on
        return planned(x, tensors, running)

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
            router.settings(backend), *(process_group(norm) for norm in self._norms),
            *(None if t is None else _METADATA(t) for t in given), *(t.weight.stride() for t in tensors),
        )  # fmt: skip

    def _planned(
        self,
        x: Tensor,
        tensors: list[BlockTensors],
        stat_groups: int,
        boundaries: str,
        backend: str,
        direct: bool,
        channels_last: bool | None = None,
    ) -> Planned:
        padded = self._found.pad is not None
        blocks = [block_of(b, padded and i == 0, backend) for i, b in enumerate(self._found.blocks)]
        return Planned(blocks, x, tensors, stat_groups, boundaries, direct, channels_last)

    def _has_choice(self, x: Tensor, boundaries: str, backend: str) -> bool:
        """Whether there is anything to measure (`choice.py`)."""
        if backend != "cpu" or boundaries != "auto" or x.numel() == 0 or not autotune.consulted(x.device):
            return False
        return all(process_group(norm) is None for norm in self._norms)  # processes would have to agree

    def _choose(
        self,
        rule: Planned,
        x: Tensor,
        tensors: list[BlockTensors],
        running: list[Running | None],
        stat_groups: int,
        backend: str,
    ) -> Planned:
        """The plan that was measured to be the fastest, or is now; or else that of the rule."""
        rule.calls += 1
        begin = autotune.may_begin(rule.calls)
        if rule.calls > 1 and not begin:
            return rule
        plans, entered = {"fused": rule}, self._entered(x)
        if not any(map(says_channels_last, (entered, *(t.weight for t in tensors)))):
            for format, last in (("contiguous", False), ("channels_last", True)):
                other = self._planned(entered, tensors, stat_groups, "auto", backend, True, last)
                plans[f"fused in {format}"] = rule if last == rule.plan.channels_last else other
            del plans["fused"]
        runs: dict[str, choice.Run] = {name: self._fused(p, stat_groups, backend) for name, p in plans.items()}
        if backends.requested() == "auto":
            runs = {choice.MODULES: functools.partial(choice.modules, self._found.blocks, stat_groups), **runs}
        found = self._fastest(rule, runs, x, tensors, running, begin)
        if found is None:
            return rule
        planned = plans.get(found.name, rule)
        planned.settled = True
        planned.why_modules = found.why if found.name == choice.MODULES else None
        return planned

    def _fused(self, planned: Planned, stat_groups: int, backend: str) -> choice.Run:
        def run(x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]) -> Tensor:
            entered = self._entered(x)
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
        tensors: list[BlockTensors],
        running: Sequence[Running | None],
        begin: bool,
    ) -> choice.Choice | None:
        """The candidate that is known to be the fastest, or is measured now if it may `begin`."""
        plan = rule.plan
        blocks = tuple(replace(b, slope=ACTIVATIONS[b.act].default_slope) for b in plan.blocks)
        given = [x, *(t for block in tensors for t in block[:4])]
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in given]
        formats = [says_channels_last(t) for t in (x if x.dim() == 4 else x[None], *(t.weight for t in tensors))]
        problem = (blocks, plan.stat_groups, tuple(x.shape), x.dtype, autocast_dtype(x), needs, formats)
        name = repr((*problem, [tuple(t.weight.shape) for t in tensors], list(runs)))
        found = choice.known(name, runs, x.device)
        return choice.measure(name, runs, x, tensors, running) if found is None and begin else found

    def compiles_to_modules(self, x: Tensor, stat_groups: int) -> bool:
        """Whether torch.compile gets PyTorch's modules for calls with tensors like `x`, since it was measured to make
        of them what is as fast as this chain, or is now."""
        tensors = [_stored(b) for b in self._found.blocks]
        given = [x, *(t for block in tensors if block is not None for t in block)]
        backend = backends.select(backends.requested(), x.device.type, compute_dtype(x))
        if None in tensors or not primitives.unwatched(*given) or not self._has_choice(x, "auto", backend):
            return self.bare
        norms = [b.norm for b in self._found.blocks if b.norm is not None]
        breaks = any(n.training and n.momentum is None for n in norms)  # the graph: PyTorch reads the count of batches
        if breaks or backends.requested() != "auto":
            return self.bare
        found = [t for t in tensors if t is not None]
        rule = self._planned(self._entered(x), found, stat_groups, "auto", backend, direct=False)
        runs: dict[str, choice.Run] = {
            choice.COMPILED: functools.partial(choice.compiled, self._found.blocks),
            "fused": self._fused(rule, stat_groups, backend),
        }
        running = [_running(b.norm, t) for b, t in zip(self._found.blocks, found, strict=True)]
        with primitives.watched():
            fastest = self._fastest(rule, runs, x, found, running, begin=True)
        return fastest is not None and fastest.name == choice.COMPILED


def _knows_only_torch(t: Tensor | None) -> bool:
    """Whether a tensor is of a class with a `__torch_dispatch__` of its own, and so of PyTorch's operators alone."""
    if t is None:
        return False
    kind = type(t)
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not kind.__module__.startswith(
        "torch._subclasses"
    )


def _of(module: nn.Module, stored: dict[str, Any], name: str) -> Any:
    """An attribute by way of the dict that has it; elsewhere it is computed (a parametrization, weight norm)."""
    return stored[name] if name in stored else getattr(module, name)


def _tensors(found: FoundBlock) -> BlockTensors:
    conv, norm = found.conv, found.norm
    for hook in conv._forward_pre_hooks.values():  # weight_norm and spectral_norm of the old style set `weight`
        hook(conv, ())
    weight, bias = (_of(conv, conv._parameters, name) for name in ("weight", "bias"))
    if norm is None:
        return BlockTensors(weight, bias)
    bn_weight, bn_bias = (_of(norm, norm._parameters, name) for name in ("weight", "bias"))
    mean, var = (_of(norm, norm._buffers, name) for name in ("running_mean", "running_var"))
    return BlockTensors(weight, bias, bn_weight, bn_bias, mean, var)


def _stored(found: FoundBlock) -> BlockTensors | None:
    """Tensors like those of `_tensors`, as they are stored: nothing is computed or updated. None where no stored one is
    like the weight."""
    conv, norm = found.conv, found.norm
    weight = next((p for p in conv.parameters() if p.dim() == 4), None)  # or what the weight is computed from
    if weight is None:
        return None
    bias = conv._parameters.get("bias")
    if norm is None:
        return BlockTensors(weight, bias)
    vectors = (norm._parameters.get("weight"), norm._parameters.get("bias"))
    return BlockTensors(weight, bias, *vectors, norm._buffers["running_mean"], norm._buffers["running_var"])


def _running(norm: nn.BatchNorm2d | nn.SyncBatchNorm | None, t: BlockTensors) -> Running | None:
    if norm is None or not norm.training or not norm.track_running_stats:
        return None
    if t.running_mean is None or t.running_var is None:
        return None
    momentum, count = norm.momentum, _of(norm, norm._buffers, "num_batches_tracked")
    if momentum is None and count is None:
        momentum = 0.0
    return Running(t.running_mean, t.running_var, momentum, count)
