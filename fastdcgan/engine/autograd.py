"""A chain of blocks: its forward and its backward by its plan, in one autograd node.

Only the raw outputs `y` and a few vectors per channel are saved:

    y = conv(x; w);  s = gamma*r;  t = beta - mu*s;  a = act(s*y + t)
    g = da*act'(s*y + t);  dbeta = sum(g);  dgamma = sum(g*xhat);  dy = s*g + p*y + q
    dx = the adjoint contraction of dy;  dw = weight_grad of (x, dy)

Between two blocks goes either the finished `a`, or the pair (`y`, `coef`) that stands for it: a deferred fusion
boundary. In front of a normalisation, a bias of the convolution is not added to `y`: it shifts `t`, and with batch
statistics it cancels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import autotune, primitives, router
from fastdcgan.engine import sync
from fastdcgan.engine.double_backward import gradients, requested
from fastdcgan.geometry import Pair
from fastdcgan.spec import (
    PER_BLOCK,
    STORE,
    Block,
    BlockTensors,
    Call,
    Epilogue,
    Operand,
    Plan,
    memory_format,
    of_block,
    says_channels_last,
    stat_dtype,
)


class Program:
    """A plan with what follows from it: the primitives that it calls, and the routes of its contractions.

    `direct`: nobody watches (`primitives.unwatched`), so backends are called without the way through the dispatcher.
    """

    def __init__(self, plan: Plan, direct: bool) -> None:
        self.plan, self.direct = plan, direct
        name = plan.blocks[0].backend
        self.run: Any = backends.get(name) if direct else primitives.Registered(name)
        self._routes: dict[Any, router.Route] = {}
        self._steps: dict[tuple, list[_Step]] = {}
        self.without_bias: dict[int, Tensor] = {}  # by channels: the coef (1, 0)

    def contract(self, place: tuple, call: Call) -> Any:
        """Run a contraction; `place` sets it apart within the chain, where the same calls come every time."""
        if not self.direct:
            return self.run.contract(call)
        found = self._routes.get(place)
        if found is None:
            found = router.route(call, self.plan.blocks[0].backend)
            if found.settled or not autotune.may_compare(call.a.x.device):
                self._routes[place] = found
        return found.run(call)

    def steps(self, x: Tensor, saving: Sequence[bool] | None) -> list[_Step]:
        """What each block does, for an `x` of the shape that the chain was planned for."""
        if not self.direct:  # shapes may be symbols
            return _steps(self.plan, x, saving)
        key = () if saving is None else tuple(saving)
        found = self._steps.get(key)
        if found is None:
            found = self._steps[key] = _steps(self.plan, x, saving)
        return found


class _Step(NamedTuple):
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


def _steps(plan: Plan, x: Tensor, saving: Sequence[bool] | None) -> list[_Step]:
    n, size = len(plan.blocks), (x.shape[2], x.shape[3])
    before = [False] * (n + 1) if saving is None else wanted(plan, saving)
    found = []
    for i, block in enumerate(plan.blocks):
        last = i + 1 == n
        deferred = not last and plan.boundaries.deferred[i]
        keep_a = saving is not None and not last and bool(saving[1 + (i + 1) * PER_BLOCK])
        # Not where the caller gets a and may write to it, except for ReLU, whose output PyTorch keeps as well.
        from_sign = block.norm is None and ACTIVATIONS[block.act].keeps_sign(block.slope)
        from_sign = from_sign and (not last or block.act == "relu")
        out_size = block.output_size(*size)
        found.append(
            _Step(
                block,
                i * PER_BLOCK,
                size,
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


class _State(NamedTuple):
    """What the backward of one block needs beside the chain's inputs."""

    y: Tensor | None  # raw output, or what stands for it
    coef: Tensor | None  # (s, t[, mean, rstd]); None where a = y
    a: Tensor | None  # finished output, where the next block's weight gradient reads it
    total: Tensor | None  # number of values over all processes (synchronised statistics)


