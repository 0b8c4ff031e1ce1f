"""`fuse` and `unfuse`: run the blocks in somebody's model fused, and undo it.

Fusing changes the classes of modules that call convolutions and nothing else, so modules, parameters, state_dict keys,
hooks and whatever refers to them stay as they were.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from fastdcgan.activations import from_module
from fastdcgan.checks import check_module
from fastdcgan.engine import forwards
from fastdcgan.engine.deferred import deferring
from fastdcgan.engine.match import leaves, runs_blocks
from fastdcgan.layers import FusedSequential

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CONVS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
_KEY = "_fastdcgan_class"  # in an unfused module: the class it had


def fuse(model: ModuleT) -> ModuleT:
    """Run every block of `model` fused: in place, and `model` is returned.

    Each `nn.Sequential` (nested, shared, or the model itself) that has a 2-d convolution or norm becomes a
    `FusedSequential` with the very same modules in it. A module of another class that has a convolution gets a subclass
    of its class, in whose forward convolutions wait for the normalisation and activation that come after them; one that
    only calls such modules gets one too, which may keep their tensors in channels_last. Same parameter objects,
    state_dict keys, buffers, hooks, device, train/eval state; results differ by rounding only.
    Fusing twice is fusing once.
    Raises TypeError if `model` is no `nn.Module`, ValueError if a module contains itself.
    """
    check_module(model)
    modules = list(model.modules())
    for module in modules:
        if _holds_block(module) or _calls_convolutions(module):
            module.__class__ = module.__dict__.pop(_KEY, None) or _fused_class(type(module), True)  # type: ignore[arg-type]
    for module in modules:
        if _has_own_forward(module) and any(map(_is_fused, module.modules())):
            module.__class__ = _fused_class(type(module), False)  # type: ignore[arg-type]
    if any(isinstance(m, _CONVS) for m in modules) and not any(map(_is_fused, modules)):
        warnings.warn("fuse() found nothing to fuse in this model: explain(model) says why", stacklevel=2)
    return model


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, FusedSequential) or hasattr(type(module), "_plain_class")


def unfuse(model: ModuleT) -> ModuleT:
    """Undo `fuse`, in place: every `FusedSequential` (the drop-in layers too) becomes a plain `nn.Sequential`, all else
    of the class that it was.

    Raises TypeError if `model` is no `nn.Module`, ValueError if a module contains itself.
    """
    check_module(model)
    for module in list(model.modules()):
        plain: type[nn.Module] | None = getattr(type(module), "_plain_class", None)
        # A class with a forward of its own is no drop-in layer.
        if plain is None and isinstance(module, FusedSequential) and runs_blocks(module):
            plain = nn.Sequential
            if type(module) is not FusedSequential:
                module.__dict__[_KEY] = type(module)  # so that fuse() gives a drop-in layer its own class back
        if plain is not None:
            module.__class__ = plain
            module.__dict__.pop("_plans", None)
            module.__dict__.pop("_plain_calls", None)
            module.__dict__.pop("_trials", None)
    return model


def _holds_block(module: nn.Module) -> bool:
    """A Sequential, not fused yet, that calls its children in order and among them one that begins a block (by type:
    hooks that keep it from running fused now may go, and lazy modules get their parameters later)."""
    if not isinstance(module, nn.Sequential) or isinstance(module, (FusedSequential, torch.jit.ScriptModule)):
        return False
    if type(module).forward is not nn.Sequential.forward or "forward" in module.__dict__:
        return False
    return any(isinstance(m, (*_CONVS, *_NORMS)) for _, m in leaves(module))


def _calls_convolutions(module: nn.Module) -> bool:
    """A module, not fused yet, whose class has a forward of its own that may call blocks: it has convolutions, weights
    for some, or norms and activations for those of its children."""
    if not _has_own_forward(module):
        return False
    lists = [m for m in module.children() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    children = [*module.children(), *(m for each in lists for m in each.children())]
    in_sequentials = [m for each in children if isinstance(each, nn.Sequential) for _, m in leaves(each)]
    if any(isinstance(m, _CONVS) for m in children) or any(map(_has_weight, [module, *children, *in_sequentials])):
        return True
    between = any(isinstance(m, _NORMS) or from_module(m) is not None for m in children)
    return between and any(isinstance(m, _CONVS) or _has_weight(m) for m in module.modules())


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a module, not fused yet, has a forward of somebody's own."""
    kind = type(module)
    if hasattr(kind, "_plain_class") or isinstance(module, (torch.jit.ScriptModule, *_CONVS)):
        return False
    inherited = kind.forward in (nn.Module.forward, nn.Sequential.forward)
    return not (
        inherited or runs_blocks(module) or "forward" in module.__dict__ or kind.__module__.startswith("torch.")
    )


def _has_weight(module: nn.Module) -> bool:
    """Whether a module of somebody's own may convolve with a parameter of its own (an equalised learning rate)."""
    return not isinstance(module, _CONVS) and any(p.dim() == 4 for p in module.parameters(recurse=False))


@cache
def _fused_class(plain: Any, defers: bool) -> type[nn.Module]:
    """The class of a fused module: `FusedSequential`, or for a class of somebody's own one that is both; or one whose
    forward has its convolutions wait for what comes after them, or keeps the format that is faster."""
    if plain is nn.Sequential:
        return FusedSequential

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        return _restore, (plain, defers), self.__getstate__()  # the class itself has no importable name

    members = {"_plain_class": plain, "__reduce_ex__": __reduce_ex__, "__module__": plain.__module__}
    if plain.forward is nn.Sequential.forward:
        members["forward"] = FusedSequential.forward  # all else that `plain` defines comes first
        return type(f"Fused{plain.__name__}", (plain, FusedSequential), members)
    members["forward"] = deferring(plain.forward) if defers else forwards.keeping(plain.forward)
    members["_defers"] = defers
    members["__prepare_scriptable__"] = FusedSequential.__prepare_scriptable__
    return type(f"Fused{plain.__name__}", (plain,), members)


def _restore(plain: type[nn.Module], defers: bool = True) -> nn.Module:
    kind = _fused_class(plain, defers)  # type: ignore[arg-type]
    return kind.__new__(kind)
