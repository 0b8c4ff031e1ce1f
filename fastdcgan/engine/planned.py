"""A chain that is planned for the signature of its inputs, and run with the tensors of a call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fastdcgan import backends, checks
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import primitives
from fastdcgan.engine import autograd, choice, planner, upsampling
from fastdcgan.engine.double_backward import formula
from fastdcgan.engine.program import Program
from fastdcgan.spec import Block, BlockTensors, Running, Update

# Device types without autocast, which raise where they are asked whether it is on. A list, since Dynamo of torch 2.11
# can't trace torch.amp.is_autocast_available.
_NO_AUTOCAST = frozenset({"meta", "lazy", "vulkan", "ve", "opengl", "opencl", "ideep", "hip", "fpga"})


def block_backend(x: Tensor) -> str:
    """The backend that runs a block on `x`, as `backend()`, FASTDCGAN_BACKEND and the machine have it."""
    return backends.select(backends.requested(), x.device.type, compute_dtype(x))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts `x` to where it is on (never float64), or None."""
    if x.device.type in _NO_AUTOCAST or not torch.is_autocast_enabled(x.device.type):
        return None
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of `x` runs in: autocast's where it is on, else x's own."""
    return autocast_dtype(x) or x.dtype


def followed(x: Any) -> bool:
    """Whether the call is followed module by module: by global hooks, by tracers, by transforms that know PyTorch's own
    functions but no chain (torch.func, forward-mode differentiation); or is of complex numbers or of another layout
    (sparse, MKL-DNN's, nested), which none takes."""
    if isinstance(x, Tensor) and (x.is_complex() or x.layout is not torch.strided or x.is_nested):
        return True
    if torch.compiler.is_compiling():
        return _has_any_global_hook()
    return (
        _has_any_global_hook()
        or torch.jit.is_tracing()
        or isinstance(x, torch.fx.Proxy)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _casts_weights(backend: str, x: Tensor, tensors: Sequence[BlockTensors], direct: bool) -> bool:
    """Whether the backend's contractions get float32 weights under autocast, and cast them: where no gradient needs a
    cast tensor. What a backend makes of a parameter it may keep from call to call, but not of a tensor of one call."""
    if not direct or not backends.get(backend).casts_weights or x.numel() == 0:
        return False
    return not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for t in tensors for v in (x, *t))


class Planned:
    """A chain that was checked and planned for the signature of its inputs.

    Raises TypeError or ValueError (`checks.check_chain`) before anything is written.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        tensors: Sequence[BlockTensors],
        stat_groups: int,
        boundaries: str,
        direct: bool,
        channels_last: bool | None = None,
    ) -> None:
        checks.check_boundaries(boundaries)
        self._upsampling = [i for i, block in enumerate(blocks) if block.upsamples]
        autocast = autocast_dtype(x) if isinstance(x, Tensor) else None
        self._dtype = autocast if any(b.convolves for b in blocks) else None
        casts_weights = self._dtype is not None and _casts_weights(blocks[0].backend, x, tensors, direct)
        self._left = (torch.float64, torch.float32) if casts_weights else (torch.float64,)
        x, tensors = self._cast(x, tensors)
        checks.check_chain(blocks, stat_groups, x, [v for t in tensors for v in t], casts_weights)
        casts = x.device.type in ACTIVATIONS[blocks[-1].act].float32_under_autocast
        self._widens = casts and autocast not in (None, torch.float64)
        alone = all(b.norm is None or b.norm.process_group is None for b in blocks)
        self._empty = alone and x.shape[0] == 0
        self._program = Program(planner.plan(blocks, x, tensors, stat_groups, boundaries, channels_last), direct)
        self.plan = self._program.plan
        self.calls = 0
        self.settled = True  # whether it will stay the way that the chain runs
        self.why_modules: str | None = None  # where PyTorch's modules were measured to be faster
        self.gain: float | None = None  # milliseconds over those, where that was measured
        self.in_contiguous = False  # by PyTorch's modules, though it is channels_last
        self.why_contiguous: str | None = None

    def _cast(self, x: Tensor, tensors: Sequence[BlockTensors]) -> tuple[Tensor, Sequence[BlockTensors]]:
        if self._upsampling:  # before a cast, so that its sums are rounded once
            tensors = list(tensors)
            for i in self._upsampling:
                tensors[i] = tensors[i]._replace(weight=upsampling.weight(tensors[i].weight))  # type: ignore[arg-type]
        if self._dtype is None:
            return x, tensors
        left = self._left
        cast = [
            t if t.weight is None or t.weight.dtype in left else t._replace(weight=t.weight.to(self._dtype))
            for t in tensors
        ]
        cast = [t if t.slope is None else t._replace(slope=t.slope.to(self._dtype)) for t in cast]
        return x.to(self._dtype), cast

    def __call__(self, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]) -> Tensor:
        """The output for `x` [N, C, H, W]; `running` is updated."""
        if self.in_contiguous:
            plan = self.plan
            return choice.modules_in_contiguous(plan.blocks, plan.stat_groups, x, tensors, running)
        out = self._run(x, tensors, running)
        return out.float() if self._widens else out

    def _run(self, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]) -> Tensor:
        program = self._program
        x, tensors = self._cast(x, tensors)
        flat = [v for t in tensors for v in t]
        if self._empty:  # as PyTorch: an empty output, zero gradients, running statistics as they were
            for r in running:
                if r is not None and r.num_batches is not None:
                    r.num_batches.add_(program.plan.stat_groups)
            return formula(program.plan, x, flat, program.layout(x, flat))
        update = functools.partial(self._update_running, tensors, running)
        counts = [None if r is None else r.num_batches for r in running]
        how = tuple(
            None if r is None else (r.momentum, r.num_batches is None, r.mean.is_contiguous(), r.var.is_contiguous())
            for r in running
        )
        return autograd.run(program, x, flat, autograd.Updates(update, counts, how))

    def _update_running(
        self, tensors: Sequence[BlockTensors], running: Sequence[Running | None], found: Sequence[Tensor]
    ) -> None:
        program, waiting, updates = self._program, iter(found), []
        for block, t, r in zip(program.plan.blocks, tensors, running, strict=True):
            if block.norm is not None and block.norm.batch_stats:
                stats = next(waiting)
                if r is not None and block.norm.instance:  # the images' mean statistics count once
                    updates.append(_update(t, r, stats.mean(1, keepdim=True), 1))
                elif r is not None:
                    updates.append(_update(t, r, stats, program.plan.stat_groups))
        if updates:
            if program.direct:  # as in PyTorch, what was saved of running statistics doesn't count that as a change
                updates = [u._replace(mean=u.mean.data, var=u.var.data) for u in updates]
            program.run.update_all_running(updates)


def _update(t: BlockTensors, r: Running, stats: Tensor, stat_groups: int) -> Update:
    """How the running statistics change; counts the batch."""
    factor = None
    if r.num_batches is not None:
        if r.momentum is None:
            steps = torch.arange(1, stat_groups + 1, device=stats.device)
            factor = (1.0 / (r.num_batches + steps).double()).to(stats.dtype)
        r.num_batches.add_(stat_groups)
    bias = None if t.bias is None else t.bias.detach()
    return Update(r.mean, r.var, stats, bias, factor, 0.0 if r.momentum is None else r.momentum)


def run_chain(
    blocks: Sequence[Block],
    x: Tensor,
    tensors: Sequence[BlockTensors],
    running: Sequence[Running | None],
    stat_groups: int = 1,
    boundaries: str = "auto",
) -> Tensor:
    """Plan a chain and run it on `x` [N, C, H, W], for whoever keeps no plan."""
    direct = isinstance(x, Tensor) and primitives.unwatched(
        x, *(v for t in tensors for v in t if isinstance(v, Tensor))
    )
    return Planned(blocks, x, tensors, stat_groups, boundaries, direct)(x, tensors, running)
