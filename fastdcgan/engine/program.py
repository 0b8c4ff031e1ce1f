"""A plan with what follows from it for every call: the steps of its blocks, the layout, the routes of contractions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import autotune, primitives, router
from fastdcgan.engine.layout import Layout, layout
from fastdcgan.engine.tape import Tapes
from fastdcgan.geometry import Pair
from fastdcgan.spec import PER_BLOCK, Block, BlockTensors, Boundaries, Call, Plan

_CPU = torch.device("cpu")


class Program:
    """A plan with what follows from it: the primitives that it calls, and the routes of its contractions.

    `direct`: nobody watches (`primitives.unwatched`), so backends are called without the way through the dispatcher.
    """

    def __init__(self, plan: Plan, direct: bool) -> None:
        self.plan, self.direct = _between_contractions(plan), direct
        name = plan.blocks[0].backend
        self.run: Any = backends.get(name) if direct else primitives.Registered(name)
        self._routes: dict[Any, router.Route] = {}
        self._steps: dict[tuple, list[Step]] = {}
        self._read: dict[tuple, tuple[list[int], list[int]]] = {}
        self._layout: Layout | None = None
        self.without_bias: dict[int, Tensor] = {}  # by channels: the coef (1, 0)
        self._tapes = Tapes() if direct and name == "cpu" else None

    def contract(self, place: tuple, call: Call) -> Any:
        """Run a contraction; `place` sets it apart within the chain, where the same calls come every time."""
        if not self.direct:
            return self.run.contract(call)
        found = self._routes.get(place)
        if found is None or (not found.settled and autotune.may_compare(call.a.x.device)):
            found = router.route(call, self.plan.blocks[0].backend)
            if call.a.x.device.type == "cpu" or found.settled or not autotune.may_compare(call.a.x.device):
                self._routes[place] = found
        return found.run(call)

    def taped(
        self, key: tuple, inputs: Sequence[Tensor | None], call: Callable[[], list[Tensor | None]]
    ) -> list[Tensor | None]:
        """`call()`, or the operators that it calls for such `inputs`."""
        if self._tapes is None or router.is_recording():
            return call()
        consulted = autotune.consulted(_CPU)
        routes = self._routes.values()
        return self._tapes.run(
            (*key, consulted), inputs, call, lambda: not consulted or all(route.settled for route in routes),
            self.without_bias.values(),
        )  # fmt: skip

    def steps(self, size: Sequence[int], saving: Sequence[bool] | None) -> list[Step]:
        """What each block does, for an input image of the `size` that the chain was planned for."""
        if not self.direct:  # sizes may be symbols
            return _steps(self.plan, size, saving)
        key = () if saving is None else tuple(saving)
        found = self._steps.get(key)
        if found is None:
            found = self._steps[key] = _steps(self.plan, size, saving)
        return found

    def read(self, x: Tensor, needs: Sequence[bool]) -> tuple[Sequence[int], Sequence[int]]:
        """Which of (x, *tensors) the backward reads, and which others gradients of gradients do."""
        if torch.compiler.is_compiling():  # which goes through no version and no reference of ours
            return range(len(needs)), ()
        key = tuple(needs)
        found = self._read.get(key)
        if found is None:
            found = self._read[key] = _read(self.steps(x.shape[2:], needs), needs)
        return found

    def layout(self, x: Tensor, tensors: Sequence[Tensor | None]) -> Layout:
        """The strides of output and gradients, for an `x` and weights with those that the chain was planned for."""
        if not self.direct:
            return layout(self.plan, x, tensors)
        if self._layout is None:
            self._layout = layout(self.plan, x, tensors)
        return self._layout


def _between_contractions(plan: Plan) -> Plan:
    """With a learned slope in elementwise passes alone, whose reduction gives its gradient as well."""
    if not any(block.learns_slope for block in plan.blocks):
        return plan
    kept = [
        tuple(flag and not block.learns_slope for flag, block in zip(flags, plan.blocks, strict=False))
        for flags in plan.boundaries
    ]
    return replace(plan, boundaries=Boundaries(*kept))


class Step(NamedTuple):
    """What the forward of a block does, as far as it follows from the plan and from who needs a gradient."""

    block: Block
    first: int  # of its tensors in the chain's
    in_size: Pair
    out_size: Pair
    reached: bool  # does it, or anything before it, need a gradient?
    stats: bool  # does it use the batch's own statistics?
    deferred: bool
    keep_a: bool  # the next block's weight gradient reads its output
    keep_y: bool
    from_sign: bool  # act'(z) is act'(a): a takes the place of y, which nothing else reads


def _steps(plan: Plan, size: Sequence[int], saving: Sequence[bool] | None) -> list[Step]:
    n = len(plan.blocks)
    before = [False] * (n + 1) if saving is None else wanted(plan, saving)
    found = []
    for i, block in enumerate(plan.blocks):
        last = i + 1 == n
        deferred = not last and plan.boundaries.deferred[i] and plan.blocks[i + 1].convolves
        keep_a = saving is not None and not last and bool(saving[1 + (i + 1) * PER_BLOCK])
        # Not where the caller gets a and may write to it, except where PyTorch keeps that output as well.
        from_sign = block.norm is None and ACTIVATIONS[block.act].keeps_sign(block.slope)
        from_sign = from_sign and not block.learns_slope and (not last or block.act == "relu" or block.inplace)
        out_size = block.output_size(*size)
        found.append(
            Step(
                block,
                i * PER_BLOCK,
                (size[0], size[1]),
                out_size,
                before[i + 1],
                block.norm is not None and block.norm.batch_stats,
                deferred,
                keep_a,
                before[i + 1] or (keep_a and deferred),
                from_sign,
            )
        )
        size = out_size
    return found


def _read(steps: Sequence[Step], needs: Sequence[bool]) -> tuple[list[int], list[int]]:
    read: list[int] = []
    beside: list[int] = []
    for i, step in enumerate(steps):
        first = 1 + step.first
        # PyTorch's convolution saves both of its operands for the gradient of any.
        passes_on = steps[i - 1].reached if i else needs[0]
        convolves = step.block.convolves and (passes_on or any(needs[first : first + 2]))
        if i == 0:  # without a convolution it is a raw output, and saved as one
            (read if convolves else beside).append(0)
        saved = BlockTensors(convolves, False, step.reached, False, False, False, step.reached)  # type: ignore[arg-type]
        for j, name in enumerate(BlockTensors._fields):
            if not (step.stats and name.startswith("running")):  # which this very call goes on to update
                (read if saved[j] else beside).append(first + j)
    return read, beside


def wanted(plan: Plan, needs: Sequence[bool]) -> list[bool]:
    """Per block and one more: does anything before it (`x`, or a parameter of an earlier block) need a gradient?"""
    flags = [bool(needs[0])]
    for i in range(len(plan.blocks)):
        flags.append(flags[-1] or any(needs[1 + i * PER_BLOCK : 1 + (i + 1) * PER_BLOCK]))
    return flags
