"""Blocks in code of a model's own: convolutions that its forward calls wait for what comes after them.

While `Deferring` is entered, a convolution computes nothing. It gives a `Pending`, which a batch normalisation, an
activation or another convolution continues; whatever else touches it makes it a tensor: the chain runs, by the plan
and the choice that a Sequential's chain has. All else, control flow included, runs as it always does. So nothing is
traced and nothing has to be guarded; what is in a ModuleList, or calls `torch.nn.functional`, is found as well.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan import backends
from fastdcgan.activations import find
from fastdcgan.dispatch import primitives
from fastdcgan.engine import chain
from fastdcgan.engine.pending import Pending, Waiting, kept, key_of, known_blocks, state_of, tensors_in, waits
from fastdcgan.engine.planned import autocast_dtype, followed
from fastdcgan.geometry import Geometry, Pair, pair
from fastdcgan.spec import Block, BlockTensors, Norm, Running

# --- the functions that it knows -------------------------------------------------------------------------------------

_HANDLERS: dict[Callable, Callable] = {}


def _open(x: Any) -> Pending | None:
    """`x` if it waits and may be continued."""
    if not waits(x) or x.value is not None or state_of(x.x) != x.state or x.key in kept:
        return None
    return x


def _of_two(value: Any) -> Pair:
    """Numbers that a compiler may have made symbols of."""
    return pair(int(value) if isinstance(value, (int, torch.SymInt)) else tuple(map(int, value)))


def _convolved(
    mode: Deferring, function: Callable, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, output_padding: Any,
    groups: int, dilation: Any,
) -> Any:  # fmt: skip
    transposed = function is torch.conv_transpose2d

    def call(x: Any) -> Any:
        if transposed:
            return function(x, weight, bias, stride, padding, output_padding, groups, dilation)
        return function(x, weight, bias, stride, padding, dilation, groups)

    weight, bias = tensors_in((weight, bias))
    parent = _open(x)
    if parent is None:
        x = tensors_in(x)
    root = x if parent is None else parent.x
    if isinstance(padding, str) or not _fits(root, weight, bias):
        return call(tensors_in(x))
    channels = root.shape[1] if parent is None else parent.channels
    numbers = tuple(map(_of_two, (weight.shape[2:], stride, padding, dilation, output_padding)))
    small = all(e < s for e, s in zip(numbers[4], numbers[1], strict=True))
    if not small or channels != (weight.shape[0] if transposed else weight.shape[1] * groups):
        return call(tensors_in(x))

    def blocks(before: tuple[Block, ...]) -> tuple[Block, ...]:
        geometry = Geometry(*numbers[:4], int(groups))  # type: ignore[arg-type, call-arg]
        return (*before, Block(transposed, geometry, numbers[4], None, "identity", 0.0, ""))

    found = Pending(mode, parent, root, call)
    found.key = key_of(0 if parent is None else parent.key, (transposed, numbers, int(groups)), blocks)
    found.convolves = True
    found.tensors += (BlockTensors(weight, bias),)
    found.running += (None,)
    return found


def _fits(x: Any, weight: Any, bias: Any) -> bool:
    """Whether a block can be of these; else PyTorch's function runs, and says what is wrong."""
    given = [t for t in (x, weight, bias) if t is not None]
    if not all(isinstance(t, Tensor) for t in given) or not _may_wait(given):
        return False
    if x.dim() != 4 or weight.dim() != 4 or not x.numel() or not x.is_floating_point():
        return False
    return all(t.device == x.device and (t.dtype == x.dtype or autocast_dtype(x) is not None) for t in given)


def _may_wait(given: Sequence[Tensor]) -> bool:
    """Where a compiler traces, `compiler.py` sees to it that all of it is to be traced."""
    return torch.compiler.is_compiling() or primitives.unwatched(*given)


