"""The primitives: what they take, their `torch.library` schemas and fakes. A backend does the work.

Operands, epilogues and the per-channel vectors are described in `backends/base.py`.

Everything here is opaque to `torch.compile` and knows no autograd; `chain.py` differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.backends.base import Backend
from fastdcgan.geometry import Geometry, Pair, pair
from fastdcgan.spec import Epilogue, Operand, Update, stat_dtype

# --- schemas ---------------------------------------------------------------------------------------------------------

_lib = torch.library.Library("fastdcgan", "DEF")

_GEOMETRY = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int groups"
_EPILOGUE = "str epilogue, Tensor? e_y, Tensor? e_coef, str e_act, float e_slope, int stat_groups"


def _operand_schema(name: str) -> str:
    return f"Tensor {name}, Tensor? {name}_y, Tensor? {name}_coef, str {name}_act, float {name}_slope"


def _define(signature: str, implementation: Callable, fake: Callable) -> None:
    name = signature.split("(")[0]

    _lib.define(signature)
    _lib.impl(name, lambda *args: _call(implementation, *args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdcgan::{name}", fake, lib=_lib)


def _call(function: Callable, *args):
    """`function(*args)` on the GPU that the first argument is on, where that is not the current one, without autocast:
    the layer has applied it, and inside a primitive the dtypes are what the caller chose."""
    first = args[0]
    if first.__class__ is Operand:
        first = first.x
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return _call(function, *args)
    if torch._C._is_any_autocast_enabled():
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)
    return function(*args)


_PLAIN = (Tensor, torch.nn.Parameter)


def unwatched(*tensors: Tensor) -> bool:
    """Whether nobody watches: no compiler, no dispatch mode, no tensor subclass or meta tensor. A primitive then calls
    its backend at once, without the way through the dispatcher."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for t in tensors:  # noqa: SIM110  all() of a generator takes twice as long, on the way of every call
        if t.__class__ not in _PLAIN or t.is_meta:
            return False
    return True


def _geometry(args: tuple) -> Geometry:
    kernel, stride, padding, dilation, groups = args
    return Geometry(pair(kernel), pair(stride), pair(padding), pair(dilation), groups)


# --- the three contractions ------------------------------------------------------------------------------------------


def conv(a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue, backend: str) -> tuple[Tensor, Tensor]:
    """Strided gather: `a` [N, Ci, H, W], weight [Co, Ci/groups, kh, kw] -> [N, Co, H', W'] and the epilogue's vectors.

    The weight has the dtype of `a`, or is float32 where the backend `casts_weights`.
    It is the forward of `Conv2d`, and the gradient of a transposed conv's input (with that conv's own weight).
    """
    if unwatched(a.x, weight):
        return _call(backends.get(backend).conv, a, weight, geometry, epilogue)
    return torch.ops.fastdcgan.conv(
        *a, weight, geometry.stride, geometry.padding, geometry.dilation, geometry.groups, *epilogue, backend
    )


def conv_transpose(
    a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue, backend: str
) -> tuple[Tensor, Tensor]:
    """Its adjoint: `a` [N, Ci, H, W], weight [Ci, Co/groups, kh, kw] -> [N, Co, *output_size], the epilogue's vectors.

    It is the forward of `ConvTranspose2d`, and the gradient of a plain conv's input (with that conv's own weight).
    """
    if unwatched(a.x, weight):
        return _call(backends.get(backend).conv_transpose, a, weight, geometry, output_size, epilogue)
    return torch.ops.fastdcgan.conv_transpose(
        *a,
        weight,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        output_size,
        *epilogue,
        backend,
    )


def weight_grad(gathered: Operand, linear: Operand, geometry: Geometry, backend: str) -> Tensor:
    """Reduction over pixels: `gathered` [N, Cg, H, W], `linear` [N, Cl, H', W'] -> [Cl, Cg/groups, kh, kw].

    `gathered` is the side that the taps shift over: the input of a conv, or the output gradient of a transposed conv.
    """
    if unwatched(gathered.x, linear.x):
        return _call(backends.get(backend).weight_grad, gathered, linear, geometry)
    g = geometry
    return torch.ops.fastdcgan.weight_grad(
        *gathered, *linear, g.kernel, g.stride, g.padding, g.dilation, g.groups, backend
    )


def _weight_geometry(weight: Tensor, args: tuple) -> Geometry:
    stride, padding, dilation, groups = args
    return Geometry(pair(weight.shape[2:]), pair(stride), pair(padding), pair(dilation), groups)


