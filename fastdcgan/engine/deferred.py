"""Blocks in code of a model's own: convolutions that its forward calls wait for what comes after them.

While `Deferring` is entered, a convolution computes nothing. It gives a `Pending`, which a batch normalisation, an
activation or another convolution continues; whatever else touches it makes it a tensor: the chain runs, by the plan
and the choice that a Sequential's chain has. A normalisation of a tensor that is there waits too, but none without a
weight: as a rule that is followed by a modulation, and by no activation. All else, control flow included, runs as it
always does. So nothing is traced and nothing has to be guarded; what is in a ModuleList, or calls
`torch.nn.functional`, is found as well.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan.activations import ACTIVATIONS, find
from fastdcgan.dispatch import primitives
from fastdcgan.engine import chain, forwards, reordered, upsampling
from fastdcgan.engine.pending import (
    Pending,
    Step,
    Waiting,
    compute,
    compute_before_compiled_code,
    computed,
    cost_of,
    hooks_up_to,
    key_of,
    state_of,
    waits,
)
from fastdcgan.engine.place import Kept, local, place
from fastdcgan.engine.planned import autocast_dtype, followed
from fastdcgan.engine.run import runs_plain
from fastdcgan.geometry import IDENTITY, Geometry, Pair
from fastdcgan.spec import Block, BlockTensors, Norm, Running

# --- the functions that it knows -------------------------------------------------------------------------------------

# Each gets the mode and what the function was called with. None: it is none of a block, and runs as it does.
_HANDLERS: dict[Callable, Callable[..., Pending | None]] = {}


def _open(mode: Deferring, x: Any, upsampled: bool = False) -> Step | None:
    """What `x` is the output of, if that waits and may be continued: what is `upsampled`, by a convolution alone."""
    if not waits(x) or x.step.mode is not mode or state_of(x.step.x) != x.step.state:
        return None
    if x.step.done and x.step.value is None:  # a debugger goes on from what was of no further use
        return None
    return x.step if upsampled or not x.step.upsamples else None


def _numbers(value: Any, least: int) -> Pair | None:
    """A stride, say, as a pair; None for what is wrong, or nothing to plan with."""
    values = [_known(v) for v in (value if isinstance(value, (tuple, list)) else (value,))]
    if len(values) not in (1, 2) or not all(type(v) is int and v >= least for v in values):
        return None
    return values[0], values[-1]


def _known(number: Any) -> Any:
    """A number that a compiler may have made a symbol of."""
    kind = {torch.SymInt: int, torch.SymFloat: float}.get(type(number))
    return number if kind is None else kind(number)


def _same(size: Any, stride: Any, dilation: Any) -> Any:
    """The padding "same" in numbers, where it has as much on both sides."""
    if dilation is None or stride != (1, 1):
        return None
    around = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
    return [a // 2 for a in around] if all(a % 2 == 0 for a in around) else None


def _convolved(
    mode: Deferring, call: Callable[[Tensor], Tensor], transposed: bool, x: Any, weight: Any, bias: Any, stride: Any,
    padding: Any, output_padding: Any, groups: int, dilation: Any,
) -> Pending | None:  # fmt: skip
    parent = _open(mode, x, upsampled=True)
    compute((weight, bias) if parent is not None else (x, weight, bias))
    if mode.traced:
        weight, bias, x = computed(weight), computed(bias), x if parent is not None else computed(x)
    root, groups = x if parent is None else parent.x, _known(groups)
    if (
        not _fits(mode, root, weight, bias)
        or weight.dim() != 4
        or not weight.numel()
        or type(groups) is not int
        or groups < 1
        or weight.shape[0] % groups
    ):
        return None
    stride, dilation = _numbers(stride, 1), _numbers(dilation, 1)
    if isinstance(padding, str):
        padding = 0 if padding == "valid" else _same(weight.shape[2:], stride, dilation)
    numbers = (tuple(weight.shape[2:]), stride, _numbers(padding, 0), dilation, _numbers(output_padding, 0))
    if None in numbers or not all(e < s for e, s in zip(numbers[4], stride, strict=True)):  # type: ignore[arg-type]
        return None
    geometry = Geometry(*numbers[:4], groups)  # type: ignore[arg-type]
    upsamples = parent is not None and parent.upsamples
    if upsamples and (transposed or geometry.of_upsampled() is None):
        compute(x)
        given = (weight, bias, stride, padding, output_padding, groups, dilation)
        return _convolved(mode, call, transposed, computed(x), *given)
    shape = root.shape if parent is None else parent.shape
    inputs, outputs = weight.shape[0], weight.shape[1] * groups
    if not transposed:
        inputs, outputs = outputs, inputs
    if shape[1] != inputs or (bias is not None and bias.shape != (outputs,)):
        return None

    def blocks(before: tuple[Block, ...]) -> tuple[Block, ...]:
        block = Block(transposed, geometry, extra, None, "identity", 0.0, "")
        return (*before, block.upsampling() if upsamples else block)

    extra: Pair = numbers[4]  # type: ignore[assignment]
    key = key_of(0 if parent is None else parent.key, (transposed, numbers, groups, upsamples), blocks)
    height, width = shape[2:]
    size = geometry.conv_size(height, width)
    if transposed:
        size = geometry.conv_transpose_size(height, width, extra)
    if min(size) < 1:
        return None
    step = Step(mode, parent, root, call)
    step.key, step.begins, step.shape = key, True, torch.Size((shape[0], outputs, *size))
    step.tensors += (BlockTensors(weight, bias),)
    step.running += (None,)
    return Pending(step)


def _fits(mode: Deferring, x: Any, *others: Any) -> bool:
    """Whether a block can be of these; else PyTorch's function runs, and says what is wrong."""
    given = [t for t in (x, *others) if t is not None]
    if (
        not all(isinstance(t, Tensor) for t in given)
        or not (mode.traced or primitives.unwatched(*given))
        or followed(x)
    ):
        return False
    if x.dim() != 4 or not x.numel() or runs_plain(x):
        return False
    casts = autocast_dtype(x) is not None and x.dtype != torch.float64
    return all(
        t.device == x.device and t.is_floating_point() and (t.dtype == x.dtype or (casts and t.dtype != torch.float64))
        for t in given
    )


