"""Finding blocks among the modules of an `nn.Sequential`.

A block is a 2-d convolution, plain or transposed, then optionally a BatchNorm2d or InstanceNorm2d and an activation; or
such a norm and an activation, where no convolution is right before the norm. A module counts only if calling it would
do just what PyTorch's own class does: with hooks, a forward of its own or parameters that are not initialised yet it is
called as it is, outside any chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastdcgan.activations import ACTIVATIONS, from_module
from fastdcgan.checks import check_conv
from fastdcgan.engine import upsampling
from fastdcgan.geometry import IDENTITY, Geometry, pair
from fastdcgan.spec import Block, Norm

_CONVS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)
WHY_BARE = "no norm, activation or other block next to it"
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm)  # they only set `weight`: a chain calls them itself


def why_alone(module: nn.Module) -> str | None:
    """Why a module can't be part of a block though its type could, or None if it can."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "its parameters are not initialised yet"
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or module._forward_pre_hooks:
        hooks = [h for h in module._forward_pre_hooks.values() if not isinstance(h, _WEIGHT_HOOKS)]
        if hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "it has hooks, which must see its own input and output"
    if _own_forward(type(module)):
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.ConvTranspose2d):
        for extra, stride in zip(module.output_padding, module.stride, strict=True):
            if extra >= stride:
                return f"its output_padding {module.output_padding} reaches its stride {module.stride}"
    return None


def _own_forward(kind: type[nn.Module]) -> bool:
    """Whether a class computes something else than PyTorch's own that it derives from."""
    if issubclass(kind, nn.Conv2d):
        return kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward
    for known, forward in (
        (nn.ConvTranspose2d, nn.ConvTranspose2d.forward),
        (nn.SyncBatchNorm, nn.SyncBatchNorm.forward),
        (nn.BatchNorm2d, _BatchNorm.forward),
        (nn.InstanceNorm2d, _InstanceNorm.forward),
        (nn.Upsample, nn.Upsample.forward),
    ):
        if issubclass(kind, known):
            return kind.forward is not forward
    return False


def is_plain_sequential(module: nn.Module) -> bool:
    """A Sequential that does nothing but call its children in order: transparent to a chain."""
    if not isinstance(module, nn.Sequential) or why_alone(module) is not None:
        return False
    return type(module).forward is nn.Sequential.forward or runs_blocks(module)


def runs_blocks(module: nn.Module) -> bool:
    """Whether a module's forward is `FusedSequential`'s, which marks it so."""
    return getattr(type(module).forward, "runs_blocks", False)


@dataclass
class FoundBlock:
    """The modules of one block and the first one's name below the Sequential."""

    conv: nn.Conv2d | nn.ConvTranspose2d | None
    name: str
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | nn.InstanceNorm2d | None = None
    act: nn.Module | None = None
    up: nn.Upsample | None = None  # by 2, nearest

    @property
    def pattern(self) -> str:
        return " + ".join(type(m).__name__.removeprefix("Parametrized") for m in self.modules())

    @property
    def first(self) -> nn.Module:
        """The one that tells it apart: its convolution, else its norm."""
        return self.norm if self.conv is None else self.conv  # type: ignore[return-value]

    def modules(self) -> list[nn.Module]:
        return [m for m in (self.up, self.conv, self.norm, self.act) if m is not None]


@dataclass
class FoundChain:
    """Blocks that feed each other; `pad` (`F.pad`'s list, mode) comes before the first."""

    blocks: list[FoundBlock]
    pad: tuple[list[int], str] | None = None

    @property
    def bare(self) -> bool:
        """Whether it is one convolution with nothing to fuse to it: as fast as it is, unless measured to be slower."""
        return self.pad is None and sum(len(block.modules()) for block in self.blocks) == 1


@dataclass
class Alone:
    """A module that is called as it is, and why (None: it is no convolution, normalisation or activation)."""

    module: nn.Module
    name: str
    why: str | None = None