def _conv2d(
    function: Callable, mode: Deferring, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    return _convolved(mode, function, input, weight, bias, stride, padding, 0, groups, dilation)


def _conv_transpose2d(
    function: Callable, mode: Deferring, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    return _convolved(mode, function, input, weight, bias, stride, padding, output_padding, groups, dilation)


def _batch_norm(
    function: Callable, mode: Deferring, input: Any, running_mean: Any, running_var: Any, weight: Any = None,
    bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    def call(x: Any) -> Any:
        return function(x, running_mean, running_var, weight, bias, training, momentum, eps)

    return _normalised(
        mode, input, (weight, bias, running_mean, running_var), Norm(float(eps), training), momentum, call
    )


def _instance_norm(
    function: Callable, mode: Deferring, input: Any, running_mean: Any = None, running_var: Any = None,
    weight: Any = None, bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    def call(x: Any) -> Any:
        return function(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    norm = Norm(float(eps), use_input_stats, instance=use_input_stats)
    return _normalised(mode, input, (weight, bias, running_mean, running_var), norm, momentum, call)


def _normalised(
    mode: Deferring, x: Any, vectors: tuple, norm: Norm, momentum: float, call: Callable[[Any], Any]
) -> Any:
    """`vectors`: weight, bias, running mean and variance."""
    p = _open(x)
    if p is None or known_blocks[p.key][-1].norm is not None or known_blocks[p.key][-1].act != "identity":
        return call(tensors_in(x))
    channels, (mean, var) = p.channels, vectors[2:]
    wrong = any(t is not None and (t.shape != (channels,) or t.device != p.x.device) for t in vectors)
    if wrong or (mean is None) != (var is None) or (mean is None and not norm.batch_stats):
        return call(p.tensor())
    found = Pending(mode, p, p.x, call)
    found.key = key_of(p.key, (norm,), lambda b: (*b[:-1], replace(b[-1], norm=norm)))
    found.tensors = (*p.tensors[:-1], BlockTensors(*p.tensors[-1][:2], *vectors))
    if norm.batch_stats and mean is not None:
        found.running = (*p.running[:-1], Running(mean, var, float(momentum)))
        mode.owed[id(found)] = found
    return found


def _activated(mode: Deferring, x: Any, name: str, slope: float, inplace: bool, call: Callable[[Any], Any]) -> Any:
    p = _open(x)
    if p is None or known_blocks[p.key][-1].act != "identity":
        return call(tensors_in(x))
    key = key_of(
        p.key, (name, slope, inplace), lambda b: (*b[:-1], replace(b[-1], act=name, slope=slope, inplace=inplace))
    )
    if inplace:  # the very object is what it became
        for other in [w for w in mode.waiting.values() if w.parent is p]:
            other.tensor()
        before = p.call
        p.key, p.call = key, lambda x: call(before(x))
        return p
    found = Pending(mode, p, p.x, call)
    found.key = key
    if mode.owed.pop(id(p), None) is not None:
        mode.owed[id(found)] = found
    return found


def _knows(module: type[nn.Module], *functions: Callable) -> None:
    """An activation's functions, which take the input and then the arguments that its module takes."""
    defaults = {name: p.default for name, p in inspect.signature(module).parameters.items()}

    def handler(function: Callable, mode: Deferring, input: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(defaults, args, strict=False)) | kwargs
        known = len(args) <= len(defaults) and given.keys() <= defaults.keys()
        found = find(module, defaults | given) if known else None
        if found is None:
            return function(tensors_in(input), *args, **kwargs)
        inplace = bool(given.get("inplace", False)) or function.__name__.endswith("_")
        return _activated(mode, input, *found, inplace, lambda x: function(x, *args, **kwargs))

    for function in functions:
        _HANDLERS[function] = functools.partial(handler, function)


_HANDLERS[torch.conv2d] = functools.partial(_conv2d, torch.conv2d)
_HANDLERS[torch.conv_transpose2d] = functools.partial(_conv_transpose2d, torch.conv_transpose2d)
_HANDLERS[F.batch_norm] = functools.partial(_batch_norm, F.batch_norm)
_HANDLERS[F.instance_norm] = functools.partial(_instance_norm, F.instance_norm)
_knows(nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_knows(nn.LeakyReLU, F.leaky_relu, F.leaky_relu_)
_knows(nn.Tanh, torch.tanh, Tensor.tanh)
_knows(nn.Sigmoid, torch.sigmoid, Tensor.sigmoid)
_knows(nn.SiLU, F.silu)
_knows(nn.GELU, F.gelu)
_knows(nn.ELU, F.elu, F.elu_)
_knows(nn.ReLU6, F.relu6)
_knows(nn.Hardtanh, F.hardtanh, F.hardtanh_)  # nn.ReLU6 calls this one
_knows(nn.Hardswish, F.hardswish)
_knows(nn.Mish, F.mish)
_knows(nn.Softplus, F.softplus)
_knows(nn.LogSigmoid, F.logsigmoid)


# --- a forward of a module's own -------------------------------------------------------------------------------------

_MOST_CALLS = 256  # of a module, by shape and mode
_local = threading.local()


def deferring(forward: Callable) -> Callable:
    """A module's forward whose convolutions wait for what comes after them."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or getattr(_local, "inside", False) or followed(args[0] if args else None):
            return forward(self, *args, **kwargs)
        glance = None
        if not kwargs and all(type(a) is Tensor for a in args):
            glance = (
                *((a.shape, a.dtype, a.requires_grad) for a in args), self.training, torch.is_grad_enabled(),
                torch._C._is_any_autocast_enabled(), backends.requested(),
            )  # fmt: skip
        plain = self.__dict__.setdefault("_plain_calls", PlainCalls())
        _local.inside = True
        try:
            if glance in plain and chain.recorder is None:
                return forward(self, *args, **kwargs)
            with Deferring() as mode:
                out = forward(self, *args, **kwargs)
            out = mode.finish(out)
        finally:
            _local.inside = False
        if mode.all_plain and glance is not None:
            if len(plain) >= _MOST_CALLS:
                plain.clear()
            plain.add(glance)
        return out

    return run


class PlainCalls(set):
    """What is kept on a module: calls all of whose chains PyTorch's functions run fastest. A copy starts anew."""

    def __deepcopy__(self, memo: dict) -> PlainCalls:
        return PlainCalls()

    def __reduce__(self) -> tuple:
        return PlainCalls, ()


# --- the mode --------------------------------------------------------------------------------------------------------


class Deferring(Waiting):
    """While it is entered, convolutions wait for what comes after them."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, *args, **(kwargs or {}))
        kwargs = kwargs or {}
        if self.waiting:
            written = _written(func, args, kwargs)
            if written is not None:
                self._compute_what_reads(written)
            args, kwargs = tensors_in((args, kwargs))
        return func(*args, **kwargs)

    def finish(self, out: Any) -> Any:
        """A forward's output with tensors in place of what waits; all statistics are updated."""
        out = tensors_in(out)
        for p in list(self.owed.values()):
            p.tensor()
        return out

    def _compute_what_reads(self, written: Tensor) -> None:
        if not written.is_floating_point():  # the count of batches, as a rule
            return
        memory = written.untyped_storage()._cdata
        for p in sorted(self.waiting.values(), key=lambda p: len(list(p.ancestors()))):
            given = [p.x, *(t for block in p.tensors for t in block if t is not None)]
            if any(t.untyped_storage()._cdata == memory for t in given):
                p.tensor()


def _written(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that a call writes to."""
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out
    if not args or not isinstance(args[0], Tensor) or waits(args[0]):
        return None
    name, at = _name_of(func), _inplace_argument(func)
    inplace = (name.endswith("_") and not name.endswith("__")) or name in _WRITING
    if not inplace and at is not None:
        inplace = bool(kwargs.get("inplace", args[at] if len(args) > at else False))
    return args[0] if inplace else None


_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_WRITING = {f"__i{name}__" for name in _ARITHMETIC}
_WRITING |= {"__setitem__", "__set__", "__delete__"}


def _name_of(func: Callable) -> str:
    return getattr(func, "__name__", "")


@functools.lru_cache(maxsize=4096)
def _inplace_argument(func: Callable) -> int | None:
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # C functions have no signature, and no such argument
        return None
    return names.index("inplace") if "inplace" in names else None
