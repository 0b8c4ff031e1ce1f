"""Running what `match` found: planned once for a signature, run many times behind a guard.

The first call of a `FusedSequential` finds its blocks and plans each chain of them. What it found is kept on the
module; a later call checks that modules and tensors are what they were (microseconds), and runs the plan. Whatever may
change a plan is in the guard: the modules themselves with their hooks, modes and numbers (`_Structure`); dtype, device,
shape, strides and requires_grad of the tensors, autocast, grad mode, the backend, PyTorch's settings (`_Chain._run`).
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from fastdcgan import backends, checks
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import primitives, router
from fastdcgan.engine import autograd, planner
from fastdcgan.engine.double_backward import formula
from fastdcgan.engine.match import Alone, FoundBlock, FoundChain, block_of, process_group, runs_blocks, segments
from fastdcgan.engine.program import Program
from fastdcgan.spec import Block, BlockTensors, Running, Update

# Device types without autocast, which raise where they are asked whether it is on. A list, since Dynamo of torch 2.11
# can't trace torch.amp.is_autocast_available.
_NO_AUTOCAST = frozenset({"meta", "lazy", "vulkan", "ve", "opengl", "opencl", "ideep", "hip", "fpga"})
_PLANS = 64  # of a chain, for as many signatures
_STRUCTURES = 4  # of a Sequential: as many of its states (training, eval, ...)


# --- a Sequential -----------------------------------------------------------------------------------------------------


def run_sequential(sequential: nn.Sequential, x: Any, stat_groups: int | torch.fx.Proxy, boundaries: str) -> Any:
    """`nn.Sequential.forward` with every chain in it run as one."""
    if isinstance(stat_groups, torch.fx.Proxy):
        stat_groups = 1  # torch.fx traces the root module's default as an input
    checks.check_stat_groups(stat_groups)
    if _needs_every_module(x) or _runs_plain(x):
        for module in sequential:
            x = _call_alone(module, x, stat_groups)
        return x
    for part in _parts(sequential):
        x = (
            _call_alone(part.module, x, stat_groups)
            if isinstance(part, Alone)
            else part(x, stat_groups, boundaries)
        )  # fmt: skip
    return x


def _needs_every_module(x: Any) -> bool:
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


def why_plain(device_type: str, dtype: torch.dtype) -> str | None:
    """Why "auto" runs PyTorch's own modules, or None: where the compiled backend that is meant for this device and
    dtype is missing, they are faster than the reference."""
    if backends.requested() != "auto" or backends.missing(device_type) is None:
        return None
    if backends.select("auto", device_type, dtype) != "reference":
        return None
    return backends.missing(device_type)


_warned: set[str] = set()


def _runs_plain(x: Any) -> bool:
    if not isinstance(x, Tensor) or backends.missing(x.device.type) is None:
        return False
    reason = why_plain(x.device.type, compute_dtype(x))
    if reason is not None and reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(reason)
        warnings.warn(f"blocks run as PyTorch's own modules: {reason}", stacklevel=5)
    return reason is not None


def _call_alone(module: nn.Module, x: Any, stat_groups: int) -> Any:
    if stat_groups == 1:
        return module(x)
    if runs_blocks(module):
        return module(x, stat_groups=stat_groups)
    if any(isinstance(m, _BatchNorm) and m.training for m in module.modules()):
        if x.shape[0] % stat_groups:
            raise ValueError(f"stat_groups={stat_groups} must divide the batch size, got a batch of {x.shape[0]}")
        return torch.cat([module(part) for part in x.chunk(stat_groups)])
    return module(x)


# --- its structure, found once ----------------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "output_padding", "padding_mode")
_NORM = ("training", "eps", "momentum", "num_features", "track_running_stats")


def _watched(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that decide what it is in a chain."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return _HOOKS + _CONV
    if isinstance(module, _BatchNorm):
        return _HOOKS + _NORM
    slopes = [row.slope_name for row in ACTIVATIONS.values() if row.slope_name in module.__dict__]
    others = [name for name in ("approximate", "inplace") if name in module.__dict__]
    return (*_HOOKS, *slopes, *others)


def _copied(value: Any) -> Any:
    """A value that stays as it is when the original is changed in place."""
    return type(value)(value) if isinstance(value, (dict, list)) else value


class _Structure:
    """The chains of a Sequential, and what has to hold for them to be that.

    It has no reference to the Sequential itself, which keeps it: that would be a circle, and a model that is given up
    would keep its memory until the garbage collector comes.
    """

    def __init__(self, sequential: nn.Sequential) -> None:
        self.parts = [_Chain(p) if isinstance(p, FoundChain) else p for p in segments(sequential)]
        self._children = list(sequential._modules.values())
        self._nested: list[tuple[nn.Module, list]] = []
        self._modules: list[tuple] = []
        self._forwards: dict[Any, Any] = {}
        self._watch(self._children)

    def _watch(self, modules: list) -> None:
        for module in modules:
            names = _watched(module)
            get = operator.itemgetter(*names)
            state = tuple(map(_copied, get(module.__dict__)))
            self._modules.append((module, type(module), module.__dict__, len(module.__dict__), get, state))
            self._forwards[type(module)] = type(module).forward
            if isinstance(module, nn.Sequential):
                children = list(module._modules.values())
                self._nested.append((module, children))
                self._watch(children)

    def holds(self, sequential: nn.Sequential) -> bool:
        if list(sequential._modules.values()) != self._children:
            return False
        for nested, children in self._nested:
            if list(nested._modules.values()) != children:
                return False
        for module, kind, attributes, count, get, state in self._modules:
            if module.__class__ is not kind or len(attributes) != count or get(attributes) != state:
                return False
        return all(kind.forward is forward for kind, forward in self._forwards.items())


class Plans(list):
    """What is kept on a module: its structures, the one that held last first. A copy of the module starts anew."""

    def __deepcopy__(self, memo: dict) -> Plans:
        return Plans()

    def __reduce__(self) -> tuple:
        return Plans, ()


def _parts(sequential: nn.Sequential) -> list:
    """The chains of a Sequential and the modules between them."""
    if torch.compiler.is_compiling():  # which guards by itself
        return [_Chain(p) if isinstance(p, FoundChain) else p for p in segments(sequential)]
    kept = sequential.__dict__.get("_plans")
    if kept is None:
        kept = sequential.__dict__["_plans"] = Plans()
    for i, structure in enumerate(kept):  # other threads may change the list: of a replica of the same module, say
        if structure.holds(sequential):
            if i:
                kept.insert(0, kept.pop(i))
            return structure.parts
    structure = _Structure(sequential)
    kept.insert(0, structure)
    del kept[_STRUCTURES:]
    return structure.parts


# --- a chain of it ----------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What `explain` saw of one block that ran."""

    conv: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    backend: str
    route: str  # how its contraction ran


