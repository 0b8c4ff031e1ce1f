"""`fuse`, `unfuse`, `explain` and `fold_batchnorm`: the blocks in somebody's model.

Fusing changes the class of an `nn.Sequential` and nothing else, so modules, parameters, state_dict keys, hooks and
whatever refers to them stay as they were.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from fastdcgan import backends, blocks
from fastdcgan.activations import from_module
from fastdcgan.blocks import Alone, FoundBlock, FoundChain, leaves, segments
from fastdcgan.layers import FusedSequential

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_KEY = "_fastdcgan_class"  # in an unfused module: the class it had


def fuse(model: ModuleT) -> ModuleT:
    """Run every block of `model` fused: in place, and `model` is returned.

    Each `nn.Sequential` (nested, shared, or the model itself) that has a convolution followed by a BatchNorm2d or an
    activation becomes a `FusedSequential` with the very same modules in it. Same parameter objects, state_dict keys,
    buffers, hooks, device, train/eval state; results differ by rounding only. Fusing twice is fusing once.
    Raises TypeError if `model` is no `nn.Module`.
    """
    _check_module(model)
    for module in list(model.modules()):
        if _holds_block(module):
            module.__class__ = module.__dict__.pop(_KEY, None) or _fused_class(type(module))  # type: ignore[arg-type]
    return model


def unfuse(model: ModuleT) -> ModuleT:
    """Undo `fuse`, in place: every `FusedSequential` (the drop-in layers too) becomes a plain `nn.Sequential`.

    Raises TypeError if `model` is no `nn.Module`.
    """
    _check_module(model)
    for module in list(model.modules()):
        # A class with a forward of its own is no product of fuse() and no drop-in layer.
        if isinstance(module, FusedSequential) and type(module).forward is FusedSequential.forward:
            plain: type[nn.Sequential] = getattr(type(module), "_plain_class", nn.Sequential)
            if type(module) is not FusedSequential and plain is nn.Sequential:
                module.__dict__[_KEY] = type(module)  # so that fuse() gives a drop-in layer its own class back
            module.__class__ = plain  # type: ignore[assignment]
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")


def _holds_block(module: nn.Module) -> bool:
    """A Sequential, not fused yet, that calls its children in order and among them a block (by type: hooks that keep it
    from running fused now may go, and lazy modules get their parameters later)."""
    if not isinstance(module, nn.Sequential) or isinstance(module, (FusedSequential, torch.jit.ScriptModule)):
        return False
    if type(module).forward is not nn.Sequential.forward or "forward" in module.__dict__:
        return False
    modules = [m for _, m in leaves(module) if type(m) is not nn.Identity]
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.LazyBatchNorm2d)
    return any(
        isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
        and (isinstance(after, norms) or from_module(after) is not None)
        for conv, after in pairwise(modules)
    )


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


# --- explain ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One block, or one module that is not part of any."""

    name: str
    pattern: str
    fused: bool
    backend: str | None
    why: str


class Explanation(list[Row]):
    """The rows of `explain`; `str()` is a table."""

    def __str__(self) -> str:
        head = ("module", "pattern", "runs", "why")
        rows = [(r.name, r.pattern, f"fused on {r.backend}" if r.fused else "as it is", r.why) for r in self]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in [head, *rows]
        ]
        fused = sum(r.fused for r in self)
        return "\n".join([*lines, f"{fused} of {len(self)} fused"])


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Per block of `model`: its modules, the backend that runs it, and why; and what is not fused, and why not.

    With an input `x` the model is run once without gradients, and the backends are those that did run; buffers are put
    back afterwards. Without, they are those that its parameters' device and dtype would get.
    Raises TypeError if `model` is no `nn.Module`, and what running it raises.
    """
    _check_module(model)
    ran = {} if x is None else _observe(model, x)
    rows, seen = Explanation(), set[int]()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential) or id(module) in seen:
            continue
        if "forward" in module.__dict__ or type(module).forward not in (nn.Sequential.forward, FusedSequential.forward):
            continue
        fused = isinstance(module, FusedSequential)
        transparent = blocks.is_plain_sequential if fused else _is_plain_unfused
        seen.update(id(m) for m in _opened(module, transparent))
        for part in segments(module, transparent):
            seen.update(id(m) for m in _modules_of(part) if not isinstance(m, nn.Sequential))
            rows.extend(_rows(part, f"{path}." if path else "", fused, ran, x is not None))
    for path, module in model.named_modules():
        if id(module) not in seen and _belongs_to_a_block(module):
            why = "called by code of its own, not by an nn.Sequential: put it into one, or use a drop-in layer"
            rows.append(Row(path or "(model)", type(module).__name__, False, None, why))
    return rows


def _observe(model: nn.Module, x: Tensor) -> dict[int, blocks.Record]:
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    blocks.recorder = blocks.Recorder()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            model(x)
        return {id(record.conv): record for record in blocks.recorder.records}
    finally:
        blocks.recorder = None
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in state:
                    buffer.copy_(state[name])


def _is_plain_unfused(module: nn.Module) -> bool:
    return not isinstance(module, FusedSequential) and blocks.is_plain_sequential(module)


def _opened(sequential: nn.Module, transparent: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The nested Sequentials whose modules `leaves` lists as this one's."""
    for child in sequential.children():
        if transparent(child):
            yield child
            yield from _opened(child, transparent)


