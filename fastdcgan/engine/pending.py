"""What waits for what comes after it: convolutions and their norms and activations, in code of a model's own.

`deferred.py` says when and why.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import autotune
from fastdcgan.engine import chain, choice
from fastdcgan.engine.chain import Chain
from fastdcgan.engine.match import WHY_BARE
from fastdcgan.engine.planned import block_backend
from fastdcgan.spec import Block, BlockTensors, Running

# --- what waits ------------------------------------------------------------------------------------------------------


class Waiting(TorchFunctionMode):
    """Who waits, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: weakref.WeakValueDictionary[int, Pending] = weakref.WeakValueDictionary()
        self.owed: dict[int, Pending] = {}  # with statistics that have to be updated, whether or not anybody asks
        self.all_plain = True  # every chain ran as PyTorch's functions, and will


class Pending:
    """The output of blocks that wait. It stands for a tensor, and is one to `isinstance`; `tensor()` computes it."""

    def __init__(self, mode: Waiting, parent: Pending | None, x: Tensor, call: Callable[[Any], Any]) -> None:
        self.mode, self.parent, self.x = mode, parent, x  # x: what the first block gets
        self.call = call  # makes this of what `parent` stands for, or of x
        self.key = 0  # of `known_blocks`
        self.convolves = False  # this, beside what was done before
        self.tensors: tuple[BlockTensors, ...] = () if parent is None else parent.tensors
        self.running: tuple[Running | None, ...] = () if parent is None else parent.running
        self.state = state_of(x)
        self.value: Tensor | None = None
        self.passed = False  # what goes on from here was computed, and has updated the running statistics
        mode.waiting[id(self)] = self

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Where no mode is entered: it left the forward by a way of its own."""
        args, kwargs = tensors_in((args, kwargs or {}))
        return func(*args, **kwargs)

    def tensor(self) -> Tensor:
        """What it stands for, computed at the first call."""
        if self.value is None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch._C.DisableTorchFunction())
                if state_of(self.x) != self.state:
                    grad, inference, autocast, dtype = self.state
                    stack.enter_context(torch.inference_mode(inference))
                    stack.enter_context(torch.set_grad_enabled(grad))
                    stack.enter_context(torch.autocast(self.x.device.type, dtype, enabled=autocast))
                self.value = self._computed()
        return self.value

    def _computed(self) -> Tensor:
        if self.passed and autotune.consulted(self.x.device):
            kept.add(self.key)  # from the next time on, what goes on from here is another chain
        x, steps = self.x, [self]
        for p in self.ancestors():
            if p.value is not None:
                x = p.value
                break
            steps.insert(0, p)
        for p in steps:
            self.mode.owed.pop(id(p), None)
        self.mode.waiting.pop(id(self), None)
        while not steps[0].convolves:  # what it goes on from was needed too
            x = steps[0].value = steps[0].call(x)
            self.mode.waiting.pop(id(steps.pop(0)), None)
            if not steps:
                return x
        first = len(known_blocks[steps[0].key]) - 1
        key = key_of(0, (self.key, first), lambda _: known_blocks[self.key][first:]) if first else self.key
        tensors, running = self.tensors[first:], self.running[first:]
        out = _chain_of(key)(self.mode, x, tensors, (None,) * len(running) if self.passed else running)
        for p in steps[:-1]:
            p.passed = True
        return out

    def ancestors(self) -> Iterator[Pending]:
        p = self.parent
        while p is not None:
            yield p
            p = p.parent

    # What can be told without computing it.

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def is_cuda(self) -> bool:
        return self.x.is_cuda

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    @property
    def shape(self) -> torch.Size:
        size = (self.x.shape[2], self.x.shape[3])
        for block in known_blocks[self.key]:
            size = block.output_size(*size)
        return torch.Size((self.x.shape[0], self.channels, *size))

    @property
    def channels(self) -> int:
        block, weight = known_blocks[self.key][-1], self.tensors[-1].weight
        return weight.shape[1] * block.geometry.groups if block.transposed else weight.shape[0]

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def tanh(self) -> Any:  # what F.tanh and F.sigmoid call
        return torch.tanh(self)  # type: ignore[arg-type]

    def sigmoid(self) -> Any:
        return torch.sigmoid(self)  # type: ignore[arg-type]

    # What can't.

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __repr__(self) -> str:
        return repr(self.tensor())


def _by_the_tensor(name: str) -> Callable:
    def method(self: Pending, *args: Any, **kwargs: Any) -> Any:
        self, args, kwargs = tensors_in((self, args, kwargs))
        return getattr(self, name)(*args, **kwargs)

    return method


for _name in set(dir(Tensor)) - set(dir(object)) - set(dir(Pending)):  # Python looks operators up on the class
    if _name.startswith("__") and _name.endswith("__") and callable(getattr(Tensor, _name)):
        setattr(Pending, _name, _by_the_tensor(_name))
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__format__", "__dir__", "__reduce_ex__"):
    setattr(Pending, _name, _by_the_tensor(_name))
Pending.__hash__ = lambda self: id(self)  # type: ignore[method-assign]


def waits(value: Any) -> bool:
    return type(value) is Pending


def tensors_in(values: Any) -> Any:
    """The same with a tensor for everything that waits: what others go on from first."""
    found = [v for v in pytree.tree_leaves(values, is_leaf=waits) if waits(v)]
    for each in sorted(found, key=lambda p: len(list(p.ancestors()))):
        each.tensor()
    return pytree.tree_map(lambda v: v.tensor() if waits(v) else v, values, is_leaf=waits) if found else values


def state_of(x: Tensor) -> tuple:
    kind = x.device.type
    on = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if on else None
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), on, dtype)


# --- how it is computed ----------------------------------------------------------------------------------------------

# Blocks by keys, which are cheaper to compare: a key is that of the blocks before and what a function adds to them.
_keys: dict[tuple, int] = {}
known_blocks: dict[int, tuple[Block, ...]] = {0: ()}
_chains: dict[int, _CallChain] = {}
kept: set[int] = set()  # keys of what was needed after what goes on from it was computed


def key_of(before: int, added: tuple, blocks: Callable[[tuple[Block, ...]], tuple[Block, ...]]) -> int:
    key = _keys.get((before, added))
    if key is None:
        key = _keys[before, added] = len(_keys) + 1
        known_blocks[key] = blocks(known_blocks[before])
    return key


def _chain_of(key: int) -> _CallChain:
    found = _chains.get(key)
    if found is None:
        found = _chains[key] = _CallChain(known_blocks[key])
    return found


class _CallChain(Chain):
    """A chain of blocks whose tensors come with each call."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        super().__init__()
        self._blocks = blocks
        self.bare = len(blocks) == 1 and blocks[0].norm is None and blocks[0].act == "identity"
        self._weights: list[Tensor] = []  # of the last call, for `explain`

    def __call__(
        self, mode: Waiting, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]
    ) -> Tensor:
        weight, out = tensors[0].weight, None
        brief = (
            x.shape, x.stride(), x.dtype, x.requires_grad, torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(),
            weight.shape, weight.requires_grad, backends.requested(),
        )  # fmt: skip
        if chain.recorder is not None:
            self._weights = [t.weight for t in tensors]
        if torch.compiler.is_compiling():
            if not self._compiles_to_functions(x, tensors, running):
                out = self.run(x, tensors, running, 1, "auto", brief)
        elif self.why_plain(x, brief) is None:
            if self.bare and not self.has_choice(x, "auto", block_backend(x)):
                self._record(x, None, [WHY_BARE])
            else:
                mode.all_plain = False
                out = self.run(x, tensors, running, 1, "auto", brief)
        return choice.modules(self._blocks, self.entered, 1, x, tensors, running) if out is None else out

    def _compiles_to_functions(
        self, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]
    ) -> bool:
        """`compiles_to_modules` for the like of tensors that a compiler traces."""
        if x.device.type != "cpu":
            return self.bare
        with _disable_current_modes(), mock.patch.object(torch.compiler, "_is_compiling_flag", False):
            real = [BlockTensors(*map(_real_like, t)) for t in tensors]
            buffers = [
                None if r is None or t.running_mean is None or t.running_var is None
                else Running(t.running_mean, t.running_var, r.momentum)
                for r, t in zip(running, real, strict=True)
            ]  # fmt: skip
            return self.compiles_to_modules(_real_like(x), real, buffers, 1)

    def blocks(self, backend: str) -> list[Block]:
        return [replace(block, backend=backend) for block in self._blocks]

    def records(self) -> list[tuple[Any, str]]:
        return [(weight, _pattern(block)) for block, weight in zip(self._blocks, self._weights, strict=True)]


def _real_like(t: Any) -> Any:
    """A tensor with the sizes and strides of one that is traced."""
    if t is None:
        return None
    hint = torch.fx.experimental.symbolic_shapes.optimization_hint  # they may be symbols
    sizes, strides = (tuple(map(hint, found)) for found in (t.shape, t.stride()))
    return torch.empty_strided(sizes, strides, dtype=t.dtype).fill_(0.5).requires_grad_(t.requires_grad)


def _pattern(block: Block) -> str:
    """As modules would be called, which it may well be."""
    act = ACTIVATIONS[block.act].module
    names = ["ConvTranspose2d" if block.transposed else "Conv2d"]
    if block.norm is not None:
        names.append("InstanceNorm2d" if block.norm.instance else "BatchNorm2d")
    return " + ".join(names + ([] if act is None else [act.__name__]))