recorder: list[Record] | None = None  # where `explain` collects them

_METADATA = operator.attrgetter("dtype", "device", "shape", "requires_grad", "__class__")


class _Chain:
    """A chain of a Sequential, with its plans."""

    def __init__(self, found: FoundChain) -> None:
        self._found = found
        self._norms = [b.norm for b in found.blocks if isinstance(b.norm, nn.SyncBatchNorm)]
        self._plans: dict[tuple, Planned] = {}

    def __call__(self, x: Tensor, stat_groups: int, boundaries: str) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a torch.Tensor as input, got {type(x).__name__}")
        found = self._found
        tensors = [_tensors(b) for b in found.blocks]
        given = [x, *(t for block in tensors for t in block)]
        direct = primitives.unwatched(*given)
        if not direct and not torch.compiler.is_compiling() and any(map(_knows_only_torch, given)):
            for module in (m for block in found.blocks for m in block.modules()):
                x = _call_alone(module, x, stat_groups)
            return x
        unbatched = x.dim() == 3 and all(b.norm is None for b in found.blocks)
        if unbatched:
            x = x[None]
        if found.pad is not None:
            x = F.pad(x, found.pad[0], found.pad[1])
        given[0] = x
        autocast = _autocast_dtype(x)
        backend = backends.select(backends.requested(), x.device.type, autocast or x.dtype)
        if recorder is not None and not torch.compiler.is_compiling():
            with router.recording() as routes:
                out = self._run(x, tensors, stat_groups, boundaries, backend, autocast, given if direct else None)
            for block, route in zip(found.blocks, routes, strict=False):
                recorder.append(Record(block.conv, tuple(x.shape), compute_dtype(x), backend, route))
        else:
            out = self._run(x, tensors, stat_groups, boundaries, backend, autocast, given if direct else None)
        return out[0] if unbatched else out

    def _run(
        self,
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
            key = (
                x.stride(), stat_groups, boundaries, backend, torch.is_grad_enabled(), autocast,
                router.settings(backend), *(process_group(norm) for norm in self._norms),
                *(None if t is None else _METADATA(t) for t in given), *(t.weight.stride() for t in tensors),
            )  # fmt: skip
            planned = self._plans.get(key)
        if planned is None:
            padded = self._found.pad is not None
            blocks = [block_of(b, padded and i == 0, backend) for i, b in enumerate(self._found.blocks)]
            planned = Planned(blocks, x, tensors, stat_groups, boundaries, given is not None)
            if given is not None:
                if len(self._plans) >= _PLANS:
                    self._plans.clear()
                self._plans[key] = planned
        return planned(x, tensors, [_running(b.norm, t) for b, t in zip(self._found.blocks, tensors, strict=True)])


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


def _running(norm: nn.BatchNorm2d | nn.SyncBatchNorm | None, t: BlockTensors) -> Running | None:
    if norm is None or not norm.training or not norm.track_running_stats:
        return None
    if t.running_mean is None or t.running_var is None:
        return None
    momentum, count = norm.momentum, _of(norm, norm._buffers, "num_batches_tracked")
    if momentum is None and count is None:
        momentum = 0.0
    return Running(t.running_mean, t.running_var, momentum, count)


# --- one plan, run with the tensors of a call -------------------------------------------------------------------------


def block_backend(x: Tensor) -> str:
    """The backend that runs a block on `x`, as `backend()`, FASTDCGAN_BACKEND and the machine have it."""
    return backends.select(backends.requested(), x.device.type, compute_dtype(x))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts `x` to where it is on (never float64), or None."""
    if x.device.type in _NO_AUTOCAST or not torch.is_autocast_enabled(x.device.type):
        return None
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of `x` runs in: autocast's where it is on, else x's own."""
    return _autocast_dtype(x) or x.dtype


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
    ) -> None:
        checks.check_boundaries(boundaries)
        self._dtype = _autocast_dtype(x) if isinstance(x, Tensor) else None
        casts_weights = self._dtype is not None and _casts_weights(blocks[0].backend, x, tensors, direct)
        self._left = (torch.float64, torch.float32) if casts_weights else (torch.float64,)
        x, tensors = self._cast(x, tensors)
        checks.check_chain(blocks, stat_groups, x, [v for t in tensors for v in t], casts_weights)
        alone = all(b.norm is None or b.norm.process_group is None for b in blocks)
        self._empty = alone and x.shape[0] == 0
        self._program = Program(planner.plan(blocks, x, tensors, stat_groups, boundaries), direct)

    def _cast(self, x: Tensor, tensors: Sequence[BlockTensors]) -> tuple[Tensor, Sequence[BlockTensors]]:
        if self._dtype is None:
            return x, tensors
        left = self._left
        cast = [t if t.weight.dtype in left else t._replace(weight=t.weight.to(self._dtype)) for t in tensors]
        return x.to(self._dtype), cast

    def __call__(self, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]) -> Tensor:
        """The output for `x` [N, C, H, W]; `running` is updated."""
        program = self._program
        x, tensors = self._cast(x, tensors)
        flat = [v for t in tensors for v in t]
        if self._empty:  # as PyTorch: an empty output, zero gradients, running statistics as they were
            for r in running:
                if r is not None and r.num_batches is not None:
                    r.num_batches.add_(program.plan.stat_groups)
            return formula(program.plan, x, flat, program.layout(x, flat))
        return autograd.run(program, x, flat, functools.partial(self._update_running, tensors, running))

    def _update_running(
        self, tensors: Sequence[BlockTensors], running: Sequence[Running | None], found: Sequence[Tensor]
    ) -> None:
        program, waiting, updates = self._program, iter(found), []
        for block, t, r in zip(program.plan.blocks, tensors, running, strict=True):
            if block.norm is not None and block.norm.batch_stats:
                stats = next(waiting)
                if r is not None:
                    updates.append(_update(t, r, stats, program.plan.stat_groups))
        if updates:
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
