"""What waits for what comes after it: convolutions, norms and activations, in code of a model's own.

`deferred.py` says when and why. A `Step` is a call that waits; a `Pending` is its output, as the code that called it
has it. What is computed is a line of steps, from the last one whose output there is to the one that is needed: as one
chain, but for outputs that somebody may still ask for (`liveness.py`), which are computed on their own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import autotune
from fastdcgan.engine import chain, choice, liveness, reordered
from fastdcgan.engine.chain import Chain
from fastdcgan.engine.match import WHY_BARE
from fastdcgan.engine.place import local, place, top_hooks
from fastdcgan.engine.planned import block_backend
from fastdcgan.spec import Block, BlockTensors, Running

# --- what waits ------------------------------------------------------------------------------------------------------


class Waiting(TorchFunctionMode):
    """Who waits, while it is entered."""

    def __init__(self, traced: bool = False) -> None:
        super().__init__()
        self.traced = traced  # by a compiler, which knows tensors by their objects: none becomes another
        self.place, self.caller = place(), id(sys._getframe(1))  # the frame that enters it
        self.waiting: weakref.WeakValueDictionary[int, Pending] = weakref.WeakValueDictionary()
        self.owed: dict[int, Step] = {}  # by the running statistics (their ids) that it has still to update
        self.waited, self.passed = 0, 0  # calls
        self.gain: float | None = 0.0  # milliseconds over PyTorch's functions of all chains, where that was measured

    def compute_what_reads(self, written: Tensor) -> None:
        """Compute what waits and reads the memory of a tensor that is about to be written to."""
        if written.dim() == 0 and not written.is_floating_point():  # the count of batches, as a rule
            return
        try:
            memory = written.untyped_storage()._cdata
        except NotImplementedError:  # sparse, or within a transform: nothing that waits reads that
            return
        for step in self._steps():
            if not step.done and any(t.untyped_storage()._cdata == memory for t in step.reads()):
                step.result()

    def compute_owed(self, given: Iterable[Any]) -> None:
        """Update the running statistics among these tensors."""
        for t in given if self.owed else ():
            step = self.owed.get(id(t))
            if step is not None:
                step.result()

    def compute_all(self) -> None:
        """What somebody still has, and statistics whose norm's output nobody asked for."""
        for step in self._steps():
            if not step.done:
                step.result()

    def _steps(self) -> list[Step]:
        """The last ones first: others are computed on the way to them."""
        return [*(p.step for p in reversed([*self.waiting.values()])), *self.owed.values()]


class Step:
    """A call that waits for what comes after it."""

    def __init__(self, mode: Waiting, parent: Step | None, x: Tensor, call: Callable[[Tensor], Tensor]) -> None:
        self.mode, self.parent, self.x = mode, parent, x  # x: what the first block gets
        self.call: Callable[[Tensor], Tensor] | None = call  # makes this of the parent's output, or of x
        self.key = 0  # of `known_blocks`
        self.begins = False  # a block
        self.upsamples = False  # which the convolution that goes on from here does itself, if nobody else needs it
        self.shape: torch.Size = torch.Size() if parent is None else parent.shape
        self.tensors: tuple[BlockTensors, ...] = () if parent is None else parent.tensors
        self.running: tuple[Running | None, ...] = () if parent is None else parent.running
        self.state = state_of(x)
        self.uses = 0  # steps that go on from here
        self.output: Callable[[], Pending | None] = lambda: None  # as somebody has it
        self.value: Tensor | None = None
        self.done = False  # it was computed, perhaps on the way to another and without a value
        if parent is not None:
            parent.uses += 1

    @property
    def block(self) -> Block:
        return known_blocks[self.key][-1]

    def reads(self) -> Iterator[Tensor]:
        yield self.x
        yield from (t for block in self.tensors for t in block if t is not None)
        before = self.parent
        while before is not None:
            if before.value is not None:
                yield before.value
                break
            before = before.parent

    def is_held(self) -> bool:
        """Whether somebody has its output who may ask for it."""
        return self.output() is not None and (self.mode.traced or not liveness.is_dead(self.output, self.mode.caller))

    def result(self) -> Tensor:
        """Its output, computed at the first call."""
        if self.value is not None:
            return self.value
        if self.done:
            return self._computed_again()
        line: list[Step] = [self]
        while (before := line[0].parent) is not None and before.value is None:
            line.insert(0, before)
        x = self.x if before is None or before.value is None else before.value
        steps: list[Step] = []
        with _as_it_was(self.mode, self.x, self.state):
            for step in line:
                steps.append(step)
                if step is self or step.uses > 1 or step.is_held():
                    x = step._becomes(_computed(steps, x))
                    steps = []
        return x

    def _computed_again(self) -> Tensor:
        """For a debugger, say, that looks at a variable of no further use. Running statistics have been updated."""
        statistics = [(t, t.clone()) for r in self.running if r is not None for t in (r.mean, r.var)]
        self.done = False
        value = self.result()
        for t, before in statistics:
            t.data.copy_(before)
        return value

    def _becomes(self, value: Tensor) -> Tensor:
        output = self.output()
        if output is not None and not self.mode.traced:  # the very object becomes the tensor
            torch._C._swap_tensor_impl(output, value)
            del output.step
            output.__class__ = Tensor  # type: ignore[assignment]
            self.mode.waiting.pop(id(output), None)
            value = reordered.like(output, value)
        self.value, self.parent, self.call, self.tensors, self.running = value, None, None, (), ()
        self.x = value
        return value