def _modules_of(part: FoundChain | Alone) -> list[nn.Module]:
    return [part.module] if isinstance(part, Alone) else [m for block in part.blocks for m in block.modules()]


def _belongs_to_a_block(module: nn.Module) -> bool:
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
    return isinstance(module, kinds)


def _rows(
    part: FoundChain | Alone, prefix: str, fused: bool, ran: dict[int, blocks.Record], observed: bool
) -> list[Row]:
    if isinstance(part, Alone):
        if part.why is None:
            return []
        return [Row(prefix + part.name, type(part.module).__name__, False, None, part.why)]
    rows = []
    for block in part.blocks:
        name = prefix + block.name
        if not fused:
            rows.append(Row(name, block.pattern, False, None, "in a plain nn.Sequential: call fastdcgan.fuse(model)"))
            continue
        record = ran.get(id(block.conv))
        if observed and record is None:
            rows.append(Row(name, block.pattern, False, None, "was not reached by this input"))
            continue
        stored = next(block.conv.parameters())  # reading `weight` would run a parametrization
        device, dtype = stored.device.type, stored.dtype if record is None else record.dtype
        name_of = record.backend if record else backends.select(backends.requested(), device, dtype)
        why = _why_backend(name_of, device, dtype)
        if record:
            why = f"input {list(record.shape)}; {why}" + (f"; {record.route}" if record.route else "")
        rows.append(Row(name, block.pattern, True, name_of, why))
    return rows


def _why_backend(name: str, device: str, dtype: torch.dtype) -> str:
    if backends.requested() != "auto":
        return "asked for by name"
    if name == "auto":  # on a GPU
        return "first choice"
    before = []
    for other, reason in backends.reasons(device, dtype).items():
        if other == name:
            break
        before.append(f"not {other}: {reason}")
    return "; ".join(before) or "first choice"


# --- folding ---------------------------------------------------------------------------------------------------------


def fold_batchnorm(model: ModuleT) -> ModuleT:
    """A copy of `model`, in eval mode, with every BatchNorm2d of a block folded into its convolution's weight and bias.

    The BatchNorm2d is replaced by `nn.Identity`, so other modules keep their names. Weight norm, spectral norm and
    parametrizations of a folded convolution are made permanent. Left as they are: BatchNorms without running
    statistics, convolutions that are used in more than one place, and modules with hooks. The output equals that of
    `model.eval()` up to rounding. Raises TypeError if `model` is no `nn.Module`.
    """
    _check_module(model)
    memo = {}  # the old weight_norm and spectral_norm leave a computed `weight`, which deepcopy refuses
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                weight = getattr(module, hook.name)
                memo[id(weight)] = weight.detach().clone()
    folded = copy.deepcopy(model, memo).eval()
    uses = Counter(id(child) for module in folded.modules() for child in module._modules.values())
    for module in list(folded.modules()):
        if not isinstance(module, nn.Sequential) or not blocks.is_plain_sequential(module):
            continue
        for part in segments(module):
            for block in part.blocks if isinstance(part, FoundChain) else ():
                if block.norm is not None and uses[id(block.conv)] == 1 and uses[id(block.norm)] == 1:
                    _fold(folded, block)
                    uses[id(block.norm)] = 0  # gone, also from where the same Sequential is called again
    return folded


@torch.no_grad()
def _fold(model: nn.Module, block: FoundBlock) -> None:
    conv, norm = block.conv, block.norm
    assert norm is not None
    if norm.running_mean is None or norm.running_var is None:
        return
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
    """Make weight norm, spectral norm and parametrizations permanent, so that `weight` is an ordinary parameter."""
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
