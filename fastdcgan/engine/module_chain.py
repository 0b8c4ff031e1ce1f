"""A chain of modules that a Sequential calls."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastdcgan import backends
from fastdcgan.dispatch import primitives
from fastdcgan.engine import reordered
from fastdcgan.engine.chain import Chain
from fastdcgan.engine.match import WHY_BARE, FoundBlock, FoundChain, block_of, process_group, runs_blocks
from fastdcgan.engine.planned import autocast_dtype, block_backend
from fastdcgan.spec import Block, BlockTensors, Running


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


class ModuleChain(Chain):
    """What `match.segments` found, and runs it."""

    def __init__(self, found: FoundChain) -> None:
        super().__init__()
        self._found = found
        self._norms = [b.norm for b in found.blocks if isinstance(b.norm, nn.SyncBatchNorm)]
        self._upsamples = any(b.up is not None for b in found.blocks)
        self.bare = found.bare
        self.convolves = any(b.conv is not None for b in found.blocks)
        self._parts: list[ModuleChain] = []  # where they have to run one after the other
        self.ran_modules = False  # at the last call, and will for the like of it

    def __call__(self, x: Tensor, stat_groups: int, boundaries: str) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a torch.Tensor as input, got {type(x).__name__}")
        x = reordered.entered(x, (_stored_weight(block.conv) for block in self._found.blocks))
        starts_with_norm = self._found.blocks[0].conv is None
        if (self._upsamples or starts_with_norm) and x.dim() != 4:  # upsampling takes channels for a batch
            return self.as_modules(x, stat_groups)
        if starts_with_norm and self.convolves and autocast_dtype(x) not in (None, x.dtype):
            return self._normalised_before_it_is_cast(x, stat_groups, boundaries)
        with reordered.as_a_tensor(x):
            out = self._run_fused(x, stat_groups, boundaries)
        return self.as_modules(x, stat_groups) if out is None else reordered.like(out, x)

    def _run_fused(self, x: Tensor, stat_groups: int, boundaries: str) -> Tensor | None:
        """None where the modules should run."""
        brief, compiling = self._brief(x, stat_groups, boundaries), torch.compiler.is_compiling()
        self.ran_modules = self.why_plain(x, brief) is not None
        if not self.ran_modules and self.bare and not compiling and not self._bare_may_gain(x, boundaries):
            self.ran_modules = True
            self._record(x, None, [WHY_BARE])
        if self.ran_modules:
            return None
        tensors = [_tensors(b) for b in self._found.blocks]
        return self.run(x, tensors, self._running(tensors), stat_groups, boundaries, brief)

    def _normalised_before_it_is_cast(self, x: Tensor, stat_groups: int, boundaries: str) -> Tensor:
        """Autocast casts what a convolution gets, and no norm's input."""
        blocks = self._found.blocks
        first = next(i for i, block in enumerate(blocks) if block.conv is not None)
        if not self._parts:
            self._parts = [ModuleChain(FoundChain(part)) for part in (blocks[:first], blocks[first:])]
        for part in self._parts:
            x = part(x, stat_groups, boundaries)
        self.ran_modules = all(part.ran_modules for part in self._parts)
        return x

    def as_modules(self, x: Tensor, stat_groups: int) -> Tensor:
        """What the modules make of an input."""
        for block in self._found.blocks:
            for module in block.modules():
                x = call_alone(module, x, stat_groups)
        return x

    def blocks(self, backend: str) -> list[Block]:
        padded = self._found.pad is not None
        return [block_of(b, padded and i == 0, backend) for i, b in enumerate(self._found.blocks)]

    def entered(self, x: Tensor) -> Tensor:
        if x.dim() == 3 and all(b.norm is None or isinstance(b.norm, nn.InstanceNorm2d) for b in self._found.blocks):
            x = x[None]
        pad = self._found.pad
        return x if pad is None else F.pad(x, pad[0], pad[1])

    def shared(self) -> tuple[Hashable, ...]:
        return tuple(map(process_group, self._norms)) if self._norms else ()

    def records(self) -> list[tuple[Any, str, bool]]:
        return [(b.first, b.pattern, b.conv is not None) for b in self._found.blocks]

    def compiled_as_modules(self, x: Tensor, stat_groups: int) -> bool:
        """`compiles_to_modules` for the tensors that the modules have."""
        if self._upsamples and x.dim() != 4:
            return True
        tensors = [_stored(b) for b in self._found.blocks]
        found = [t for t in tensors if t is not None]
        norms = [b.norm for b in self._found.blocks if b.norm is not None]
        counted = [n for n in norms if not isinstance(n, nn.InstanceNorm2d)]
        breaks = any(
            n.training and n.momentum is None for n in counted
        )  # the graph: PyTorch reads the count of batches
        if breaks or len(found) < len(tensors):
            return self.bare
        return self.compiles_to_modules(x, found, self._running(found), stat_groups)

    def _bare_may_gain(self, x: Tensor, boundaries: str) -> bool:
        """Whether it can be measured. Not where a hook or a parametrization makes the weight: until it is measured its
        module runs, which would do so again."""
        conv = self._found.blocks[0].first
        weight = conv._parameters.get("weight")
        if weight is None or conv._forward_pre_hooks or not primitives.unwatched(x, weight):
            return False
        return self.has_choice(x, boundaries, block_backend(x))

    def _brief(self, x: Tensor, stat_groups: int, boundaries: str) -> tuple:
        """The little that may change which way is the fastest: PyTorch's modules are right whatever else changes."""
        first = self._found.blocks[0].first
        weight = first._parameters.get("weight")
        return (
            x.shape, x.stride(), x.dtype, x.requires_grad, torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(),
            stat_groups, boundaries, first.training, weight is not None and weight.requires_grad, backends.requested(),
        )  # fmt: skip

    def _running(self, tensors: list[BlockTensors]) -> list[Running | None]:
        return [_running(b.norm, t) for b, t in zip(self._found.blocks, tensors, strict=True)]


