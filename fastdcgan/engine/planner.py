"""The plan of a chain: its fusion boundaries asked for, or measured, or else those of the backend's rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import autotune
from fastdcgan.engine import autograd
from fastdcgan.engine.program import Program
from fastdcgan.spec import Block, BlockTensors, Boundaries, Plan

KIND = "boundaries"  # of what the autotune cache keeps
MOST_KNOWN = 1024  # chains that are kept: shapes may go on changing

_known: dict[Any, Boundaries | None] = {}  # what the cache says, asked once


def plan(
    blocks: Sequence[Block],
    x: Tensor,
    tensors: Sequence[BlockTensors],
    stat_groups: int,
    boundaries: str,
    channels_last: bool | None = None,
) -> Plan:
    """`boundaries` is "auto", or "deferred" or "finished" for all of them; `channels_last`, whether a contiguous chain
    runs in that format, is the backend's rule where it is None."""
    backend, n = backends.get(blocks[0].backend), len(blocks)
    weights, grad = [t.weight for t in tensors], torch.is_grad_enabled()
    if channels_last is None:
        convolve, present = [b for b in blocks if b.convolves], [w for w in weights if w is not None]
        channels_last = len(convolve) > 1 and backend.prefers_channels_last(convolve, present, x)
    needs = [grad and t is not None and t.requires_grad for t in (x, *weights)]
    rule = backend.boundaries(blocks, weights, (x.shape[2], x.shape[3]), needs)
    if boundaries != "auto":
        wanted = (boundaries == "deferred",) * (n - 1)
        sums = tuple(a or b for a, b in zip(wanted, rule.epilogue_sums, strict=True))
        return Plan(tuple(blocks), stat_groups, Boundaries(wanted, sums, rule.lazy_grad), channels_last)
    made = Plan(tuple(blocks), stat_groups, rule, channels_last)
    if backend.chooses_boundaries and not torch.compiler.is_compiling():
        return _measured(made, x, tensors)
    return made


def _measured(rule: Plan, x: Tensor, tensors: Sequence[BlockTensors]) -> Plan:
    """The plan with the boundaries that were measured for it, or are now, or else `rule`."""
    if any(b.norm is not None and b.norm.process_group is not None for b in rule.blocks):
        return rule  # processes would have to agree
    flat = [t for each in tensors for t in each]
    needs = [t is not None and t.requires_grad for t in (x, *flat)] if torch.is_grad_enabled() else []
    # A slope changes no time; and it may change all through a training.
    blocks = tuple(replace(b, slope=ACTIVATIONS[b.act].default_slope) for b in rule.blocks)
    problem = (
        blocks,
        rule.stat_groups,
        x.shape,
        x.dtype,
        tuple(needs),
        tuple(t.weight.shape for t in tensors if t.weight is not None),
    )
    searching, key = autotune.may_search(x.device), (x.device, problem)
    if key not in _known or (searching and _known[key] is None):
        name, machine = repr(problem), autotune.machine(x.device)
        found = _parsed(autotune.lookup(KIND, machine, name), len(rule.blocks))
        if found is None and searching:
            found = fastest(rule, lambda plan: _work(plan, x.detach(), flat, needs), x.device)
            autotune.remember(KIND, machine, name, found._asdict())
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = found
    found = _known[key]
    return rule if found is None else Plan(rule.blocks, rule.stat_groups, found, rule.channels_last)


def _parsed(entry: Any, blocks: int) -> Boundaries | None:
    if entry is None:
        return None
    try:
        found = Boundaries(**{name: tuple(map(bool, flags)) for name, flags in entry.items()})
        if list(map(len, found)) != [blocks - 1, blocks - 1, blocks]:
            raise ValueError(f"expected the boundaries of {blocks} blocks, got {entry}")
    except (TypeError, ValueError, AttributeError) as error:
        autotune.ignored(error)
        return None
    return found


def fastest(rule: Plan, work: Callable[[Plan], Callable[[], object]], device: torch.device) -> Boundaries:
    """From the rule's boundaries on, change one choice after the other and keep what is faster by more than noise.

    `work` gives what is timed for a plan.
    """
    best = rule.boundaries
    for kind, flags in enumerate(rule.boundaries):
        for i in range(len(flags)):
            changed = tuple(flag != (j == i) for j, flag in enumerate(best[kind]))
            other = Boundaries(*[changed if k == kind else flags for k, flags in enumerate(best)])
            calls = {b: work(Plan(rule.blocks, rule.stat_groups, b, rule.channels_last)) for b in (best, other)}
            times = autotune.milliseconds(calls, device)
            if times[other] < (1 - autotune.MARGIN) * times[best]:
                best = other
    return best


def _work(plan: Plan, x: Tensor, flat: Sequence[Tensor | None], needs: Sequence[bool]) -> Callable[[], object]:
    """A forward, and a backward if anything needs a gradient; no buffer is updated."""
    program = Program(plan, direct=True)
    layout = program.layout(x, flat)
    da: Tensor | None = None

    @torch.no_grad()
    def call() -> None:
        nonlocal da
        if any(needs):
            out, _, states = autograd.forward(program, x, flat, needs)
            da = torch.ones_like(out) if da is None else da
            # The epilogue may write to the gradient that it is given.
            autograd.backward(program, layout, x.shape[2:], x, flat, states, needs, da.clone())
        else:
            autograd.forward(program, x, flat, None)

    return call
