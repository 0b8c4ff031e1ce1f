"""How a chain runs on a CPU: fused, fused in channels_last, or as PyTorch's own modules, which are always a candidate.

What was measured on this machine decides (`dispatch/autotune.py` says when that is), a forward and a backward at a
time, on tensors of their own: no parameter gets a gradient, no buffer is updated.

torch.compile makes better code of PyTorch's modules than they run by themselves: norms and activations become few
passes over memory. To compile a chain only to time it would take many seconds, so its convolutions are timed with as
many copies of their outputs in place of those passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan.activations import to_module
from fastdcgan.dispatch import autotune, router
from fastdcgan.engine import reordered
from fastdcgan.spec import Block, BlockTensors, Running

KIND = "chains"  # of what the autotune cache keeps
MODULES = "PyTorch's modules"
CONTIGUOUS = "PyTorch's modules in contiguous"  # for what is channels_last: a small image of many channels, say
COMPILED = "PyTorch's convolutions and copies of their outputs"
# Of the time of PyTorch's modules. By as much a chain by itself may be off from the same chain in a net, whose caches
# hold other things.
LEAST_GAIN = 0.1
# Milliseconds. A fused chain that takes longer is not compared with PyTorch's modules where all is measured at once: it
# has their convolutions wherever those are faster, so what it can lose is what calls cost.
LONG_MS = 50.0

Run = Callable[[Tensor, Sequence[BlockTensors], Sequence[Running | None]], Tensor]


class Choice(NamedTuple):
    name: str  # of the candidate
    why: str
    gain: float | None  # milliseconds beyond `LEAST_GAIN`, where PyTorch's modules are a candidate


def known(name: str, candidates: Mapping[str, Any], device: torch.device) -> Choice | None:
    """What the autotune cache says of the chain `name`."""
    entry = autotune.lookup(KIND, autotune.machine(device), name)
    if entry is None:
        return None
    try:
        times = {str(of): float(ms) for of, ms in entry.items()}
        if not times or not set(times) <= set(candidates):
            return None
    except (TypeError, ValueError, AttributeError) as error:
        autotune.ignored(error)
        return None
    return _fastest(times)


def measure(
    name: str, candidates: Mapping[str, Run], x: Tensor, tensors: Sequence[BlockTensors],
    running: Sequence[Running | None],
) -> Choice:  # fmt: skip
    """The fastest of the candidates, the first of those that are as fast; and the autotune cache keeps it."""
    # A forward whose convolutions wait may be what calls the chain: these don't wait.
    with autotune.comparing(), torch._C.DisableTorchFunction():
        calls = {of: _work(run, x, tensors, running) for of, run in candidates.items()}
        ours = {of: call for of, call in calls.items() if of not in (MODULES, CONTIGUOUS)}
        firsts = {of: router.milliseconds_besides(call) for of, call in ours.items()}  # measures its contractions
        if autotune.is_at_once() and min(firsts.values()) > LONG_MS:
            times = autotune.milliseconds(ours, x.device, firsts)
        else:
            times = autotune.milliseconds(calls, x.device)
        autotune.remember(KIND, autotune.machine(x.device), name, times)
    return _fastest(times)


def _fastest(times: dict[str, float]) -> Choice:
    name, gain = router.fastest(times), None
    if MODULES in times:
        gain = max(0.0, (1 - LEAST_GAIN) * times[MODULES] - times[name])
        name = name if gain else MODULES
    return Choice(name, "measured: " + ", ".join(f"{of} {ms:.4f} ms" for of, ms in times.items()), gain)


def _work(
    run: Run, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]
) -> Callable[[], None]:
    grad = torch.is_grad_enabled()

    @functools.cache  # a tensor that several blocks share is one
    def spare(t: Tensor) -> Tensor:
        needs = grad and t.requires_grad
        # A parameter's spare is one, too: routes depend on that, and those that are measured have to be the call's.
        return nn.Parameter(t.detach(), needs) if isinstance(t, nn.Parameter) else t.detach().requires_grad_(needs)

    buffers = [_copied(r) for r in running]
    own = []
    for block, r in zip(tensors, buffers, strict=True):
        block = BlockTensors(*(None if t is None else spare(t) for t in block))
        own.append(block if r is None else block._replace(running_mean=r.mean, running_var=r.var))
    leaves = [t for t in (spare(x), *(t for block in own for t in block)) if t is not None]
    da: Tensor | None = None

    def call() -> None:
        nonlocal da
        out = run(spare(x), own, buffers)
        if out.requires_grad:
            da = torch.ones_like(out) if da is None else da
            out.backward(da)
            for t in leaves:
                t.grad = None

    return call


def _copied(r: Running | None) -> Running | None:
    if r is None:
        return None
    count = None if r.num_batches is None else r.num_batches.clone()
    return Running(r.mean.clone(), r.var.clone(), r.momentum, count)


def modules(
    blocks: Sequence[Block], enter: Callable[[Tensor], Tensor], stat_groups: int, x: Tensor,
    tensors: Sequence[BlockTensors], running: Sequence[Running | None],
) -> Tensor:  # fmt: skip
    """What PyTorch's modules do for the blocks; `enter` makes of `x` what the first one gets."""
    x = enter(x)
    for block, t, r in zip(blocks, tensors, running, strict=True):
        x, norm = _convolved(block, x, t), block.norm
        if norm is not None:
            mean, var = (None, None) if norm.batch_stats and r is None else (t.running_mean, t.running_var)
            parts = x.chunk(stat_groups) if stat_groups > 1 and norm.batch_stats and not norm.instance else (x,)
            momenta = [0.0 if r is None or r.momentum is None else r.momentum] * len(parts)
            if r is not None and r.num_batches is not None:
                if r.momentum is None:
                    momenta = [1 / (int(r.num_batches) + i + 1) for i in range(len(parts))]
                r.num_batches.add_(stat_groups)
            function = F.instance_norm if norm.instance else F.batch_norm
            normed = [
                function(part, mean, var, t.bn_weight, t.bn_bias, norm.batch_stats, momentum, norm.eps)
                for part, momentum in zip(parts, momenta, strict=True)
            ]
            x = normed[0] if len(normed) == 1 else torch.cat(normed)
        act = to_module(block.act, block.slope)
        if t.slope is not None:
            x = F.prelu(x, t.slope)
        elif act is not None:
            if block.inplace:
                act.inplace = True  # type: ignore[assignment]
            x = act(x)
    return x