def _computed(steps: list[Step], x: Tensor) -> Tensor:
    """The output of the last of the steps, whose first one goes on from `x`."""
    last = steps[-1]
    for step in steps:
        step.done = True
    owed = last.mode.owed
    for buffer in [buffer for buffer, step in owed.items() if step in steps]:
        del owed[buffer]
    while steps and not _begins_chain(steps):
        call = steps.pop(0).call
        assert call is not None
        x = reordered.like(call(x), x)
    if not steps:
        return x
    if last.upsamples:
        assert last.call is not None
        x = _computed(steps[:-1], x)
        return reordered.like(last.call(x), x)
    before = known_blocks[next(step for step in steps if step.begins).key]
    first, done = len(before) - 1, before[-1].upsamples and not steps[0].upsamples  # x is upsampled already
    key = last.key
    if first or done:
        key = key_of(0, (last.key, first, done), lambda _: _blocks_from(last.key, first, done))
    return run_call(last.mode, x, key, last.tensors[first:], last.running[first:])


def _begins_chain(steps: list[Step]) -> bool:
    """Whether a chain begins with the first of the steps. A norm on its own gains nothing by being one."""
    first = steps[0]
    if first.upsamples:  # by the convolution behind it
        return len(steps) > 1
    return first.begins and (len(steps) > 1 or first.block.convolves)


def _blocks_from(key: int, first: int, upsampled: bool) -> tuple[Block, ...]:
    """Those from the `first` on, of an input that is `upsampled` already."""
    head, *others = known_blocks[key][first:]
    return (head.after_upsampling() if upsampled else head, *others)


class Pending(Tensor):
    """The output of a step. Whatever is done with it, it first becomes the tensor that it stands for.

    It is a Tensor, since `isinstance` of C++ and Python have to agree on that. PyTorch's functions ask
    `__torch_function__`; code in C++ that knows nothing of that finds no memory to read.
    """

    step: Step

    @staticmethod
    def __new__(cls, step: Step) -> Pending:
        self = Tensor._make_wrapper_subclass(cls, step.shape, dtype=step.x.dtype, device=step.x.device)
        self.step, step.output = step, weakref.ref(self)
        step.mode.waiting[id(self)] = self
        return self

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Where no mode is entered."""
        compute((args, kwargs))
        return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(
            f"{func} got the output of a convolution that waits for what comes after it, from code that PyTorch's "
            "functions don't call: pass it through one before (x = x.view_as(x)), or call fastdcgan.unfuse(model)"
        )


def waits(value: Any) -> bool:
    return type(value) is Pending


def compute(values: Any) -> list[Tensor]:
    """The tensors in arguments, of which none waits any more."""
    if isinstance(values, Tensor):
        if type(values) is Pending:
            values.step.result()
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [t for value in values for t in compute(value)]


def computed(values: Any) -> Any:
    """After `compute`: the same, with tensors in place of what stays what it is where a compiler traces."""
    return pytree.tree_map(lambda v: v if type(v) is not Pending or v.step.value is None else v.step.value, values)


# --- where and how it is called --------------------------------------------------------------------------------------


def state_of(x: Tensor) -> tuple:
    kind = x.device.type
    on = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if on else None
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), on, dtype)


@contextlib.contextmanager
def _as_it_was(mode: Waiting, x: Tensor, state: tuple) -> Iterator[None]:
    """The settings under which something was called, which is computed only now."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        if state_of(x) != state:
            grad, inference, autocast, dtype = state
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(torch.autocast(x.device.type, dtype, enabled=autocast))
        if place() != mode.place:
            stack.enter_context(hooks_up_to(mode.place[0]))
            stack.enter_context(temporarily_clear_interpreter_stack())
        yield


