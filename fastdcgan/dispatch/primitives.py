"""The primitives, each declared once: its signature is the schema, its body the shapes (the fake), a backend the work.

`@_operator()` registers `torch.ops.fastdcgan.NAME` from the annotations: an `Operand`, an `Epilogue`, a `Geometry`
become their fields. The function that it returns calls the backend at once where nobody watches (`unwatched`), and the
registered operator where somebody does. A backend's method of that name takes the same arguments, without `backend`.

Operands, epilogues and the per-channel vectors are described in `spec.py`. Everything here is opaque to `torch.compile`
and knows no autograd: `engine/autograd.py` differentiates.
"""

from __future__ import annotations

import contextlib
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.backends.base import Composites
from fastdcgan.dispatch import router
from fastdcgan.geometry import Geometry, Pair, pair
from fastdcgan.spec import (
    Call,
    Epilogue,
    Operand,
    format_of_torch,
    memory_format,
    says_channels_last,
    stat_dtype,
    strides_in,
    with_strides,
)

_lib = torch.library.Library("fastdcgan", "DEF")

# --- one signature, from which all else follows ----------------------------------------------------------------------

_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", float: "float", int: "SymInt", Pair: "SymInt[2]"}
_Written = Annotated[Tensor, "is written to"]


@functools.cache  # it is asked at every call of an operator, and takes a tenth of a millisecond
def _fields(kind: Any) -> dict[str, Any] | None:
    """The fields of a type that is passed field by field, or None."""
    return typing.get_type_hints(kind) if kind in (Operand, Epilogue, Geometry) else None


def _schema(name: str, kind: Any, written: Iterator[str]) -> list[str]:
    fields = _fields(kind)
    if fields is not None:
        return [text for field, of in fields.items() for text in _schema(f"{name}_{field}", of, written)]
    if typing.get_origin(kind) is Annotated:
        return [f"Tensor({next(written)}!) {name}"]
    return [f"{_SCHEMA[kind]} {name}"]


def _returns(kind: Any) -> str:
    if kind is type(None):
        return "()"
    return "(" + ", ".join("Tensor" for _ in typing.get_args(kind)) + ")" if typing.get_args(kind) else "Tensor"


