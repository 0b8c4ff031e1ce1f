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
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdcgan.engine import sync
from fastdcgan.engine.double_backward import batched, gradients, requested
from fastdcgan.engine.layout import Layout
from fastdcgan.engine.program import Program
from fastdcgan.engine.reordered import in_format
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
    strides_in,
    with_strides,
)


class _State(NamedTuple):
    """What the backward of one block needs beside the chain's inputs."""

    y: Tensor | None  # raw output, or what stands for it
    coef: Tensor | None  # (s, t[, mean, rstd]); None where a = y
    a: Tensor | None  # finished output, where the next block's weight gradient reads it
    total: Tensor | None  # number of values over all processes (synchronised statistics)


class Updates(NamedTuple):
    """`update` gets, of each block that used the batch's own statistics, the `stats` [3, stat_groups, C]; beside the
    blocks' own tensors it reads `counts`, numbers of batches. `how`: all that may differ from call to call."""

    update: Callable[[Sequence[Tensor]], None]
    counts: Sequence[Tensor | None]
    how: Hashable


def run(program: Program, x: Tensor, tensors: Sequence[Tensor | None], updates: Updates) -> Tensor:
    """Run the chain on `x` [N, C, H, W] with `tensors` (the blocks' `BlockTensors`, one after another)."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *tensors)):
        with _quiet(x):
            return _updating(program, x, tensors, None, updates)[0]  # type: ignore[return-value]
    elif torch.compiler.is_compiling():
        out, *found = _Chain.apply(program, None, x, *_distinct(tensors))
    else:  # `update` comes before anything is saved: where checkpointing has all of that, it goes no further
        return _Chain.apply(program, updates, x, *tensors)
    updates.update(found)
    return out


def _updating(
    program: Program, x: Tensor, tensors: Sequence[Tensor | None], saving: Sequence[bool] | None, updates: Updates
) -> list[Tensor | None]:
    """`forward`, and running statistics updated: the output and the states' tensors."""

    def call() -> list[Tensor | None]:
        out, found, states = forward(program, x, tensors, saving)
        updates.update(found)
        return [out, *(t for state in states for t in state)]

    return program.taped(("forward", saving, updates.how), [x, *tensors, *updates.counts], call)


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
        found.append(t if t is None or not any(t is other for other in found) else torch.ops.aten.alias(t))
    return found


# --- forward ---------------------------------------------------------------------------------------------------------


