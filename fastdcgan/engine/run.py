"""Running what `match` found: planned once for a signature, run many times behind a guard.

The first call of a `FusedSequential` finds its blocks and plans each chain of them. What it found is kept on the
module; a later call checks that modules and tensors are what they were (microseconds), and runs the plan. Whatever may
change a plan is in the guard: the modules themselves with their hooks, modes and numbers (`_Structure`); dtype, device,
shape, strides and requires_grad of the tensors, autocast, grad mode, the backend, PyTorch's settings (`Chain._run`).
"""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any
from unittest import mock

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdcgan import backends, checks
from fastdcgan.activations import DECISIVE
from fastdcgan.dispatch import autotune
from fastdcgan.engine import chain, forwards, reordered
from fastdcgan.engine.match import Alone, FoundChain, segments
from fastdcgan.engine.module_chain import ModuleChain, call_alone
from fastdcgan.engine.place import Kept
from fastdcgan.engine.planned import compute_dtype, followed
from fastdcgan.spec import BlockTensors

_PLAIN = 256  # calls of a Sequential by shape and mode
_STRUCTURES = 4  # of a Sequential: as many of its states (training, eval, ...)


# --- a Sequential -----------------------------------------------------------------------------------------------------


def run_sequential(sequential: nn.Sequential, x: Any, stat_groups: int | torch.fx.Proxy, boundaries: str) -> Any:
    """`nn.Sequential.forward` with every chain in it run as one."""
    return forwards.run(sequential, _as_modules, _run, (x,), {}, (stat_groups, boundaries))


def _as_modules(sequential: nn.Sequential, x: Any, stat_groups: int, boundaries: str) -> Any:
    """What PyTorch's modules do."""
    if stat_groups == 1:
        return nn.Sequential.forward(sequential, x)
    checks.check_stat_groups(stat_groups)
    for module in sequential:
        x = call_alone(module, x, stat_groups)
    return x


def _run(sequential: nn.Sequential, x: Any, stat_groups: int | torch.fx.Proxy, boundaries: str) -> Any:
    compiling = torch.compiler.is_compiling()
    kept = None if compiling else sequential.__dict__.get("_plans")
    known = kept.plain if kept is not None and chain.recorder is None and not reordered.is_on() else ()
    settings = (stat_groups, boundaries)
    if known and forwards.glance(sequential, (x,), {}, settings) in known:
        return _as_modules(sequential, x, 1, boundaries)
    if isinstance(stat_groups, torch.fx.Proxy):
        stat_groups = 1  # torch.fx traces the root module's default as an input
    checks.check_stat_groups(stat_groups)
    if followed(x) or runs_plain(x):
        return _as_modules(sequential, x, stat_groups, boundaries)
    called, chains, recorded = x, 0, len(chain.recorder or ())
    gain: float | None = 0.0 if type(x) in forwards.TENSORS and stat_groups == 1 else None
    for i, part in enumerate(_parts(sequential)):
        if isinstance(part, Alone):
            x = call_alone(part.module, x, stat_groups)
        elif compiling and _compiles_to_modules(sequential, i, part.bare, x, stat_groups, boundaries):
            x = part.as_modules(x, stat_groups)
        else:
            x = part(x, stat_groups, boundaries)
            chains += 1
            if not part.ran_modules:
                gain = None if gain is None or part.gain is None else gain + part.gain
    if compiling or reordered.is_on():
        return x
    if chain.fuses_too_little(gain, lambda: chains * guarding_ms(), recorded):
        sequential.__dict__["_plans"].remember_plain(forwards.glance(sequential, (called,), {}, settings))
    return x


def _compiles_to_modules(
    sequential: nn.Sequential, part: int, bare: bool, x: Tensor, stat_groups: int, boundaries: str
) -> bool:
    """Whether the compiler that traces this call gets PyTorch's modules of a chain."""
    known = hasattr(torch.fx.experimental.symbolic_shapes, "optimization_hint")  # not in torch 2.11
    if x.device.type != "cpu" or boundaries != "auto" or not known:
        return bare
    hint = torch.fx.experimental.symbolic_shapes.optimization_hint  # sizes may be symbols
    sizes, strides = tuple(map(hint, x.shape)), tuple(map(hint, x.stride()))
    return _measured_for_compiler(sequential, part, sizes, strides, x.dtype, x.requires_grad, hint(stat_groups))