def _conv2d(
    function: Callable, mode: Deferring, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Pending | None:  # fmt: skip
    def call(x: Tensor) -> Tensor:
        return function(x, weight, bias, stride, padding, dilation, groups)

    return _convolved(mode, call, False, input, weight, bias, stride, padding, 0, groups, dilation)


def _conv_transpose2d(
    function: Callable, mode: Deferring, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Pending | None:  # fmt: skip
    def call(x: Tensor) -> Tensor:
        return function(x, weight, bias, stride, padding, output_padding, groups, dilation)

    return _convolved(mode, call, True, input, weight, bias, stride, padding, output_padding, groups, dilation)


def _interpolate(
    waiting: Deferring, input: Any, size: Any = None, scale_factor: Any = None, mode: Any = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: Any = False,
) -> Pending | None:  # fmt: skip
    def call(x: Tensor) -> Tensor:
        return F.interpolate(x, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)

    parent = _open(waiting, input)
    root = input if parent is None else parent.x
    if antialias or waits(root) or not _fits(waiting, root, root, None):
        return None
    shape = root.shape if parent is None else parent.shape
    twice = (2 * shape[2], 2 * shape[3])
    if size is None:
        doubles = upsampling.doubles(scale_factor, mode, align_corners)
    else:
        given = isinstance(size, (tuple, list)) and tuple(size) == twice and scale_factor is None
        doubles = given and not recompute_scale_factor and upsampling.doubles(2, mode, align_corners)
    if not doubles:
        return None
    step = Step(waiting, parent, root, call)
    step.key, step.upsamples, step.shape = 0 if parent is None else parent.key, True, torch.Size((*shape[:2], *twice))
    return Pending(step)


def _batch_norm(
    function: Callable, mode: Deferring, input: Any, running_mean: Any, running_var: Any, weight: Any = None,
    bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Pending | None:  # fmt: skip
    def call(x: Tensor) -> Tensor:
        return function(x, running_mean, running_var, weight, bias, training, momentum, eps)

    return _normalised(mode, input, (weight, bias, running_mean, running_var), training, False, momentum, eps, call)


def _instance_norm(
    function: Callable, mode: Deferring, input: Any, running_mean: Any = None, running_var: Any = None,
    weight: Any = None, bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Pending | None:  # fmt: skip
    def call(x: Tensor) -> Tensor:
        return function(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    vectors, own = (weight, bias, running_mean, running_var), use_input_stats
    return _normalised(mode, input, vectors, own, own, momentum, eps, call)


def _normalised(
    mode: Deferring, x: Any, vectors: tuple, own: bool, instance: bool, momentum: float, eps: float,
    call: Callable[[Tensor], Tensor],
) -> Pending | None:  # fmt: skip
    """`vectors`: weight, bias, running mean and variance; `own`: whether it uses the statistics of its input."""
    (mean, var), momentum, eps = vectors[2:], _known(momentum), _known(eps)
    compute(vectors)
    mode.compute_owed(vectors)
    if own and isinstance(mean, Tensor) and isinstance(var, Tensor):
        mode.compute_what_reads(mean)
        mode.compute_what_reads(var)
    parent = _open(mode, x)
    begins = parent is None or parent.block.norm is not None or parent.block.act != "identity"
    if parent is None:
        compute((x,))
        x = computed(x) if mode.traced else x
        if vectors[0] is None or not _fits(mode, x) or autocast_dtype(x) not in (None, x.dtype):
            return None
        root, shape, state = x, x.shape, state_of(x)
    else:
        root, shape, state = parent.x, parent.shape, parent.state
        if begins and ACTIVATIONS[parent.block.act].float32_under_autocast:
            return None
    wrong = any(t is not None and not _goes_with(t, root, shape, state) for t in vectors)
    if wrong or len({t.dtype for t in vectors if t is not None}) > 1 or (mean is None) != (var is None):
        return None
    values = shape[2] * shape[3] * (1 if instance else shape[0])
    if values == 1 if own else mean is None:
        return None
    if type(momentum) not in (int, float) or type(eps) not in (int, float) or eps <= 0:
        return None
    norm = Norm(eps, bool(own), instance=bool(instance))

    def blocks(before: tuple[Block, ...]) -> tuple[Block, ...]:
        if begins:
            return (*before, Block(False, IDENTITY, (0, 0), norm, "identity", 0.0, "", convolves=False))
        return (*before[:-1], replace(before[-1], norm=norm))

    step = Step(mode, parent, root, call)
    step.key, step.begins, step.shape = (
        key_of(0 if parent is None else parent.key, (norm, begins), blocks),
        begins,
        shape,
    )
    if begins:
        step.tensors += (BlockTensors(),)
        step.running += (None,)
    step.tensors = (*step.tensors[:-1], BlockTensors(*step.tensors[-1][:2], *vectors))
    if own and mean is not None:
        step.running = (*step.running[:-1], Running(mean, var, momentum))
        mode.owed[id(mean)] = mode.owed[id(var)] = step
    return Pending(step)


def _goes_with(t: Any, root: Tensor, shape: torch.Size, state: tuple) -> bool:
    """Whether a norm's vector is one for its input: of a `shape`, and made of `root` in a `state`."""
    if not isinstance(t, Tensor) or t.shape != shape[1:2] or t.device != root.device:
        return False
    dtype = state[3] if state[2] and root.dtype != torch.float64 else root.dtype
    return t.dtype == dtype or (t.dtype == torch.float32 and dtype.itemsize == 2)


def _activated(
    mode: Deferring, x: Any, name: str, slope: float, inplace: bool, call: Callable[[Tensor], Tensor]
) -> Pending | None:
    parent = _open(mode, x)
    if parent is None or parent.block.act != "identity" or (inplace and parent.uses):
        return None
    step = Step(mode, parent, parent.x, call)
    step.key = key_of(
        parent.key, (name, slope, inplace), lambda b: (*b[:-1], replace(b[-1], act=name, slope=slope, inplace=inplace))
    )
    if not inplace:
        return Pending(step)
    x.step, step.output, parent.output = step, parent.output, step.output  # the very object is what it became
    return x


def _prelu(function: Callable, mode: Deferring, input: Any, weight: Any) -> Pending | None:
    compute((weight,))
    parent = _open(mode, input)
    if parent is None or parent.block.act != "identity":
        return None
    if not isinstance(weight, Tensor) or tuple(weight.shape) not in ((1,), parent.shape[1:2]):
        return None
    if weight.device != parent.x.device or not (parent.state[2] or weight.dtype == parent.x.dtype):
        return None
    step = Step(mode, parent, parent.x, lambda x: function(x, weight))
    step.key = key_of(parent.key, ("prelu",), lambda b: (*b[:-1], replace(b[-1], act="leaky_relu", learns_slope=True)))
    step.tensors = (*parent.tensors[:-1], parent.tensors[-1]._replace(slope=weight))
    return Pending(step)


def _told(function: Callable, tell: Callable[..., Any]) -> None:
    """What can be told of an output without computing it."""
    _HANDLERS[function] = lambda mode, x, *args, **kwargs: tell(x.step, *args, **kwargs) if waits(x) else None


def _knows(module: type[nn.Module], *functions: Callable) -> None:
    """An activation's functions, which take the input and then the arguments that its module takes."""
    defaults = {name: p.default for name, p in inspect.signature(module).parameters.items()}

    def handler(function: Callable, mode: Deferring, input: Any, *args: Any, **kwargs: Any) -> Pending | None:
        given = dict(zip(defaults, map(_known, args), strict=False)) | {name: _known(v) for name, v in kwargs.items()}
        if not waits(input) or len(args) > len(defaults) or not given.keys() <= defaults.keys():
            return None
        found = find(module, defaults | given)
        if found is None:
            return None
        inplace = bool(given.get("inplace", False)) or function.__name__.endswith("_")
        return _activated(mode, input, *found, inplace, lambda x: function(x, *args, **kwargs))

    for function in functions:
        _HANDLERS[function] = functools.partial(handler, function)


_HANDLERS[torch.conv2d] = functools.partial(_conv2d, torch.conv2d)
_HANDLERS[torch.conv_transpose2d] = functools.partial(_conv_transpose2d, torch.conv_transpose2d)
_HANDLERS[F.interpolate] = _interpolate
_HANDLERS[F.batch_norm] = functools.partial(_batch_norm, F.batch_norm)
_HANDLERS[F.instance_norm] = functools.partial(_instance_norm, F.instance_norm)
_HANDLERS[F.prelu] = functools.partial(_prelu, F.prelu)
_HANDLERS[Tensor.prelu] = functools.partial(_prelu, Tensor.prelu)
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
_told(Tensor.dim, lambda step: 4)
_told(Tensor.size, lambda step, dim=None: step.shape if dim is None else step.shape[dim])
_told(Tensor.ndim.__get__, lambda step: 4)  # type: ignore[attr-defined]
_told(Tensor.shape.__get__, lambda step: step.shape)  # type: ignore[attr-defined]
# Not its device: by asking for that, torch.utils.checkpoint gets a tensor before it saves it from C++.


# --- a forward of a module's own -------------------------------------------------------------------------------------

_MOST_CALLS = 256  # of a module, by shape and mode


def deferring(forward: Callable) -> Callable:
    """A module's forward whose convolutions wait for what comes after them."""

    def fused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        before, here = local.inside, place()
        # What calls it may wait itself.
        if before == here or forwards.is_followed(args[0] if args else None):
            return forward(self, *args, **kwargs)
        glance, reorders = forwards.glance(self, args, kwargs), reordered.is_on()
        plain = self.__dict__.setdefault("_plain_calls", PlainCalls())
        local.inside = here
        try:
            if glance in plain and not reorders and chain.recorder is None:
                return forward(self, *args, **kwargs)
            compute_before_compiled_code()
            recorded = len(chain.recorder or ())
            with Deferring() as mode:
                out = forward(self, *args, **kwargs)
            too_little = glance is not None and not reorders and chain.fuses_too_little(mode.gain, mode.cost, recorded)
        finally:
            local.inside = before
        if too_little:
            if len(plain) >= _MOST_CALLS:
                plain.clear()
            plain.add(glance)
        return out

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        undecided = not torch.compiler.is_compiling() and local.inside is not None and not local.within
        if undecided and local.inside == place():  # what calls it waits
            return forward(self, *args, **kwargs)
        return forwards.run(self, forward, fused, args, kwargs)

    return run


class PlainCalls(Kept, set):
    """Calls that PyTorch's functions run fastest, by what was measured of their chains and of waiting."""


# --- the mode --------------------------------------------------------------------------------------------------------


class Deferring(Waiting):
    """While it is entered, convolutions wait for what comes after them."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() and not self.traced:  # a part of the forward, which gets graphs of its own
            return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None and place() == self.place:
            with torch._C.DisableTorchFunctionSubclass():
                found = handler(self, *args, **kwargs)
            if found is not None:
                self.waited += 1
                return found
        self.passed += 1
        if self.waiting or self.owed:
            with torch._C.DisableTorchFunctionSubclass():
                given = compute((args, kwargs))
                self.compute_owed(given)
                if _writes(func, args, kwargs):
                    for t in given:
                        self.compute_what_reads(t)
            if self.traced:
                args, kwargs = computed((args, kwargs))
        return func(*args, **kwargs)

    def cost(self) -> float:
        """Milliseconds of all that it did so far, beside what the chains took."""
        waiting, passing = cost_of(type(self))  # type: ignore[arg-type]  # a class has a hash
        return self.waited * waiting + self.passed * passing

    def __exit__(self, kind: Any, *others: Any) -> None:
        super().__exit__(kind, *others)
        # A checkpoint that has what it needs leaves by an exception, and takes no more.
        with contextlib.nullcontext() if kind is None else hooks_up_to(None):
            self.compute_all()


def _writes(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call may write to what it is given, or hand out its memory to who does."""
    if kwargs.get("out") is not None:
        return True
    writes = _way_to_write(func)
    if isinstance(writes, bool):
        return writes
    return bool(kwargs.get("inplace", args[writes] if len(args) > writes else False))


_OPERATORS = ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift"]
_OPERATORS += ["rshift"]
_WRITING = {f"__i{name}__" for name in _OPERATORS}
_WRITING |= {"__setitem__", "__set__", "__delete__", "batch_norm", "instance_norm"}
_WRITING |= {"numpy", "data_ptr", "untyped_storage", "__array__", "__dlpack__"}


@functools.lru_cache(maxsize=4096)
def _way_to_write(func: Callable) -> bool | int:
    """Whether a function writes, or which of its arguments says so."""
    name = getattr(func, "__name__", "")
    if name in _WRITING or (name.endswith("_") and not name.endswith("__")):
        return True
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # C functions have no signature, and no such argument
        return False
    return names.index("inplace") if "inplace" in names else False