def _known_coefficients(program: Program, block: Block, t: BlockTensors, x: Tensor) -> Tensor:
    """The coef of a block that needs no statistics of the batch."""
    if block.norm is not None:
        assert t.running_mean is not None and t.running_var is not None
        mean, var = t.running_mean[None], t.running_var[None]
        return program.run.coefficients(mean, var, t.bn_weight, t.bn_bias, t.bias, block.norm.eps)
    assert t.weight is not None
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
    a, found, states = Operand(_channels_last(x) if convert else _entry(plan, x, tensors)), [], []
    for i, step in enumerate(program.steps(x.shape[2:], saving)):
        block, keep_y = step.block, step.keep_y
        norm, from_sign = block.norm, step.from_sign
        t = BlockTensors(*tensors[step.first : step.first + PER_BLOCK])
        # PyTorch's convolution rounds its accumulator before a pass adds the bias: in 16 bits that may change the sign.
        at_once = from_sign and (t.bias is None or x.itemsize > 2)
        epilogue, coef, total = STORE, None, None
        if step.stats:
            assert norm is not None
            epilogue = Epilogue("stats", stat_groups=norm.groups(plan.stat_groups, x.shape[0]))
        elif norm is None and (block.act == "identity" or block.learns_slope or (keep_y and not at_once)):
            # The accumulator takes the bias, before it is rounded: so y, which is z, has the right sign.
            if t.bias is not None:
                epilogue = Epilogue("bias", coef=t.bias)
            if block.act != "identity":
                coef = _known_coefficients(program, block, t._replace(bias=None), x)
        else:
            coef = _known_coefficients(program, block, t, x)
            # Where no backward reads y, a is stored at once.
            if block.convolves and not block.learns_slope and (not keep_y or from_sign):
                epilogue = Epilogue("activate", None, coef, block.act, block.slope)
        if block.convolves:
            stays = saving is None and isinstance(t.weight, torch.nn.Parameter)
            call = Call(block.op, a, t.weight, block.geometry, step.out_size, epilogue, stays)
            y, stats = program.contract((i, "forward"), call)
        else:
            y, stats = a.x, _batch_stats(program, a.x, epilogue) if step.stats else None
        if step.stats:
            assert norm is not None
            if norm.process_group is not None:
                stats, total = sync.combine(stats, _count(y, plan.stat_groups), norm.process_group)
            found.append(stats)
            if not step.deferred and not block.learns_slope:
                out, coef = runs.normalize(y, stats, t.bn_weight, t.bn_bias, norm.eps, block.act, block.slope)
                a = Operand(out)
                states.append(_State(y if keep_y else None, coef, out if step.keep_a else None, total))
                continue
            coef = runs.coefficients(stats[0], stats[1], t.bn_weight, t.bn_bias, None, norm.eps)

        if coef is None or epilogue.kind == "activate":
            a = Operand(y)
            kept = y if epilogue.kind == "activate" and step.reached else None
            if kept is not None and t.bias is not None:  # the output has it
                coef = _known_coefficients(program, block, t._replace(bias=None), x)
            states.append(_State(kept, None if kept is None else coef, y if step.keep_a else None, None))
            continue
        if t.slope is not None:
            coef = _with_row(coef, t.slope)
        a = Operand(y, None, coef, block.act, block.slope)
        if from_sign or not step.deferred:
            mine = block.convolves or i > 0  # else y is the caller's
            a = Operand((runs.norm_act_ if mine and (from_sign or not keep_y) else runs.norm_act)(a))
        if from_sign:
            states.append(_State(a.x if keep_y else None, coef, a.x if step.keep_a else None, None))
            continue
        states.append(_State(y if keep_y else None, coef, a.x if step.keep_a and not step.deferred else None, total))
    return with_strides(a.x, program.layout(x, tensors).out), found, states


def _with_row(coef: Tensor, slope: Tensor) -> Tensor:
    """A coef or grad_coef with one row more: a learned slope."""
    return torch.cat([coef, slope.to(coef.dtype).expand(1, *coef.shape[1:])])