def run(program: Program, x: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """Run the chain on `x` [N, C, H, W] with `tensors` (the blocks' `BlockTensors`, one after another).

    Returns the output and, per block, its `stats` [3, stat_groups, C] where it used the batch's own, else None.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        if torch.compiler.is_compiling():
            tensors = _distinct(tensors)
        out, *found = _Chain.apply(program, x, *tensors)
    else:
        with _quiet(x):
            out, found, _ = forward(program, x, tensors, saving=None)
    waiting = iter(found)
    return out, [next(waiting) if b.norm is not None and b.norm.batch_stats else None for b in program.plan.blocks]


_NOTHING = contextlib.nullcontext()


def _quiet(x: Tensor) -> contextlib.AbstractContextManager:
    """The GPU that `x` is on, and no autocast: it was applied before, and in here the dtypes are chosen."""
    if torch.compiler.is_compiling():
        return _NOTHING
    off = torch._C._is_any_autocast_enabled()
    if not off and not (x.is_cuda and x.device.index != torch.cuda.current_device()):
        return _NOTHING
    stack = contextlib.ExitStack()
    if x.is_cuda:
        stack.enter_context(torch.cuda.device(x.device))
    if off:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.autocast("cuda", enabled=False))
    return stack


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Views in place of repetitions (a convolution used twice): the compiler takes a tensor but once."""
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t if t is None or not any(t is other for other in found) else t.view_as(t))
    return found


def wanted(plan: Plan, needs: Sequence[bool]) -> list[bool]:
    """Per block and one more: does anything before it (`x`, or a parameter of an earlier block) need a gradient?"""
    flags = [bool(needs[0])]
    for i in range(len(plan.blocks)):
        flags.append(flags[-1] or any(needs[1 + i * PER_BLOCK : 1 + (i + 1) * PER_BLOCK]))
    return flags


# --- forward ---------------------------------------------------------------------------------------------------------


def _known_coefficients(program: Program, block: Block, t: BlockTensors, x: Tensor) -> Tensor:
    """The coef of a block that needs no statistics of the batch."""
    if block.norm is not None:
        assert t.running_mean is not None and t.running_var is not None
        mean, var = t.running_mean[None], t.running_var[None]
        return program.run.coefficients(mean, var, t.bn_weight, t.bn_bias, t.bias, block.norm.eps)
    channels = t.weight.shape[1] * block.geometry.groups if block.transposed else t.weight.shape[0]
    if t.bias is not None or not program.direct or x.is_cuda:  # what a graph captures belongs to its memory
        return program.run.bias_coefficients(x, t.bias, channels)
    ones = program.without_bias.get(channels)  # always the same
    if ones is None:
        ones = program.without_bias[channels] = program.run.bias_coefficients(x, None, channels)
    return ones


def forward(
    program: Program, x: Tensor, tensors: Sequence[Tensor | None], saving: Sequence[bool] | None
) -> tuple[Tensor, list[Tensor], list[_State]]:
    """`saving`: which of (x, *tensors) need gradients, or None if nothing does. Returns output, stats, states."""
    plan, runs = program.plan, program.run
    convert = plan.channels_last and memory_format(x) != torch.channels_last
    a, found, states = Operand(_channels_last(x) if convert else _entry(x, tensors)), [], []
    for i, step in enumerate(program.steps(x, saving)):
        block, keep_y = step.block, step.keep_y
        norm, from_sign = block.norm, step.from_sign
        t = BlockTensors(*tensors[step.first : step.first + PER_BLOCK])  # type: ignore[arg-type]
        epilogue, coef, total = STORE, None, None
        if step.stats:
            epilogue = Epilogue("stats", stat_groups=plan.stat_groups)
        elif norm is None and (block.act == "identity" or (keep_y and not (from_sign and t.bias is None))):
            # The accumulator takes the bias, before it is rounded: so y, which is z, has the right sign.
            if t.bias is not None:
                epilogue = Epilogue("bias", coef=t.bias)
            if block.act != "identity":
                coef = _known_coefficients(program, block, t._replace(bias=None), x)
        else:
            coef = _known_coefficients(program, block, t, x)
            if not keep_y or from_sign:  # no backward reads y: store a at once
                epilogue = Epilogue("activate", None, coef, block.act, block.slope)
        call = Call(block.op, a, t.weight, block.geometry, step.out_size, epilogue)
        y, stats = program.contract((i, "forward"), call)
        if step.stats:
            assert norm is not None
            if norm.process_group is not None:
                stats, total = sync.combine(stats, _count(y, plan.stat_groups), norm.process_group)
            found.append(stats)
            if not step.deferred:
                out, coef = runs.normalize(y, stats, t.bn_weight, t.bn_bias, norm.eps, block.act, block.slope)
                a = Operand(out)
                states.append(_State(y if keep_y else None, coef, out if step.keep_a else None, total))
                continue
            coef = runs.coefficients(stats[0], stats[1], t.bn_weight, t.bn_bias, None, norm.eps)

        if coef is None or epilogue.kind == "activate":
            a = Operand(y)
            kept = y if epilogue.kind == "activate" and step.reached else None
            states.append(_State(kept, None if kept is None else coef, y if step.keep_a else None, None))
            continue
        a = Operand(y, None, coef, block.act, block.slope)
        if from_sign or not step.deferred:
            a = Operand((runs.norm_act_ if from_sign or not keep_y else runs.norm_act)(a))
        if from_sign:
            states.append(_State(a.x if keep_y else None, coef, a.x if step.keep_a else None, None))
            continue
        states.append(_State(y if keep_y else None, coef, a.x if step.keep_a and not step.deferred else None, total))
    return a.x.contiguous() if convert else a.x, found, states