def leaves(
    sequential: nn.Sequential, prefix: str = "", transparent: Callable[[nn.Module], bool] = is_plain_sequential
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a Sequential calls, in order, with nested Sequentials opened where they are transparent."""
    for name, module in sequential._modules.items():
        assert module is not None
        if transparent(module):
            yield from leaves(module, f"{prefix}{name}.", transparent)  # type: ignore[arg-type]
        else:
            yield prefix + name, module


def segments(
    sequential: nn.Sequential, transparent: Callable[[nn.Module], bool] = is_plain_sequential
) -> list[FoundChain | Alone]:
    """Split the modules of a Sequential into chains and modules that are called as they are."""
    modules = list(leaves(sequential, "", transparent))
    found: list[FoundChain | Alone] = []
    i = 0
    while i < len(modules):
        up = _upsampling_at(modules, i)
        i += up is not None
        name, module = modules[i]
        begins = isinstance(module, (*_CONVS, *_NORMS))
        why = why_alone(module) if begins else _why_not_in_block(module)
        if not begins or why is not None:
            found.append(Alone(module, name, why))
            i += 1
            continue
        block, i = _block_at(modules, i)
        block.up = up
        before, pad = found[-1] if found else None, _pad_of(block.conv)
        if isinstance(before, FoundChain) and pad is None and not (block.conv is None and _widens(before.blocks[-1])):
            before.blocks.append(block)
        else:
            found.append(FoundChain([block], pad))
    return [
        Alone(part.blocks[0].first, part.blocks[0].name, WHY_BARE)
        if isinstance(part, FoundChain) and part.bare and part.blocks[0].conv is None
        else part
        for part in found
    ]


def _widens(block: FoundBlock) -> bool:
    """Whether autocast may make its output another dtype than the rest of its chain has."""
    act = None if block.act is None else from_module(block.act)
    return act is not None and bool(ACTIVATIONS[act[0]].float32_under_autocast)


def _upsampling_at(modules: list[tuple[str, nn.Module]], i: int) -> nn.Upsample | None:
    """The upsampling at `i`, if one contraction does that and the convolution behind it."""
    up, conv = modules[i][1], modules[i + 1][1] if i + 1 < len(modules) else None
    if not isinstance(up, nn.Upsample) or not isinstance(conv, nn.Conv2d) or why_alone(up) or why_alone(conv):
        return None
    if up.size is not None or not upsampling.doubles(up.scale_factor, up.mode, up.align_corners):
        return None
    return up if _pad_of(conv) is None and _geometry(conv, False).of_upsampled() is not None else None


def _block_at(modules: list[tuple[str, nn.Module]], i: int) -> tuple[FoundBlock, int]:
    """The block that starts with the convolution or norm at `i`, and the index behind it."""
    (name, first), end = modules[i], i + 1
    block = FoundBlock(first, name) if isinstance(first, _CONVS) else FoundBlock(None, name, first)  # type: ignore[arg-type]
    while end < len(modules):
        module = modules[end][1]
        if type(module) is nn.Identity and why_alone(module) is None:
            end += 1
        elif (
            isinstance(module, _NORMS)
            and block.norm is None
            and block.conv is not None
            and module.num_features == block.conv.out_channels
            and why_alone(module) is None
        ):
            block.norm = module
            end += 1
        elif from_module(module) is not None and why_alone(module) is None and _slopes_fit(module, block):
            block.act = module
            return block, end + 1
        else:
            break
    return block, end


def _slopes_fit(act: nn.Module, block: FoundBlock) -> bool:
    """Whether a PReLU has one slope, or one for each channel of what comes before it."""
    if not isinstance(act, nn.PReLU):
        return True
    before = block.conv.out_channels if block.conv is not None else block.norm.num_features  # type: ignore[union-attr]
    return act.num_parameters in (1, before)


def _why_not_in_block(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"{type(module).__name__}: blocks are of 2-d convolutions"
    if isinstance(module, (_BatchNorm, _InstanceNorm)) or from_module(module) is not None:
        why = why_alone(module)
        if why is not None:
            return why
        if isinstance(module, nn.Module) and from_module(module) is not None:
            return "no convolution or norm that it can be fused to comes before it"
        return f"{type(module).__name__} is not fused: {', '.join(kind.__name__ for kind in _NORMS)} are"
    return None


def _pad_of(conv: nn.Conv2d | nn.ConvTranspose2d | None) -> tuple[list[int], str] | None:
    """`F.pad` arguments for a padding that the contractions don't have: not of zeros, or not symmetric."""
    if conv is None:
        return None
    if conv.padding_mode != "zeros":
        return list(conv._reversed_padding_repeated_twice), conv.padding_mode
    if conv.padding == "same":
        left_right = conv._reversed_padding_repeated_twice
        if left_right[0] != left_right[1] or left_right[2] != left_right[3]:
            return list(left_right), "constant"
    return None


# --- what a chain takes of a block ------------------------------------------------------------------------------------


def block_of(found: FoundBlock, padded: bool, backend: str) -> Block:
    """The block as a chain takes it; `padded`: its padding is applied before the chain."""
    conv, norm = found.conv, found.norm
    made = None
    if norm is not None:
        batch_stats = norm.training or (norm.running_mean is None and norm.running_var is None)
        instance = batch_stats and isinstance(norm, nn.InstanceNorm2d)
        made = Norm(norm.eps, batch_stats, process_group(norm) if batch_stats else None, instance)
    act, slope = ("identity", 0.0) if found.act is None else from_module(found.act)  # type: ignore[misc]
    inplace, learns_slope = getattr(found.act, "inplace", False), isinstance(found.act, nn.PReLU)
    if conv is None:
        return Block(False, IDENTITY, (0, 0), made, act, slope, backend, inplace, learns_slope, convolves=False)
    check_conv(conv)
    transposed, geometry = isinstance(conv, nn.ConvTranspose2d), _geometry(conv, padded)
    block = Block(transposed, geometry, pair(conv.output_padding), made, act, slope, backend, inplace, learns_slope)
    return block if found.up is None else block.upsampling()


def _geometry(conv: nn.Conv2d | nn.ConvTranspose2d, padded: bool) -> Geometry:
    padding: Any = conv.padding
    if padded or padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        around = conv._reversed_padding_repeated_twice
        padding = (around[2], around[0])
    return Geometry(pair(conv.kernel_size), pair(conv.stride), pair(padding), pair(conv.dilation), conv.groups)


def process_group(norm: nn.Module) -> Any:
    """The processes that share statistics with this one, or None (`nn.SyncBatchNorm.forward`)."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