def _of(module: nn.Module, stored: dict[str, Any], name: str) -> Any:
    """An attribute by way of the dict that has it; elsewhere it is computed (a parametrization, weight norm)."""
    return stored[name] if name in stored else getattr(module, name)


def _tensors(found: FoundBlock) -> BlockTensors:
    conv, norm, weight, bias = found.conv, found.norm, None, None
    if conv is not None:
        for hook in conv._forward_pre_hooks.values():  # weight_norm and spectral_norm of the old style set `weight`
            hook(conv, ())
        weight, bias = (_of(conv, conv._parameters, name) for name in ("weight", "bias"))
    slope = _slope(found)
    if norm is None:
        return BlockTensors(weight, bias, slope=slope)
    bn_weight, bn_bias = (_of(norm, norm._parameters, name) for name in ("weight", "bias"))
    mean, var = (_of(norm, norm._buffers, name) for name in ("running_mean", "running_var"))
    return BlockTensors(weight, bias, bn_weight, bn_bias, mean, var, slope)


def _stored_weight(conv: nn.Module | None) -> Tensor | None:
    """A convolution's weight, or what that is computed from."""
    return None if conv is None else next((p for p in conv.parameters() if p.dim() == 4), None)


def _slope(found: FoundBlock) -> Tensor | None:
    return found.act._parameters["weight"] if isinstance(found.act, nn.PReLU) else None


def _stored(found: FoundBlock) -> BlockTensors | None:
    """Tensors like those of `_tensors`, as they are stored: nothing is computed or updated. None where no stored one is
    like the weight."""
    conv, norm, weight, bias = found.conv, found.norm, None, None
    if conv is not None:
        weight = _stored_weight(conv)
        if weight is None:
            return None
        bias = conv._parameters.get("bias")
    if norm is None:
        return BlockTensors(weight, bias, slope=_slope(found))
    vectors = (norm._parameters.get("weight"), norm._parameters.get("bias"))
    buffers = (norm._buffers["running_mean"], norm._buffers["running_var"])
    return BlockTensors(weight, bias, *vectors, *buffers, _slope(found))


def _running(norm: nn.BatchNorm2d | nn.SyncBatchNorm | nn.InstanceNorm2d | None, t: BlockTensors) -> Running | None:
    if norm is None or not norm.training or not norm.track_running_stats:
        return None
    if t.running_mean is None or t.running_var is None:
        return None
    momentum, count = norm.momentum, _of(norm, norm._buffers, "num_batches_tracked")
    if isinstance(norm, nn.InstanceNorm2d):  # which counts nothing
        count = None
    if momentum is None and count is None:
        momentum = 0.0
    return Running(t.running_mean, t.running_var, momentum, count)