def _packed(kinds: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The arguments as an operator takes them: field by field."""
    found: list[Any] = []
    for kind, value in zip(kinds, values, strict=True):
        if kind is Geometry:
            found += (value.kernel, value.stride, value.padding, value.dilation, value.groups)
        elif kind is Operand or kind is Epilogue:
            found.extend(value)  # torch 2.11 compiles no list + NamedTuple
        else:
            found.append(value)
    return found


def _unpacked(kinds: Sequence[Any], flat: Sequence[Any]) -> list[Any]:
    """The other way."""
    found, rest = [], iter(flat)
    for kind in kinds:
        fields = _fields(kind)
        if fields is None:
            value = next(rest)
            found.append(pair(tuple(value)) if kind == Pair else value)
        else:
            found.append(kind(*_unpacked(list(fields.values()), [next(rest) for _ in fields])))
    return found


def _operator(
    as_call: Callable[..., Call] | None = None, strides: Callable[..., tuple[int, ...]] | None = None
) -> Callable[[Callable], Callable]:
    """Register an operator by its declaration, whose body makes the outputs' shapes from the inputs'.

    `as_call` makes a contraction's `Call` from the arguments; all else is a method of the backend. `strides`, of its
    first output [N, C, H, W], from the output's shape and the arguments: the body has to say the same.
    """

    def declare(fake: Callable) -> Callable:
        name, hints = fake.__name__, typing.get_type_hints(fake, include_extras=True)
        returns = hints.pop("return")
        kinds, written = list(hints.values()), iter("abc")
        arguments = [text for p, kind in hints.items() for text in _schema(p, kind, written)]
        # Those that say whether anybody watches.
        tensors = [i for i, kind in enumerate(kinds) if kind in (Tensor, _Written, Operand)]

        def run(*args: Any) -> Any:
            if as_call is not None:
                found = router.run(as_call(*args[:-1]), args[-1])
            else:
                found = getattr(backends.get(args[-1]), name)(*args[:-1])
            if strides is None:
                return found
            if isinstance(found, Tensor):
                return with_strides(found, strides(found.shape, *args))
            return with_strides(found[0], strides(found[0].shape, *args)), *found[1:]

        def kernel(*flat: Any) -> Any:
            return _quietly(flat[0], run, *_unpacked(kinds, flat))

        _lib.define(f"{name}({', '.join(arguments)}) -> {_returns(returns)}")
        _lib.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdcgan::{name}", lambda *flat: fake(*_unpacked(kinds, flat)), lib=_lib)

        @functools.wraps(fake)
        def call(*args: Any) -> Any:
            first = [args[i].x if kinds[i] is Operand else args[i] for i in tensors]
            if unwatched(*first):
                return _quietly(first[0], run, *args)
            return getattr(torch.ops.fastdcgan, name)(*_packed(kinds, args))

        return call

    return declare


def _quietly(first: Tensor, function: Callable, *args: Any) -> Any:
    """`function(*args)` on the GPU that `first` is on, where that is not the current one, without autocast: the layer
    has applied it, and inside a primitive the dtypes are what the caller chose."""
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return _quietly(first, function, *args)
    if torch._C._is_any_autocast_enabled():
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)
    return function(*args)


PLAIN: set[type] = {Tensor, torch.nn.Parameter}  # classes of tensors that a backend may get
_watched = False


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside a `with`, primitives run as registered operators, which is how compiled code calls them."""
    global _watched
    before, _watched = _watched, True
    try:
        yield
    finally:
        _watched = before


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nobody watches: no compiler, no dispatch mode, no tensor subclass or meta tensor. A primitive then calls
    its backend at once, without the way through the dispatcher."""
    if _watched or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for t in tensors:  # noqa: SIM110  all() of a generator takes twice as long, on the way of every call
        if t is not None and (t.__class__ not in PLAIN or t.is_meta):
            return False
    return True


# --- the three contractions ------------------------------------------------------------------------------------------


def _conv_strides(shape: Sequence[int], a: Operand, weight: Tensor, *others: Any) -> tuple[int, ...]:
    return strides_in(shape, format_of_torch(says_channels_last(_finished(a)), weight))


def _strides_of(shape: Sequence[int], a: Operand, *others: Any) -> tuple[int, ...]:
    return strides_in(shape, memory_format(_finished(a)))


@_operator(lambda a, weight, g, e: Call("conv", a, weight, g, g.conv_size(*a.x.shape[2:]), e), _conv_strides)
def conv(a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue, backend: str) -> tuple[Tensor, Tensor]:
    """Strided gather: `a` [N, Ci, H, W], weight [Co, Ci/groups, kh, kw] -> [N, Co, H', W'] and the epilogue's vectors.

    The weight has the dtype of `a`, or is float32 where the backend `casts_weights`.
    It is the forward of `Conv2d`, and the gradient of a transposed conv's input (with that conv's own weight).
    """
    size = geometry.conv_size(*a.x.shape[2:])
    shape = (a.x.shape[0], weight.shape[0], *size)
    return _with_vectors(a.x.new_empty_strided(shape, _conv_strides(shape, a, weight)), epilogue)


@_operator(lambda a, weight, g, size, e: Call("conv_transpose", a, weight, g, size, e), _conv_strides)
def conv_transpose(
    a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue, backend: str
) -> tuple[Tensor, Tensor]:
    """Its adjoint: `a` [N, Ci, H, W], weight [Ci, Co/groups, kh, kw] -> [N, Co, *output_size], the epilogue's vectors.

    It is the forward of `ConvTranspose2d`, and the gradient of a plain conv's input (with that conv's own weight).
    """
    shape = (a.x.shape[0], weight.shape[1] * geometry.groups, *output_size)
    return _with_vectors(a.x.new_empty_strided(shape, _conv_strides(shape, a, weight)), epilogue)


@_operator(lambda gathered, linear, g: Call("weight_grad", gathered, linear, g, g.kernel), _strides_of)
def weight_grad(gathered: Operand, linear: Operand, geometry: Geometry, backend: str) -> Tensor:
    """Reduction over pixels: `gathered` [N, Cg, H, W], `linear` [N, Cl, H', W'] -> [Cl, Cg/groups, kh, kw].

    `gathered` is the side that the taps shift over: the input of a conv, or the output gradient of a transposed conv.
    """
    shape = (linear.x.shape[1], gathered.x.shape[1] // geometry.groups, *geometry.kernel)
    return gathered.x.new_empty_strided(shape, _strides_of(shape, gathered))


def _finished(a: Operand) -> Tensor:
    """A tensor with the shape, dtype and memory format that an operand has once it is computed."""
    return a.x if a.y is None else a.y


def _with_vectors(out: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    if epilogue.kind == "stats":
        rows = 3
    elif epilogue.kind == "grad_stats":
        assert epilogue.coef is not None
        rows = epilogue.coef.shape[0] // 2
    else:
        return out, out.new_empty((0,), dtype=stat_dtype(out))
    return out, out.new_empty((rows, epilogue.stat_groups, out.shape[1]), dtype=stat_dtype(out))


# --- normalisation and activation ------------------------------------------------------------------------------------


@_operator(strides=_strides_of)
def norm_act(a: Operand, backend: str) -> Tensor:
    """The operand computed and stored: activation forward, or `dy` of the backward.

    [N, C, H, W] in the dtype and memory format of the raw output: `a.x`, or `a.y` where that is given.
    """
    y = _finished(a)
    return y.new_empty_strided(y.shape, _strides_of(y.shape, a))


@_operator()
def batch_stats(y: Tensor, stat_groups: int, backend: str) -> Tensor:
    """`stats` [3, stat_groups, C] of a raw output [N, C, H, W] that no contraction gave."""
    return y.new_empty((3, stat_groups, y.shape[1]), dtype=stat_dtype(y))


@_operator()
def norm_act_reduce(da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float, backend: str) -> Tensor:
    """`sums` of `g = da*act'(s*y + t)`: the reduction of the BN backward, [1 to 3, stat_groups, C]."""
    return coef.new_empty(((coef.shape[0] + 1) // 2, coef.shape[1], coef.shape[2]))


@_operator()
def coefficients(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """`coef` [4, stat_groups, C] of a normalisation: `mean = mean - shift`, `s = weight*rstd`, `t = bias - mean*s`.

    `mean`, `var` are [stat_groups, C]; `weight`, `bias` (BN's) and `shift` (a conv bias that the raw output lacks while
    `mean` has it, i.e. with running statistics) are [C] or None. The coef has the shifted mean, that of the raw output.
    """
    return mean.new_empty((4, *mean.shape), dtype=stat_dtype(mean))


@_operator()
def grad_coefficients(sums: Tensor, coef: Tensor, count: int, backend: str) -> Tensor:
    """`grad_coef` [4, stat_groups, C] from `sums` over `count` values M.

    `p = -s*rstd*sum(g*xhat)/M`, `q = -s*sum(g)/M - p*mean`.
    """
    return torch.empty_like(coef)


@_operator()
def update_running(
    mean: _Written,
    var: _Written,
    stats: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    momentum: float,
    backend: str,
) -> None:
    """Update running statistics [C] in place from `stats`, once per statistics group (`Backend.update_running`)."""


# --- all of them, as a chain calls them ------------------------------------------------------------------------------


class Registered(Composites):
    """The primitives of a backend by way of the registered operators, for where somebody watches."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def contract(self, call: Call) -> Any:
        if call.op == "conv":
            return conv(call.a, call.b, call.geometry, call.epilogue, self.backend)
        if call.op == "conv_transpose":
            return conv_transpose(call.a, call.b, call.geometry, call.size, call.epilogue, self.backend)
        return weight_grad(call.a, call.b, call.geometry, self.backend)

    def norm_act(self, a: Operand) -> Tensor:
        return norm_act(a, self.backend)

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        return batch_stats(y, stat_groups, self.backend)

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        return norm_act_reduce(da, y, coef, act, slope, self.backend)

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        return coefficients(mean, var, weight, bias, shift, eps, self.backend)

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: int) -> Tensor:
        return grad_coefficients(sums, coef, count, self.backend)

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        update_running(mean, var, stats, shift, factor, momentum, self.backend)