def _channels_last(x: Tensor) -> Tensor:
    """`x` in channels_last, and with its strides where they are ambiguous."""
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = x.shape
    return x.as_strided(x.shape, (height * width * channels, 1, width * channels, channels))


def _entry(x: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
    """`x`, said to be channels_last where it has one channel and the second block's weight is channels_last.

    One channel is both formats at once. PyTorch would call it contiguous, the first output too, and the second
    convolution would have to convert that.
    """
    if len(tensors) == PER_BLOCK or x.shape[1] != 1 or not x.is_contiguous():
        return x
    weight = tensors[PER_BLOCK]
    assert weight is not None
    if memory_format(weight) != torch.channels_last:
        return x
    return _channels_last(x)


def _count(y: Tensor, stat_groups: int) -> int:
    """M: the number of values that share one statistic."""
    return y.shape[0] // stat_groups * y.shape[2] * y.shape[3]


# --- backward --------------------------------------------------------------------------------------------------------


class _Chain(torch.autograd.Function):
    """(program, x, *tensors) -> (output, *stats)."""

    @staticmethod
    def forward(ctx, program: Program, x: Tensor, *tensors: Tensor | None):
        with _quiet(x):
            out, found, states = forward(program, x, tensors, saving=ctx.needs_input_grad[1:])
        ctx.program = program
        ctx.given = [x is not None for x in (x, *tensors)]
        inputs = list(tensors)
        for i, block in enumerate(program.plan.blocks):
            if block.norm is not None and block.norm.batch_stats:
                # This very call goes on to update the running statistics, and does not read them.
                inputs[i * PER_BLOCK + 4] = inputs[i * PER_BLOCK + 5] = None
        ctx.save_for_backward(x, *inputs, *(t for state in states for t in state))
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        return (out, *found)

    @staticmethod
    def backward(ctx, da: Tensor | None, *unused):
        program, saved = ctx.program, ctx.saved_tensors
        plan = program.plan
        if da is None:
            return (None,) * (2 + len(plan.blocks) * PER_BLOCK)
        split = 1 + len(plan.blocks) * PER_BLOCK
        inputs, flat = saved[:split], saved[split:]
        needs = requested(ctx, ctx.needs_input_grad[1:], ctx.given)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return (None, *gradients(plan, inputs, needs, da))
        states = [_State(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
        with _quiet(da):
            return (None, *backward(program, inputs[0], inputs[1:], states, needs, da))


def backward(
    program: Program,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    states: Sequence[_State],
    needs: Sequence[bool],
    da: Tensor,
) -> list[Tensor | None]:
    """Gradients of (x, *tensors), None where `needs` says so."""
    plan = program.plan
    grads: list[Tensor | None] = [None] * len(needs)
    steps = program.steps(x, needs)
    given = program.direct and says_channels_last(da)  # as all gradients within the chain follow
    sums: Tensor | None = None  # given: `da` is already g, and these are its sums (a deferred boundary)
    for i in reversed(range(len(plan.blocks))):
        if not steps[i].reached:
            break
        block, first = plan.blocks[i], 1 + i * PER_BLOCK
        passes_on = steps[i - 1].reached if i else needs[0]
        t = of_block(tensors, i)
        need = of_block(needs[1:], i)
        finish = not plan.boundaries.lazy_grad[i] and (bool(need.weight) or passes_on)
        dy, grads[first + 1 : first + 4] = _norm_act_backward(
            program, block, states[i], t.bias, need, da, sums, finish, i + 1 < len(plan.blocks)
        )
        lazy = dy.coef is not None
        if need.weight:
            a = Operand(x) if i == 0 else _rebuilt(plan.blocks[i - 1], states[i - 1])
            gathered, linear = (dy, a) if block.transposed else (a, dy)
            call = Call("weight_grad", gathered, linear, block.geometry, block.geometry.kernel)
            grads[first] = program.contract((i, "weight_grad", given, lazy), call)
        if passes_on:
            epilogue = _boundary_epilogue(plan, i, states)
            call = Call(block.adjoint, dy, t.weight, block.geometry, steps[i].in_size, epilogue)
            da, found = program.contract((i, "input_grad", given, lazy, epilogue.kind), call)
            sums = found if epilogue.kind == "grad_stats" else None
    if needs[0]:
        grads[0] = da
    return grads


def _rebuilt(block: Block, state: _State) -> Operand:
    """The output of `block`: as it was kept, or computed on load from its raw output."""
    if state.a is not None:
        return Operand(state.a)
    assert state.y is not None
    return Operand(state.y, None, state.coef, block.act, block.slope)


def _boundary_epilogue(plan: Plan, i: int, states: Sequence[_State]) -> Epilogue:
    """What the gradient contraction of block `i` does to its accumulator, the `da` of block `i - 1`."""
    if i == 0 or not plan.boundaries.epilogue_sums[i - 1]:
        return STORE
    block, state = plan.blocks[i - 1], states[i - 1]
    if state.coef is None:
        return STORE
    return Epilogue("grad_stats", state.y, state.coef, block.act, block.slope, state.coef.shape[1])


def _norm_act_backward(
    program: Program,
    block: Block,
    state: _State,
    bias: Tensor | None,
    need: BlockTensors,
    da: Tensor,
    sums: Tensor | None,
    finish: bool,
    overwrite: bool,
) -> tuple[Operand, list[Tensor | None]]:
    """dy, computed if `finish`, and the gradients of (bias, bn_weight, bn_bias). With `sums`, `da` is g already.

    With `overwrite` dy may take the place of `da`: a gradient between two blocks, which nobody but the chain has seen.
    """
    y, coef, norm, runs = state.y, state.coef, block.norm, program.run
    stat_groups = program.plan.stat_groups
    if coef is None:
        d_bias = da.sum((0, 2, 3), dtype=stat_dtype(da)) if need.bias else None
        return Operand(da), [d_bias, None, None]
    if norm is None and sums is not None:  # s = 1
        return Operand(da), [_over_groups(sums[0]) if need.bias else None, None, None]
    assert y is not None
    act = block.act if sums is None else "identity"
    batch_stats = norm is not None and norm.batch_stats
    dy: Operand | None = None
    if sums is None and norm is not None and batch_stats and norm.process_group is None and finish:
        normalize_backward = runs.normalize_backward_ if overwrite else runs.normalize_backward
        out, sums = normalize_backward(da, y, coef, _count(y, stat_groups), act, block.slope)
        dy = Operand(out)
    elif sums is None and (batch_stats or need.bias or need.bn_weight or need.bn_bias):
        sums = runs.norm_act_reduce(da, y, coef, act, block.slope)
    d_bias = d_bn_weight = d_bn_bias = None
    if need.bias and batch_stats:  # the mean takes every constant out
        assert bias is not None
        d_bias = torch.zeros_like(bias)
    elif need.bias:
        assert sums is not None
        d_bias = _over_groups(sums[0] if norm is None else sums[0] * coef[0])
    if need.bn_weight and need.bn_bias:
        assert sums is not None
        d_bn_bias, d_bn_weight = _over_groups(sums, 1).unbind()
    elif need.bn_weight or need.bn_bias:
        assert sums is not None
        found = _over_groups(sums[1 if need.bn_weight else 0])
        d_bn_weight, d_bn_bias = (found, None) if need.bn_weight else (None, found)
    if dy is None:
        grad_coef = coef if norm is None else coef[:2]
        if norm is not None and batch_stats:
            assert sums is not None
            count = _count(y, stat_groups)
            if norm.process_group is not None:
                assert state.total is not None
                sums = sync.mean_sums(sums, count, state.total, norm.process_group)
            grad_coef = runs.grad_coefficients(sums, coef, count)
        dy = Operand(da, y, grad_coef, act, block.slope)
        if finish:
            dy = Operand((runs.norm_act_ if overwrite else runs.norm_act)(dy))
    return dy, [d_bias, d_bn_weight, d_bn_bias]


def _over_groups(values: Tensor, dim: int = 0) -> Tensor:
    """The sum over the statistics groups, which are dimension `dim`."""
    return values.squeeze(dim) if values.shape[dim] == 1 else values.sum(dim)
