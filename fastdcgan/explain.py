"""`explain`: what of a model runs fused, on which backend and why; and what does not, and why not."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fastdcgan import backends
from fastdcgan.activations import from_module
from fastdcgan.checks import check_module
from fastdcgan.dispatch import autotune
from fastdcgan.engine import chain, match, run
from fastdcgan.engine.match import Alone, FoundChain, segments
from fastdcgan.layers import FusedSequential

_COLUMNS = 119  # of the table


@dataclass(frozen=True)
class Row:
    """One block, or one module that is not part of any."""

    name: str
    pattern: str
    fused: bool
    backend: str | None
    why: str


class Explanation(list[Row]):
    """The rows of `explain`; `str()` is a table. `absent`: the backends that can't run on this machine, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.absent: dict[str, str] = {}

    def __str__(self) -> str:
        head = ("module", "pattern", "runs", "why")
        rows = [(r.name, r.pattern, f"fused on {r.backend}" if r.fused else "as it is", r.why) for r in self]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in [head, *rows]]
        fused = sum(r.fused for r in self)
        lines += [f"{fused} of {len(self)} fused", *(f"not {name}: {why}" for name, why in self.absent.items())]
        # What is too long goes on under the reasons, or as far to the right as leaves them half of the line.
        indent = " " * min(sum(widths) + 6, _COLUMNS // 2)
        return "\n".join(textwrap.fill(line, _COLUMNS, subsequent_indent=indent) for line in lines)


def explain(model: nn.Module, *inputs: Any, **keywords: Any) -> Explanation:
    """Per block of `model`: its modules, what runs it, and why; and what is not fused, and why not.

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
    if backends.requested() == "auto":
        rows.absent = _absent()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential) or id(module) in seen or "forward" in module.__dict__:
            continue
        if type(module).forward is not nn.Sequential.forward and not match.runs_blocks(module):
            continue
        fused = isinstance(module, FusedSequential)
        transparent = match.is_plain_sequential if fused else _is_plain_unfused
        seen.update(id(m) for m in _opened(module, transparent))
        # Of what has no row here, a weight of its own may be that of a block.
        parts = [part for part in segments(module, transparent) if isinstance(part, FoundChain) or part.why is not None]
        if all(isinstance(part, Alone) and from_module(part.module) is not None for part in parts):
            parts = []  # activations alone may be those of other code's blocks
        for part in parts:
            seen.update(id(m) for m in _modules_of(part) if not isinstance(m, nn.Sequential))
            rows.extend(_rows(part, f"{path}." if path else "", fused, ran, observed))
    for path, module in model.named_modules():
        if id(module) in seen or isinstance(module, parametrize.ParametrizationList):
            continue
        if _belongs_to_a_block(module) or _record_of(module, ran) is not None:
            rows.extend(_own_rows(path or "(model)", module, _is_called_by_fused(model, path), ran, observed))
    return rows


def _absent() -> dict[str, str]:
    return {name: why for name, why in backends.status().items() if why != "available"}


def _is_called_by_fused(model: nn.Module, path: str) -> bool:
    """Whether this module, or one that contains it, has a forward whose convolutions wait."""
    parts = path.split(".")
    over = [model, *(model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))]
    return any(getattr(type(m), "_defers", False) for m in over)


def _own_rows(path: str, module: nn.Module, fused: bool, ran: dict[int, chain.Record], observed: bool) -> Iterator[Row]:
    """Those of a module that code of its own calls: a convolution that waits has the row of its block."""
    kind = getattr(type(module), "_plain_class", type(module)).__name__.removeprefix("Parametrized")
    record = _record_of(module, ran)
    if isinstance(module, nn.GroupNorm):
        yield Row(path, kind, False, None, f"{kind} is not fused")
    elif not fused:
        yield Row(path, kind, False, None, "called by code of its own: call fastdcgan.fuse(model)")
    elif not observed:
        yield Row(path, kind, False, None, "called by code of its own: explain(model, x) says how that runs")
    elif record is not None:
        parts = [kind if part.startswith("Conv") else part for part in record.pattern.split(" + ")]
        yield _row(path, " + ".join(parts), record, next(module.parameters()).device.type)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        stored = next(module.parameters())
        plain = run.why_plain(stored.device.type, stored.dtype)
        unseen = "was not reached by this input, or its weight is computed at each call"
        yield Row(path, kind, False, None, unseen if plain is None else _modules_run(plain))
    elif not isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
        yield Row(path, kind, False, None, f"{kind} is not fused")


def _record_of(module: nn.Module, ran: dict[int, chain.Record]) -> chain.Record | None:
    """That of a convolution by the module itself, its weight, or the parameter that its weight is computed from."""
    own = [p for child in (module, *_parametrizations(module)) for p in child._parameters.values()]
    return next((ran[id(of)] for of in (module, *own) if id(of) in ran), None)


def _parametrizations(module: nn.Module) -> list[nn.Module]:
    return list(module.parametrizations.children()) if parametrize.is_parametrized(module) else []  # type: ignore[union-attr]


def _observe(
    model: nn.Module, inputs: tuple, keywords: dict[str, Any], device: torch.device
) -> dict[int, chain.Record]:
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with autotune.at_once(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model(*inputs, **keywords)  # measures what it has to
            chain.recorder = []
            model(*inputs, **keywords)
        ran = {id(record.conv): record for record in chain.recorder}
        for record in chain.recorder:
            for origin in origins(record.conv):
                ran.setdefault(id(origin), record)
        return ran
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
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return isinstance(module, kinds)


def origins(weight: Any) -> Iterator[Tensor]:
    """The parameters like weights that a weight, computed with gradients, was computed from."""
    nodes: list[Any] = [weight.grad_fn] if isinstance(weight, Tensor) and weight.grad_fn is not None else []
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable") and node.variable.dim() >= 4:
            yield node.variable
        before = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= before
        nodes.extend(before)


def _rows(
    part: FoundChain | Alone, prefix: str, fused: bool, ran: dict[int, chain.Record], observed: bool
) -> list[Row]:
    if isinstance(part, Alone):
        return [Row(prefix + part.name, type(part.module).__name__, False, None, part.why or "")]
    rows = []
    for block in part.blocks:
        name, record = prefix + block.name, _record_of(block.first, ran)
        # Reading `weight` would run a parametrization.
        owners = (m for of in (block, *part.blocks) for m in of.modules())
        stored = next((p for m in owners for p in m.parameters()), torch.empty(0))
        device, dtype = stored.device.type, stored.dtype
        plain = run.why_plain(device, dtype)
        if not fused:
            rows.append(Row(name, block.pattern, False, None, "in a plain nn.Sequential: call fastdcgan.fuse(model)"))
        elif record is not None:
            rows.append(_row(name, block.pattern, record, device))
        elif plain is not None:
            rows.append(Row(name, block.pattern, False, None, _modules_run(plain)))
        elif part.bare:
            rows.append(Row(name, block.pattern, False, None, match.WHY_BARE))
        elif observed:
            rows.append(Row(name, block.pattern, False, None, "was not reached by this input, or ran module by module"))
        else:
            chosen = backends.select(backends.requested(), device, dtype)
            why = _why_backend(chosen, device, dtype) or ["first choice"]
            rows.append(Row(name, block.pattern, True, chosen, "; ".join(why)))
    return rows


def _row(name: str, pattern: str, record: chain.Record, device: str) -> Row:
    """That of a block that ran."""
    if record.backend is None:
        bare = record.route == match.WHY_BARE
        return Row(name, pattern, False, None, record.route if bare else _modules_run(record.route))
    why = [record.route, f"input {list(record.shape)}", *_why_backend(record.backend, device, record.dtype)]
    return Row(name, pattern, True, record.backend, "; ".join(filter(None, why)))


def _modules_run(why: str) -> str:
    """Why PyTorch's own modules or functions run a block; where a backend is absent, the reason is below the table."""
    absent = next((f"no backend {name!r} here" for name, reason in _absent().items() if reason == why), why)
    return f"runs as PyTorch's own: {absent}"


def _why_backend(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Why those that "auto" would rather take don't run a block, but for those that are absent."""
    if backends.requested() != "auto":
        return ["asked for by name"]
    if name == "auto":  # on a GPU
        return []
    absent, reasons = _absent(), backends.reasons(device, dtype)
    before = itertools.takewhile(lambda other: other != name, reasons)
    return [f"not {other}: {reasons[other]}" for other in before if other not in absent]
