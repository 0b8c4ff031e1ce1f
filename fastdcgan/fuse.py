"""`fuse` and `unfuse`: run the blocks in somebody's model fused, and undo it.

Fusing changes the class of an `nn.Sequential` and nothing else, so modules, parameters, state_dict keys, hooks and
whatever refers to them stay as they were.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from fastdcgan.checks import check_module
from fastdcgan.engine.match import leaves
from fastdcgan.layers import FusedSequential

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_KEY = "_fastdcgan_class"  # in an unfused module: the class it had


def fuse(model: ModuleT) -> ModuleT:
    """Run every block of `model` fused: in place, and `model` is returned.

    Each `nn.Sequential` (nested, shared, or the model itself) that has a 2-d convolution becomes a `FusedSequential`
    with the very same modules in it. Same parameter objects, state_dict keys, buffers, hooks, device, train/eval state;
    results differ by rounding only. Fusing twice is fusing once.
    Raises TypeError if `model` is no `nn.Module`, ValueError if a module contains itself.
    """
    check_module(model)
    for module in list(model.modules()):
        if _holds_convolution(module):
            module.__class__ = module.__dict__.pop(_KEY, None) or _fused_class(type(module))  # type: ignore[arg-type]
    return model


def unfuse(model: ModuleT) -> ModuleT:
    """Undo `fuse`, in place: every `FusedSequential` (the drop-in layers too) becomes a plain `nn.Sequential`.

    Raises TypeError if `model` is no `nn.Module`, ValueError if a module contains itself.
    """
    check_module(model)
    for module in list(model.modules()):
        # A class with a forward of its own is no product of fuse() and no drop-in layer.
        if isinstance(module, FusedSequential) and type(module).forward is FusedSequential.forward:
            plain: type[nn.Sequential] = getattr(type(module), "_plain_class", nn.Sequential)
            if type(module) is not FusedSequential and plain is nn.Sequential:
                module.__dict__[_KEY] = type(module)  # so that fuse() gives a drop-in layer its own class back
            module.__class__ = plain  # type: ignore[assignment]
            module.__dict__.pop("_plans", None)
    return model


def _holds_convolution(module: nn.Module) -> bool:
    """A Sequential, not fused yet, that calls its children in order and among them a convolution (by type: hooks
    that keep it from running fused now may go, and lazy modules get their parameters later)."""
    if not isinstance(module, nn.Sequential) or isinstance(module, (FusedSequential, torch.jit.ScriptModule)):
        return False
    if type(module).forward is not nn.Sequential.forward or "forward" in module.__dict__:
        return False
    return any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for _, m in leaves(module))


@cache
def _fused_class(plain: type[nn.Sequential]) -> type[FusedSequential]:
    """`FusedSequential`, or for a subclass of `nn.Sequential` one that is both."""
    if plain is nn.Sequential:
        return FusedSequential

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        return _restore, (plain,), self.__getstate__()  # the class itself has no importable name

    members = {"_plain_class": plain, "__reduce_ex__": __reduce_ex__, "__module__": plain.__module__}
    members["forward"] = FusedSequential.forward  # all else that `plain` defines comes first
    return type(f"Fused{plain.__name__}", (plain, FusedSequential), members)


def _restore(plain: type[nn.Sequential]) -> nn.Module:
    kind = _fused_class(plain)  # type: ignore[arg-type]
    return kind.__new__(kind)