def _channels_last(x: Tensor) -> Tensor:
    """`x` in channels_last, and with its strides where they are ambiguous."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.as_strided(x.shape, strides_in(x.shape, torch.channels_last))


def _batch_stats(program: Program, y: Tensor, epilogue: Epilogue) -> Tensor:
    """`stats` where no contraction has them for an epilogue."""
    if y.shape[0] == 0:  # one process's share of a synchronised batch
        return y.new_zeros((3, epilogue.stat_groups, y.shape[1]), dtype=stat_dtype(y))
    return program.run.batch_stats(y, epilogue.stat_groups)


def _entry(plan: Plan, x: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
    """`x`, said to be channels_last where it has one channel and the second block's weight is channels_last; without
    gaps where it is a raw output.

    One channel is both formats at once. PyTorch would call it contiguous, the first output too, and the second
    convolution would have to convert that.
    """
    if not plan.blocks[0].convolves:
        return x.contiguous(memory_format=memory_format(x))
    if len(tensors) == PER_BLOCK or x.shape[1] != 1 or not x.is_contiguous():
        return x
    weight = tensors[PER_BLOCK]
    if weight is None or memory_format(weight) != torch.channels_last:
        return x
    return _channels_last(x)


def _count(y: Tensor, stat_groups: int) -> int:
    """M: the number of values that share one statistic."""
    return y.shape[0] // stat_groups * y.shape[2] * y.shape[3]


# --- backward --------------------------------------------------------------------------------------------------------


class _Chain(torch.autograd.Function):
    """(program, updates, x, *tensors) -> the output, and the stats too where there are no `updates`.

    Saved is what the backward reads, or that of the plain modules: a change of it in place raises. All else that
    gradients of gradients read (create_graph=True) is kept beside, and has to be what it was only for those.
    """

    @staticmethod
    def forward(ctx, program: Program, updates: Updates | None, x: Tensor, *tensors: Tensor | None):
        needs = ctx.needs_input_grad[2:]
        found: list[Tensor] = []
        with _quiet(x):
            if updates is not None:
                out, *saved = _updating(program, x, tensors, needs, updates)
            else:
                out, found, states = forward(program, x, tensors, needs)
                saved = [t for state in states for t in state]
        inputs = (x, *tensors)
        ctx.program, ctx.given = program, [t is not None for t in inputs]
        ctx.read, beside = program.read(x, needs)
        if updates is not None:
            ctx.beside = [(i, t, _version(t)) for i in beside if (t := inputs[i]) is not None]
            ctx.layout, ctx.size, ctx.stride = program.layout(x, tensors), x.shape[2:], x.stride()
        ctx.save_for_backward(*[inputs[i] for i in ctx.read], *saved)
        ctx.set_materialize_grads(False)
        if updates is not None:
            return out
        ctx.mark_non_differentiable(*found)
        return (out, *found)

    @staticmethod
    def backward(ctx, da: Tensor | None, *unused):
        with _NOTHING if torch.compiler.is_compiling() else torch._C.DisableTorchFunctionSubclass():
            return _Chain._backward(ctx, da)

    @staticmethod
    def _backward(ctx, da: Tensor | None) -> tuple[Tensor | None, ...]:
        program, saved, read = ctx.program, ctx.saved_tensors, ctx.read
        needs = requested(ctx, ctx.needs_input_grad[2:], ctx.given)
        if da is None:
            return (None,) * (2 + len(needs))
        inputs: list[Tensor | None] = [None] * len(needs)
        for i, t in zip(read, saved, strict=False):
            inputs[i] = t
        x, compiling = inputs[0], torch.compiler.is_compiling()
        if compiling:
            assert x is not None
            ctx.layout, ctx.size = program.layout(x, inputs[1:]), x.shape[2:]
        elif x is not None and x.stride() != ctx.stride:  # somebody asked for its format after the chain had run
            inputs[0] = in_format(x, torch.channels_last)
        if not compiling and (torch.is_grad_enabled() or batched(da)):  # create_graph=True, is_grads_batched=True
            layout = None if batched(da) else ctx.layout
            for i, t, version in ctx.beside:
                if _version(t) != version:
                    name = BlockTensors._fields[(i - 1) % PER_BLOCK] if i else "input"
                    raise RuntimeError(
                        f"gradients of gradients need the {name} of a block as it was in the forward, and it has been "
                        f"modified by an inplace operation: it is at version {_version(t)}, expected {version}"
                    )
                inputs[i] = t
            return (None, None, *gradients(program.plan, layout, inputs, needs, da))
        found = saved[len(read) :]

        def call() -> list[Tensor | None]:
            states = [_State(*found[i : i + 4]) for i in range(0, len(found), 4)]
            return backward(program, ctx.layout, ctx.size, inputs[0], inputs[1:], states, needs, da)

        x = inputs[0]
        key = ("backward", tuple(needs), da.dtype, da.shape, da.stride(), None if x is None else x.stride())
        with _quiet(da):
            return (None, None, *program.taped(key, [da, *inputs, *found], call))


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def backward(
    program: Program,
    layout: Layout,
    size: Sequence[int],
    x: Tensor | None,
    tensors: Sequence[Tensor | None],
    states: Sequence[_State],
    needs: Sequence[bool],
    da: Tensor,
) -> list[Tensor | None]:
    """Gradients of (x, *tensors), None where `needs` says so; of x only its `size` is known where nothing reads it."""
    plan = program.plan
    grads: list[Tensor | None] = [None] * len(needs)
    steps = program.steps(size, needs)
    given = program.direct and says_channels_last(da)  # as all gradients within the chain follow
    sums: Tensor | None = None  # given: `da` is already g, and these are its sums (a deferred boundary)
    for i in reversed(range(len(plan.blocks))):
        if not steps[i].reached:
            break
        block, first = plan.blocks[i], 1 + i * PER_BLOCK
        passes_on = steps[i - 1].reached if i else needs[0]
        t = of_block(tensors, i)
        need = of_block(needs[1:], i)
        finish = not (block.convolves and plan.boundaries.lazy_grad[i]) and (bool(need.weight) or passes_on)
        dy, grads[first : first + PER_BLOCK] = _norm_act_backward(
            program, block, states[i], t, need, da, sums, finish, i + 1 < len(plan.blocks)
        )
        lazy = dy.coef is not None
        if need.weight:
            if i == 0:
                assert x is not None
                a = Operand(x)
            else:
                a = _rebuilt(plan.blocks[i - 1], states[i - 1])
            gathered, linear = (dy, a) if block.transposed else (a, dy)
            wanted = layout.weight_grads[i]
            call = Call(
                "weight_grad", gathered, linear, block.geometry, block.geometry.kernel, contiguous=wanted[-1] == 1
            )
            grads[first] = with_strides(program.contract((i, "weight_grad", given, lazy), call), wanted)
        if passes_on and not block.convolves:
            da, sums = dy.x, None
        elif passes_on:
            epilogue = _boundary_epilogue(plan, i, states)
            call = Call(block.adjoint, dy, t.weight, block.geometry, steps[i].in_size, epilogue)
            da, found = program.contract((i, "input_grad", given, lazy, epilogue.kind), call)
            sums = found if epilogue.kind == "grad_stats" else None
    if needs[0]:
        grads[0] = with_strides(da, layout.input_grad)
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
    t: BlockTensors,
    need: BlockTensors,
    da: Tensor,
    sums: Tensor | None,
    finish: bool,
    overwrite: bool,
) -> tuple[Operand, list[Tensor | None]]:
    """dy, computed if `finish`, and the gradients of `t`, but its weight's. With `sums`, `da` is g already.

    With `overwrite` dy may take the place of `da`: a gradient between two blocks, which nobody but the chain has seen.
    """
    y, coef, norm, runs = state.y, state.coef, block.norm, program.run
    if coef is None:
        d_bias = da.sum((0, 2, 3), dtype=stat_dtype(da)) if need.bias else None
        return Operand(da), _gradients(d_bias)
    if norm is None and sums is not None:  # s = 1
        return Operand(da), _gradients(_over_groups(sums[0]) if need.bias else None)
    assert y is not None
    act = block.act if sums is None else "identity"
    batch_stats = norm is not None and norm.batch_stats
    dy: Operand | None = None
    fused = finish and not block.learns_slope
    if sums is None and norm is None and need.bias and fused and program.direct:
        grad_stats = runs.grad_stats_ if overwrite else runs.grad_stats
        g, sums = grad_stats(da, y, coef, act, block.slope)
        return Operand(g), _gradients(_over_groups(sums[0]))
    if sums is None and norm is not None and batch_stats and norm.process_group is None and fused:
        normalize_backward = runs.normalize_backward_ if overwrite else runs.normalize_backward
        out, sums = normalize_backward(da, y, coef, _count(y, coef.shape[1]), act, block.slope)
        dy = Operand(out)
    elif sums is None and (batch_stats or need.bias or need.bn_weight or need.bn_bias or need.slope):
        sums = runs.norm_act_reduce(da, y, coef, act, block.slope)
    d_bias = d_bn_weight = d_bn_bias = d_slope = None
    if block.learns_slope:
        if need.slope:
            assert sums is not None and t.slope is not None
            d_slope = _over_groups(sums[-1]).sum_to_size(t.slope.shape)
        coef, sums = coef[:-1], None if sums is None else sums[:-1]
    if need.bias and batch_stats:  # the mean takes every constant out
        d_bias = torch.zeros_like(coef[0, 0])
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
            count = _count(y, coef.shape[1])
            if norm.process_group is not None:
                assert state.total is not None
                sums = sync.mean_sums(sums, count, state.total, norm.process_group)
            grad_coef = runs.grad_coefficients(sums, coef, count)
        if t.slope is not None:
            grad_coef = _with_row(grad_coef, t.slope)
        dy = Operand(da, y, grad_coef, act, block.slope)
        if finish:
            dy = Operand((runs.norm_act_ if overwrite else runs.norm_act)(dy))
    return dy, _gradients(d_bias, d_bn_weight, d_bn_bias, d_slope)


def _gradients(
    bias: Tensor | None, bn_weight: Tensor | None = None, bn_bias: Tensor | None = None, slope: Tensor | None = None
) -> list[Tensor | None]:
    """In the order of `BlockTensors`."""
    return [None, bias, bn_weight, bn_bias, None, None, slope]


def _over_groups(values: Tensor, dim: int = 0) -> Tensor:
    """The sum over the statistics groups, which are dimension `dim`."""
    return values.squeeze(dim) if values.shape[dim] == 1 else values.sum(dim)