@contextlib.contextmanager
def hooks_up_to(last: Any) -> Iterator[None]:
    """Without the hooks on saved tensors that were set after `last`."""
    hooks = []
    while (top := top_hooks(True)) is not None and top != last:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


_apply = torch.autograd.Function.__dict__["apply"]  # of Python, and from torch 2.14 on of C


def _apply_to_tensors(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`Function.apply`, which asks no `__torch_function__`, and calls a forward that has to return tensors."""
    waits, reorders = local.inside is not None, local.reordering is not None
    if not (waits or reorders) or cls.__module__.startswith("fastdcgan.engine."):
        return _apply.__get__(None, cls)(*args, **kwargs)
    compute((args, kwargs))
    reordered.make_contiguous((args, kwargs))
    local.applying += 1
    try:
        return _apply.__get__(None, cls)(*args, **kwargs)
    finally:
        local.applying -= 1


torch.autograd.Function.apply = classmethod(_apply_to_tensors)  # type: ignore[assignment, method-assign]


def compute_before_compiled_code() -> None:
    """Compute what waits before torch.compile's code runs or is traced, which asks no `__torch_function__`: once its
    compiler is imported, the function that it calls just before."""
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    enter = getattr(compiler, "_callback_from_stance", None)
    if enter is None or hasattr(enter, "computes"):
        return

    @functools.wraps(enter)
    def compute_and_enter(callback: Any) -> Any:
        for i in range(torch._C._len_torch_function_stack()):
            mode = torch._C._get_function_stack_at(i)
            if isinstance(mode, Waiting) and not mode.traced:
                mode.compute_all()
        reordered.make_all_contiguous()
        return enter(callback)

    compute_and_enter.computes = True  # type: ignore[attr-defined]
    compiler._callback_from_stance = compute_and_enter


# --- how it is computed ----------------------------------------------------------------------------------------------

# Blocks by keys, which are cheaper to compare: a key is that of the blocks before and what a function adds to them.
_keys: dict[tuple, int] = {}
_numbers = itertools.count(1)  # of which no two threads get the same
known_blocks: dict[int, tuple[Block, ...]] = {0: ()}
_chains: dict[int, _CallChain] = {}


def key_of(before: int, added: tuple, blocks: Callable[[tuple[Block, ...]], tuple[Block, ...]]) -> int:
    key = _keys.get((before, added))
    if key is None:
        key = next(_numbers)
        known_blocks[key] = blocks(known_blocks[before])
        _keys[before, added] = key
    return key


def run_call(
    mode: Waiting, x: Tensor, key: int, tensors: Sequence[BlockTensors], running: Sequence[Running | None]
) -> Tensor:
    """The output of the chain of the blocks `known_blocks[key]` for `x`."""
    found = _chains.get(key)
    if found is None:
        found = _chains[key] = _CallChain(known_blocks[key])
    return found(mode, x, tensors, running)


class Cost(NamedTuple):
    """Milliseconds on the CPU: of a call that waits, beside what its chain takes, and of any other that is seen."""

    waiting: float
    passing: float


@functools.cache
def cost_of(mode: type[Waiting]) -> Cost:
    """As it was measured on this machine (`autotune.extra_milliseconds`)."""
    x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)

    def block() -> Tensor:
        return F.relu(F.conv2d(x, weight))

    def waited() -> Tensor:
        with mode():
            return block()

    def passed(within: int, after: int) -> None:
        with mode():
            waits = block()
            for _ in range(within):
                x.add(x)
            del waits  # nobody asked for it
        for _ in range(after):
            x.add(x)

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        with mode() as entered:
            step = block().step  # type: ignore[attr-defined]
            alone = functools.partial(run_call, entered, x, step.key, step.tensors, step.running)
        two, many = autotune.extra_milliseconds("two calls that wait", waited, alone), 8
        others = autotune.extra_milliseconds(
            f"{many} calls beside one that waits", lambda: passed(many, 0), lambda: passed(0, many)
        )
    return Cost(two / 2, others / many)


class _CallChain(Chain):
    """A chain of blocks whose tensors come with each call."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        super().__init__()
        self._blocks = blocks
        first = blocks[0]
        self.bare = len(blocks) == 1 and first.norm is None and first.act == "identity" and not first.upsamples
        self.convolves = any(block.convolves for block in blocks)
        self._owners: list[Tensor | None] = []  # of this call, for `explain`

    def __call__(
        self, mode: Waiting, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]
    ) -> Tensor:
        owner, out = _owner(tensors[0]), None
        x = reordered.entered(x, (t.weight for t in tensors))
        brief = (
            x.shape, x.stride(), x.dtype, x.requires_grad, torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(),
            owner is None or (owner.shape, owner.requires_grad), backends.requested(),
        )  # fmt: skip
        if chain.recorder is not None:
            self._owners = list(map(_owner, tensors))
        if mode.traced:
            if not self._compiles_to_functions(x, tensors, running):
                out = self.run(x, tensors, running, 1, "auto", brief)
        elif self.why_plain(x, brief) is None:
            if self.bare and not self.has_choice(x, "auto", block_backend(x)):
                self._record(x, None, [WHY_BARE])
            else:
                out = self.run(x, tensors, running, 1, "auto", brief)
                mode.gain = None if mode.gain is None or self.gain is None else mode.gain + self.gain
        self._owners = []
        out = choice.modules(self._blocks, self.entered, 1, x, tensors, running) if out is None else out
        return reordered.like(out, x)

    def _compiles_to_functions(
        self, x: Tensor, tensors: Sequence[BlockTensors], running: Sequence[Running | None]
    ) -> bool:
        """`compiles_to_modules` for the like of tensors that a compiler traces."""
        known = hasattr(torch.fx.experimental.symbolic_shapes, "optimization_hint")  # not in torch 2.11
        if x.device.type != "cpu" or not known:
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

    def records(self) -> list[tuple[Any, str, bool]]:
        return [
            (owner, _pattern(block), block.convolves) for block, owner in zip(self._blocks, self._owners, strict=True)
        ]


def _owner(t: BlockTensors) -> Tensor | None:
    """The first tensor of a block: its weight, or that of its norm."""
    return next((v for v in t if v is not None), None)


def _real_like(t: Any) -> Any:
    """A tensor with the sizes and strides of one that is traced."""
    if t is None:
        return None
    hint = torch.fx.experimental.symbolic_shapes.optimization_hint  # they may be symbols
    sizes, strides = (tuple(map(hint, found)) for found in (t.shape, t.stride()))
    return torch.empty_strided(sizes, strides, dtype=t.dtype).fill_(0.5).requires_grad_(t.requires_grad)


def _pattern(block: Block) -> str:
    """As modules would be called, which it may well be."""
    act = nn.PReLU if block.learns_slope else ACTIVATIONS[block.act].module
    names = ["ConvTranspose2d" if block.transposed else "Conv2d"] if block.convolves else []
    if block.upsamples:
        names = ["Upsample", "Conv2d"]
    if block.norm is not None:
        names.append("InstanceNorm2d" if block.norm.instance else "BatchNorm2d")
    return " + ".join(names + ([] if act is None else [act.__name__]))