def _conv(*args) -> tuple[Tensor, Tensor]:
    a, weight, epilogue = Operand(*args[:5]), args[5], Epilogue(*args[10:16])
    return backends.get(args[16]).conv(a, weight, _weight_geometry(weight, args[6:10]), epilogue)


def _conv_transpose(*args) -> tuple[Tensor, Tensor]:
    a, weight, epilogue = Operand(*args[:5]), args[5], Epilogue(*args[11:17])
    geometry, output_size = _weight_geometry(weight, args[6:10]), pair(args[10])
    return backends.get(args[17]).conv_transpose(a, weight, geometry, output_size, epilogue)


def _weight_grad(*args) -> Tensor:
    gathered, linear = Operand(*args[:5]), Operand(*args[5:10])
    return backends.get(args[15]).weight_grad(gathered, linear, _geometry(args[10:15]))


def _finished(x: Tensor, y: Tensor | None, *rest) -> Tensor:
    """A tensor with the shape, dtype and memory format that an operand has once it is computed."""
    return x if y is None else y


def _fake_epilogue(out: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    if epilogue.kind == "stats":
        rows = 3
    elif epilogue.kind == "grad_stats":
        assert epilogue.coef is not None
        rows = epilogue.coef.shape[0] // 2
    else:
        return out, out.new_empty((0,), dtype=stat_dtype(out))
    return out, out.new_empty((rows, epilogue.stat_groups, out.shape[1]), dtype=stat_dtype(out))


def _fake_conv(*args) -> tuple[Tensor, Tensor]:
    out = torch.ops.aten.convolution(_finished(*args[:2]), args[5], None, *args[6:9], False, [0, 0], args[9])
    return _fake_epilogue(out, Epilogue(*args[10:16]))


def _fake_conv_transpose(*args) -> tuple[Tensor, Tensor]:
    x, weight = _finished(*args[:2]), args[5]
    extra = _weight_geometry(weight, args[6:10]).output_padding(x.shape[2], x.shape[3], args[10])
    out = torch.ops.aten.convolution(x, weight, None, *args[6:9], True, extra, args[9])
    return _fake_epilogue(out, Epilogue(*args[11:17]))


def _fake_weight_grad(*args) -> Tensor:
    gathered, linear, kernel, groups = _finished(*args[:2]), args[5], args[10], args[14]
    out = gathered.new_empty((linear.shape[1], gathered.shape[1] // groups, *kernel))
    return out.contiguous(memory_format=backends.memory_format(gathered))


_define(
    f"conv({_operand_schema('x')}, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    f"{_EPILOGUE}, str backend) -> (Tensor, Tensor)",
    _conv,
    _fake_conv,
)
_define(
    f"conv_transpose({_operand_schema('x')}, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
    f"int groups, SymInt[2] output_size, {_EPILOGUE}, str backend) -> (Tensor, Tensor)",
    _conv_transpose,
    _fake_conv_transpose,
)
_define(
    f"weight_grad({_operand_schema('gathered')}, {_operand_schema('linear')}, {_GEOMETRY}, str backend) -> Tensor",
    _weight_grad,
    _fake_weight_grad,
)

# --- normalisation and activation ------------------------------------------------------------------------------------


def norm_act(a: Operand, backend: str, overwrite: bool = False) -> Tensor:
    """The operand computed and stored: activation forward, or `dy` of the backward.

    [N, C, H, W] in the dtype and memory format of the raw output: `a.x`, or `a.y` where that is given. With `overwrite`
    it may take the place of `a.x`, which then nobody else may hold.
    """
    if unwatched(a.x):
        runs = backends.get(backend)
        return _call(runs.norm_act_ if overwrite else runs.norm_act, a)
    return torch.ops.fastdcgan.norm_act(*a, backend)


def norm_act_reduce(da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float, backend: str) -> Tensor:
    """`sums` of `g = da*act'(s*y + t)`: the reduction of the BN backward, [2 or 1, stat_groups, C]."""
    if unwatched(da, y):
        return _call(backends.get(backend).norm_act_reduce, da, y, coef, act, slope)
    return torch.ops.fastdcgan.norm_act_reduce(da, y, coef, act, slope, backend)


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
    if unwatched(mean, var):
        return _call(backends.get(backend).coefficients, mean, var, weight, bias, shift, eps)
    return torch.ops.fastdcgan.coefficients(mean, var, weight, bias, shift, eps, backend)


def grad_coefficients(sums: Tensor, coef: Tensor, count: int, backend: str) -> Tensor:
    """`grad_coef` [4, stat_groups, C] from `sums` over `count` values M.

    `p = -s*rstd*sum(g*xhat)/M`, `q = -s*sum(g)/M - p*mean`.
    """
    if unwatched(sums, coef):
        return _call(backends.get(backend).grad_coefficients, sums, coef, count)
    return torch.ops.fastdcgan.grad_coefficients(sums, coef, count, backend)


def bias_coefficients(bias: Tensor | None, channels: int, like: Tensor, backend: str) -> Tensor:
    """`coef` (1, bias) [2, 1, C] of a block without normalisation, in the `stat_dtype` of `like`."""
    if unwatched(like):
        return _call(backends.get(backend).bias_coefficients, like, bias, channels)
    return Backend.bias_coefficients(backends.get(backend), like, bias, channels)


def update_running(
    mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float, backend: str
) -> None:
    """Update running statistics [C] in place from `stats`, once per statistics group (`Backend.update_running`)."""
    if unwatched(mean, var, stats):
        _call(backends.get(backend).update_running, mean, var, stats, shift, factor, momentum)
        return
    torch.ops.fastdcgan.update_running(mean, var, stats, shift, factor, momentum, backend)


# Two or three primitives in one, which a backend may have as one call. They are not registered: where somebody watches,
# what is called is what they are made of.


def normalize(
    y: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`act(s*y + t)` and the coef of `y` with the batch's `stats`: `coefficients`, then `norm_act`."""
    if unwatched(y, stats):
        return _call(backends.get(backend).normalize, y, stats, weight, bias, eps, act, slope)
    coef = coefficients(stats[0], stats[1], weight, bias, None, eps, backend)
    return norm_act(Operand(y, None, coef, act, slope), backend), coef


def normalize_backward(
    da: Tensor, y: Tensor, coef: Tensor, count: int, act: str, slope: float, backend: str, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """`dy` and `sums`: `norm_act_reduce`, `grad_coefficients` over `count` values, then `norm_act`.

    With `overwrite` dy may take the place of `da`, which then nobody else may hold.
    """
    if unwatched(da, y):
        runs = backends.get(backend)
        function = runs.normalize_backward_ if overwrite else runs.normalize_backward
        return _call(function, da, y, coef, count, act, slope)
    sums = norm_act_reduce(da, y, coef, act, slope, backend)
    grad_coef = grad_coefficients(sums, coef, count, backend)
    return norm_act(Operand(da, y, grad_coef, act, slope), backend), sums


def update_all_running(updates: Sequence[Update], backend: str) -> None:
    """`update_running` for several normalisations, each `Update` with its arguments."""
    if unwatched(*(t for u in updates for t in (u.mean, u.var, u.stats))):
        _call(backends.get(backend).update_all_running, updates[0].mean, updates)
        return
    for u in updates:
        update_running(*u, backend)


def _fake_coefficients(mean, var, weight, bias, shift, eps, backend) -> Tensor:
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    return mean.new_empty((4, *mean.shape), dtype=dtype)


_define(
    f"norm_act({_operand_schema('x')}, str backend) -> Tensor",
    lambda *args: backends.get(args[5]).norm_act(Operand(*args[:5])),
    lambda *args: torch.empty_like(_finished(*args)),
)
_define(
    "norm_act_reduce(Tensor da, Tensor y, Tensor coef, str act, float slope, str backend) -> Tensor",
    lambda *args: backends.get(args[5]).norm_act_reduce(*args[:5]),
    lambda da, y, coef, *rest: coef.new_empty((coef.shape[0] // 2, coef.shape[1], coef.shape[2])),
)
_define(
    "coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? shift, float eps, str backend)"
    " -> Tensor",
    lambda *args: backends.get(args[6]).coefficients(*args[:6]),
    _fake_coefficients,
)
_define(
    "grad_coefficients(Tensor sums, Tensor coef, SymInt count, str backend) -> Tensor",
    lambda *args: backends.get(args[3]).grad_coefficients(*args[:3]),
    lambda sums, coef, count, backend: torch.empty_like(coef),
)
_define(
    "update_running(Tensor(a!) mean, Tensor(b!) var, Tensor stats, Tensor? shift, Tensor? factor, float momentum, "
    "str backend) -> ()",
    lambda *args: backends.get(args[6]).update_running(*args[:6]),
    lambda *args: None,
)