def _measured_for_compiler(
    sequential: nn.Sequential, part: int, sizes: tuple, strides: tuple, dtype: torch.dtype, grad: bool, stat_groups: int
) -> bool:
    found = segments(sequential)[part]
    assert isinstance(found, FoundChain)
    x = torch.empty_strided(sizes, strides, dtype=dtype).fill_(0.5).requires_grad_(grad)
    with mock.patch.object(torch.compiler, "_is_compiling_flag", False):
        return ModuleChain(found).compiled_as_modules(x, stat_groups)


# What torch.compiler.assume_constant_result does, which would import the compiler: it runs while the call is traced.
_measured_for_compiler._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def guarding_ms() -> float:
    """Milliseconds of a chain in a Sequential on the CPU, beside what the chain takes, as measured on this machine."""
    x, conv = torch.ones(1, 1, 4, 4), nn.utils.skip_init(nn.Conv2d, 1, 1, 3, padding=1, bias=False)  # draws no numbers
    sequential, tensors = nn.Sequential(conv, nn.ReLU()), [BlockTensors(conv.weight)]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        conv.weight.fill_(1.0)
        (part,) = _parts(sequential)
        return autotune.extra_milliseconds(
            "a chain of a Sequential",
            lambda: run_sequential(sequential, x, 1, "auto"),
            lambda: part.run(x, tensors, [None], 1, "auto", ()),
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


def runs_plain(x: Any) -> bool:
    """Whether the compiled backend that is meant for a tensor is missing, which is said once."""
    if not isinstance(x, Tensor) or backends.missing(x.device.type) is None:
        return False
    reason = why_plain(x.device.type, compute_dtype(x))
    if reason is not None and reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(reason)
        warnings.warn(f"blocks run as PyTorch's own modules: {reason}", stacklevel=5)
    return reason is not None


# --- its structure, found once ----------------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "output_padding", "padding_mode")
_UP = ("size", "scale_factor", "mode", "align_corners")
_NORM = ("training", "eps", "momentum", "num_features", "track_running_stats")


def _watched(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that decide what it is in a chain."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return _HOOKS + _CONV
    if isinstance(module, _BatchNorm):
        return _HOOKS + _NORM
    if isinstance(module, nn.Upsample):
        return _HOOKS + _UP
    return (*_HOOKS, *(name for name in (*DECISIVE, "inplace") if name in module.__dict__))


def _copied(value: Any) -> Any:
    """A value that stays as it is when the original is changed in place."""
    return type(value)(value) if isinstance(value, (dict, list)) else value


class _Structure:
    """The chains of a Sequential, and what has to hold for them to be that.

    It has no reference to the Sequential itself, which keeps it: that would be a circle, and a model that is given up
    would keep its memory until the garbage collector comes.
    """

    def __init__(self, sequential: nn.Sequential) -> None:
        self.parts = [ModuleChain(p) if isinstance(p, FoundChain) else p for p in segments(sequential)]
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


class Plans(Kept, list):
    """The structures of a Sequential, the one that held last first."""

    def __init__(self) -> None:
        super().__init__()
        # `forwards.glance`s of calls all of whose chains PyTorch's modules run fastest.
        self.plain: set[tuple | None] = set()

    def remember_plain(self, glance: tuple | None) -> None:
        if len(self.plain) >= _PLAIN:
            self.plain.clear()
        self.plain.add(glance)


def _parts(sequential: nn.Sequential) -> list:
    """The chains of a Sequential and the modules between them."""
    if torch.compiler.is_compiling():  # which guards by itself
        return [ModuleChain(p) if isinstance(p, FoundChain) else p for p in segments(sequential)]
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
