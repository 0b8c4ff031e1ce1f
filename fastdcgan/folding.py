"""`fold_batchnorm`: a copy of a model with its BatchNorms folded into the weights."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from fastdcgan.checks import check_module, check_values
from fastdcgan.engine import match
from fastdcgan.engine.match import FoundBlock, FoundChain, segments

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fold_batchnorm(model: ModuleT) -> ModuleT:
    """A copy of `model`, in eval mode, with every BatchNorm2d of a block folded into its convolution's weight and bias.

    It is a copy: what is trained, loaded or written into `model` later doesn't reach it. Fold again then.

    The BatchNorm2d is replaced by `nn.Identity`, so other modules keep their names. Weight norm, spectral norm and
    parametrizations of a folded convolution are made permanent, and so is a weight that its class computes. Left as
    they are: BatchNorms without running statistics, convolutions that are used in more than one place, and modules with
    hooks. The output equals that of `model.eval()` up to rounding. Raises TypeError if `model` is no `nn.Module` or
    what would be folded is not of real numbers, ValueError if a module contains itself.
    """
    check_module(model)
    memo = {}  # the old weight_norm and spectral_norm leave a computed `weight`, which deepcopy refuses
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                weight = getattr(module, hook.name)
                memo[id(weight)] = weight.detach().clone()
    folded = copy.deepcopy(model, memo).eval()
    uses = Counter(id(child) for module in folded.modules() for child in module._modules.values())
    for module in list(folded.modules()):
        if not isinstance(module, nn.Sequential) or not match.is_plain_sequential(module):
            continue
        for part in segments(module):
            for block in part.blocks if isinstance(part, FoundChain) else ():
                if (
                    block.conv is not None
                    and isinstance(block.norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
                    and uses[id(block.conv)] == 1
                    and uses[id(block.norm)] == 1
                ):
                    _fold(folded, block)
                    uses[id(block.norm)] = 0  # gone, also from where the same Sequential is called again
    return folded


@torch.no_grad()
def _fold(model: nn.Module, block: FoundBlock) -> None:
    conv, norm = block.conv, block.norm
    assert conv is not None and norm is not None
    if norm.running_mean is None or norm.running_var is None:
        return
    for owner in (conv, norm):
        for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
            if name != "num_batches_tracked":
                check_values(f"{name} of {type(owner).__name__} in the block {block.name!r}", tensor)
    _bake(conv)
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) * scale
    if conv.bias is not None:
        shift = shift + conv.bias.to(wide) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    if isinstance(conv, nn.ConvTranspose2d):  # [Ci, Co/groups, kh, kw]: output channels are counted per group
        per_group = scale.reshape(conv.groups, 1, -1, 1, 1)
        weight = (conv.weight.to(wide).reshape(conv.groups, -1, *conv.weight.shape[1:]) * per_group).flatten(0, 1)
    else:
        weight = conv.weight.to(wide) * scale[:, None, None, None]
    # A new one: another convolution may share the old.
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
    for module in model.modules():
        for name, child in module._modules.items():
            if child is norm:
                module._modules[name] = nn.Identity()


def _bake(conv: nn.Module) -> None:
    """Make weight norm, spectral norm, parametrizations and a weight that the class computes permanent, so that
    `weight` is an ordinary parameter."""
    if parametrize.is_parametrized(conv):
        # Not remove_parametrizations: it changes the class, which a copied module shares with the original.
        found = {name: getattr(conv, name).detach().clone() for name in conv.parametrizations}  # type: ignore[union-attr]
        trained = any(p.requires_grad for p in conv.parametrizations.parameters())  # type: ignore[union-attr]
        conv.__class__ = parametrize.type_before_parametrizations(conv)
        del conv.parametrizations
        for name, value in found.items():
            conv.register_parameter(name, nn.Parameter(value, requires_grad=trained))
    for hook in list(conv._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(conv, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(conv, hook.name)
    if "weight" not in conv._parameters:
        weight = conv.weight
        assert isinstance(weight, torch.Tensor)
        conv.__class__ = nn.ConvTranspose2d if isinstance(conv, nn.ConvTranspose2d) else nn.Conv2d
        conv._modules.clear()  # what the class computed it from
        conv.register_parameter("weight", nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
