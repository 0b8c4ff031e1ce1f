"""`explain`: what of a model runs fused, on which backend and why; and what does not, and why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdcgan import backends
from fastdcgan.checks import check_module
from fastdcgan.dispatch import autotune
from fastdcgan.engine import chain, match, run
from fastdcgan.engine.match import Alone, FoundChain, segments
from fastdcgan.layers import FusedSequential

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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


def explain(model: nn.Module, *inputs: Any, **keywords: Any) -> Explanation:
    """Per block of `model`: its modules, the backend that runs it, and why; and what is not fused, and why not.

    With `inputs` the model is called with them, with gradients where they are enabled, and the backends are those that
    did run; buffers are put back afterwards. Without, or with None alone, they are those that its parameters' device
    and dtype would get.
    Raises TypeError if `model` is no `nn.Module` or there is no tensor in the inputs, ValueError if a module contains
    itself, and what running it raises.
    """
    check_module(model)
    given, observed = (inputs, keywords), inputs not in ((), (None,)) or bool(keywords)
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    if observed and not tensors:
        raise TypeError(
            f"expected a torch.Tensor as input, or None, got {type(inputs[0] if inputs else given).__name__}"
        )
    ran = _observe(model, inputs, keywords, tensors[0].device) if observed else {}
    rows, seen = Explanation(), set[int]()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential) or id(module) in seen:
            continue
        if "forward" in module.__dict__ or type(module).forward not in (nn.Sequential.forward, FusedSequential.forward):
            continue
        fused = isinstance(module, FusedSequential)
        transparent = match.is_plain_sequential if fused else _is_plain_unfused
        seen.update(id(m) for m in _opened(module, transparent))
        for part in segments(module, transparent):
            seen.update(id(m) for m in _modules_of(part) if not isinstance(m, nn.Sequential))
            rows.extend(_rows(part, f"{path}." if path else "", fused, ran, observed))
    for path, module in model.named_modules():
        if id(module) not in seen and _belongs_to_a_block(module):
            rows.extend(_own_rows(path or "(model)", module, _is_called_by_fused(model, path), ran, observed))
    return rows


def _is_called_by_fused(model: nn.Module, path: str) -> bool:
    """Whether a module that contains this one has a forward whose convolutions wait."""
    parts = path.split(".")
    over = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return any(hasattr(type(m), "_plain_class") and not isinstance(m, nn.Sequential) for m in over)


def _own_rows(path: str, module: nn.Module, fused: bool, ran: dict[int, chain.Record], observed: bool) -> Iterator[Row]:
    """Those of a module that code of its own calls: one that begins a block has the row of that."""
    kind, weight = type(module).__name__, module._parameters.get("weight")
    record = None if weight is None else ran.get(id(weight))
    if not fused:
        yield Row(path, kind, False, None, "called by code of its own: call fastdcgan.fuse(model)")
    elif not observed:
        yield Row(path, kind, False, None, "called by code of its own: explain(model, x) says how that runs")
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or record is not None:
        if record is None:
            yield Row(path, kind, False, None, "was not reached by this input, or its weight is computed at each call")
        elif record.backend is None:
            bare = record.route == match.WHY_BARE
            why = record.route if bare else f"runs as PyTorch's own functions: {record.route}"
            yield Row(path, record.pattern, False, None, why)
        else:
            why = _why_backend(record.backend, next(module.parameters()).device.type, record.dtype)
            yield Row(path, record.pattern, True, record.backend, f"input {list(record.shape)}; {why}; {record.route}")
    elif not isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
        yield Row(path, kind, False, None, f"{kind} is not fused")


def _observe(
    model: nn.Module, inputs: tuple, keywords: dict[str, Any], device: torch.device
) -> dict[int, chain.Record]:
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with autotune.at_once(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model(*inputs, **keywords)  # measures what it has to
            chain.recorder = []
            model(*inputs, **keywords)
        return {id(record.conv): record for record in chain.recorder}
    finally:
        chain.recorder = None
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in state:
                    buffer.copy_(state[name])


def _is_plain_unfused(module: nn.Module) -> bool:
    return not isinstance(module, FusedSequential) and match.is_plain_sequential(module)


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
    part: FoundChain | Alone, prefix: str, fused: bool, ran: dict[int, chain.Record], observed: bool
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
        record = ran.get(id(block.first))
        # Reading `weight` would run a parametrization.
        owners = (m for of in (block, *part.blocks) for m in of.modules())
        stored = next((p for m in owners for p in m.parameters()), torch.empty(0))
        device, dtype = stored.device.type, stored.dtype if record is None else record.dtype
        plain = run.why_plain(device, dtype) if record is None or record.backend is not None else record.route
        if plain is not None:
            rows.append(Row(name, block.pattern, False, None, f"runs as PyTorch's own modules: {plain}"))
            continue
        if part.bare and (record is None or record.route == match.WHY_BARE):
            rows.append(Row(name, block.pattern, False, None, match.WHY_BARE))
            continue
        if observed and record is None:
            rows.append(Row(name, block.pattern, False, None, "was not reached by this input, or ran module by module"))
            continue
        name_of = (
            record.backend
            if record is not None and record.backend is not None
            else backends.select(backends.requested(), device, dtype)
        )
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