def modules_in_contiguous(
    blocks: Sequence[Block], stat_groups: int, x: Tensor, tensors: Sequence[BlockTensors],
    running: Sequence[Running | None],
) -> Tensor:  # fmt: skip
    """`modules` for `x` [N, C, H, W] and weights that are channels_last, computed in contiguous."""

    def call(x: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
        own = [t._replace(weight=weight) for t, weight in zip(tensors, weights, strict=True)]
        return modules(blocks, lambda x: x, stat_groups, x, own, running)

    with torch._C.DisableTorchFunction():
        return reordered.through_contiguous(x, [t.weight for t in tensors], call)


def compiled(
    blocks: Sequence[Block], enter: Callable[[Tensor], Tensor], x: Tensor, tensors: Sequence[BlockTensors],
    running: Sequence[Running | None],
) -> Tensor:  # fmt: skip
    """What takes about as long as PyTorch's modules under torch.compile."""
    x = enter(x)
    for block, t in zip(blocks, tensors, strict=True):
        x = _Passes.apply(_convolved(block, x, t), 1 if block.norm is None else 2)
    return x


class _Passes(torch.autograd.Function):
    """`count` copies of a tensor forward and of its gradient backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, count: int) -> Tensor:
        ctx.count = count
        return [y.clone() for _ in range(count)][-1]

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:
        return [da.clone() for _ in range(ctx.count)][-1], None


def _convolved(block: Block, x: Tensor, t: BlockTensors) -> Tensor:
    if block.upsamples:
        x, block = F.interpolate(x, scale_factor=2.0), block.after_upsampling()
    g = block.geometry
    if t.weight is None:
        return x
    weight = reordered.own_weight(t.weight, x)
    if not block.transposed:
        return F.conv2d(x, weight, t.bias, g.stride, g.padding, g.dilation, g.groups)
    return F.conv_transpose2d(x, weight, t.bias, g.stride, g.padding, block.output_padding, g.groups, g.dilation)
