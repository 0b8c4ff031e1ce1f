"""Forwards that get contiguous tensors and run in channels_last, where that is faster and nobody can tell.

Code around a chain may call `view`, say, which goes by the strides that plain modules give. So each chain of a
contiguous network would convert what it gets and what it gives. Where it was measured to be faster (`forwards.py`) the
outermost forward keeps channels_last between them: what it computes are `Reordered` tensors, and whatever doesn't keep
the format of its input, or gives a view of it, first makes them contiguous.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as _without_transforms

from fastdcgan.dispatch import primitives
from fastdcgan.engine.place import local, place
from fastdcgan.spec import says_channels_last, strides_in

# Functions, by their names in torch, torch.Tensor and torch.nn.functional, that keep the format of a tensor, give no
# view of it, and draw no random number for each of its values: these would come in another order.
_KEEPING = """
    conv2d conv_transpose2d batch_norm instance_norm group_norm interpolate pad dropout2d feature_dropout pixel_shuffle
    pixel_unshuffle max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d cat concat clone to float half
    bfloat16 type_as relu leaky_relu prelu elu selu celu gelu silu mish relu6 hardtanh hardswish hardsigmoid tanh
    sigmoid softplus logsigmoid softsign glu tanhshrink threshold add sub rsub mul div true_divide neg abs exp log sqrt
    rsqrt square pow clamp clip minimum maximum lerp addcmul addcdiv where mean sum var std
    __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__
    __itruediv__ __neg__ __pow__
"""
# Functions and attributes that tell nothing of the format.
_TELLING = "size dim numel nelement is_floating_point is_complex is_inference element_size get_device __len__ __hash__"
_ATTRIBUTES = """
    shape ndim dtype device layout requires_grad grad_fn is_leaf is_cpu is_cuda is_meta is_sparse is_mkldnn is_nested
    is_quantized itemsize nbytes retains_grad output_nr _version
"""
_KEEPS, _TELLS, _TOLD = (frozenset(names.split()) for names in (_KEEPING, _TELLING, _ATTRIBUTES))


class Reordered(Tensor):
    """A tensor in channels_last that has to be contiguous for whoever asks for its format."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            keeps = tells_nothing = getattr(func, "__self__", func).__name__ in _TOLD
        else:
            tells_nothing = name in _TELLS
            keeps = tells_nothing or (
                is_on()
                and (name.rstrip("_") if name[-2:] != "__" else name) in _KEEPS
                and kwargs.get("memory_format") is kwargs.get("out") is None
            )
        if keeps and name in ("conv2d", "conv_transpose2d"):
            keeps = not _is_channels_last(kwargs.get("weight", args[1] if len(args) > 1 else None))
        if not keeps or not all(issubclass(kind, (nn.Parameter, Reordered)) or kind is Tensor for kind in types):
            make_contiguous((args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if tells_nothing:
                return func(*args, **kwargs)
            if name in ("conv2d", "conv_transpose2d"):
                args, kwargs = _with_own_weight(*args, **kwargs)
            return reorder(func(*args, **kwargs))


primitives.PLAIN.add(Reordered)
_NOTHING = contextlib.nullcontext()


def is_on() -> bool:
    """Whether the forward that runs now, and nothing within it that may be called again, is kept in channels_last."""
    return local.reordering is not None and local.reordering == place()


def entered(x: Tensor, weights: Iterable[Tensor | None]) -> Tensor:
    """`x` [N, C, H, W] as a chain gets it whose convolutions have these `weights`: in channels_last where the forward
    is, unless one of them is channels_last, with which plain modules go on in that anyway."""
    if torch.compiler.is_compiling():
        return x
    reorders = is_on()
    if not reorders and type(x) is not Reordered:
        return x
    found = [w for w in weights if w is not None]
    reorders = reorders and not any(map(_is_channels_last, found))
    if type(x) is Reordered:
        if not reorders:
            make_contiguous(x)
        return x
    if not reorders or not found or type(x) is not Tensor or x.dim() != 4 or not _may_become_channels_last(x):
        return x
    return reorder(_InFormat.apply(x, torch.channels_last))


def as_a_tensor(x: Tensor) -> contextlib.AbstractContextManager:
    """Inside a `with`, `x` is as any tensor."""
    return torch._C.DisableTorchFunctionSubclass() if type(x) is Reordered else _NOTHING


def like(made: Tensor, x: Tensor) -> Tensor:
    """What was computed of `x`, as `Reordered` as that is."""
    return reorder(made) if type(x) is Reordered else made


def own_weight(weight: Tensor, x: Tensor) -> Tensor:
    """The weight of a convolution of `x`, whose gradient will be contiguous, as it is for a contiguous input."""
    if type(x) is not Reordered or not weight.requires_grad or not torch.is_grad_enabled():
        return weight
    return _WithContiguousGradient.apply(weight)


def make_contiguous(values: Any) -> None:
    """Make each `Reordered` among the values what it would have been, the very object."""
    if type(values) is Reordered:
        transformed = torch._C._are_functorch_transforms_active()
        with torch._C.DisableTorchFunctionSubclass(), _without_transforms() if transformed else _NOTHING:
            values.__class__ = Tensor  # type: ignore[assignment]
            values.data = in_format(values.detach(), torch.contiguous_format)
    elif isinstance(values, dict):
        make_contiguous([*values.values()])
    elif dataclasses.is_dataclass(values):
        make_contiguous([*vars(values).values()])
    elif isinstance(values, (tuple, list)):
        for value in values:
            make_contiguous(value)


def make_all_contiguous() -> None:
    """All that there is of the forward that runs now: before code gets them that asks no `__torch_function__`."""
    for reference in local.made:
        make_contiguous(reference())


def in_format(x: Tensor, format: torch.memory_format) -> Tensor:
    """A copy of `x` [N, C, H, W] in a format, with the strides of that where they are ambiguous."""
    return x.new_empty_strided(x.shape, strides_in(x.shape, format)).copy_(x)


def through_contiguous(x: Tensor, weights: Sequence[Tensor | None], call: Callable[..., Tensor]) -> Tensor:
    """`call(x, weights)` of `x` in channels_last with all of them contiguous, its output in channels_last."""
    format = torch.contiguous_format
    contiguous = [t if t is None or t.is_contiguous() else _InFormat.apply(t, format) for t in (x, *weights)]
    return _InFormat.apply(call(contiguous[0], contiguous[1:]), torch.channels_last)


def _is_channels_last(weight: Tensor | None) -> bool:
    return weight is not None and weight.dim() == 4 and says_channels_last(weight)


def _may_become_channels_last(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() > 0 and x.is_contiguous() and not says_channels_last(x)


def reorder(made: Any) -> Any:
    """What a function gave."""
    if isinstance(made, (tuple, list)):
        for value in made:
            reorder(value)
    elif type(made) is Tensor and made.dim() == 4 and says_channels_last(made):
        made.__class__ = Reordered
        local.made.append(weakref.ref(made))
    return made


def _with_own_weight(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    return (input, own_weight(weight, input), *args), kwargs


class _InFormat(torch.autograd.Function):
    """`in_format`, and a gradient in the format that the input has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: torch.memory_format) -> Tensor:
        ctx.format = torch.channels_last if says_channels_last(x) else torch.contiguous_format
        return in_format(x, format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return in_format(grad, ctx.format), None


class _WithContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        right = strides_in(grad.shape, torch.contiguous_format)
        return grad if grad.stride() == right else in_format(grad, torch.contiguous_format)
