"""One contraction on one backend, by an algorithm of its own or by PyTorch's, without the router; and the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdcgan.backends.base import Backend
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import STORE, Call, Epilogue, Operand

REFERENCE = ReferenceBackend()


def why_not(on: Backend, call: Call, name: str | None = None) -> str | None:
    """Why no algorithm of the backend can run the call, or not that of this name; None if one can."""
    reasons = [a.why_not(call) for a in on.algorithms(call.op) if name in (None, a.name)]
    assert reasons, f"{on.name} has no algorithm {name}"
    return None if None in reasons else reasons[-1]


def run(on: Backend, call: Call, name: str | None = None, tile: Any = None) -> Any:
    """The call by the algorithm of this name, or by the first that can run it, or else by PyTorch's own."""
    able = [a for a in on.algorithms(call.op) if name in (None, a.name) and a.why_not(call) is None]
    assert able or name is None, f"{name} of {on.name}: {why_not(on, call, name)}"
    return able[0].run(call, tile) if able else on.pytorch(call)


def conv_call(a: Operand, weight: Tensor, g: Geometry, e: Epilogue = STORE) -> Call:
    return Call("conv", a, weight, g, g.conv_size(a.x.shape[2], a.x.shape[3]), e)


def conv_transpose_call(a: Operand, weight: Tensor, g: Geometry, size: Pair, e: Epilogue = STORE) -> Call:
    return Call("conv_transpose", a, weight, g, size, e)


def weight_grad_call(gathered: Operand, linear: Operand, g: Geometry) -> Call:
    return Call("weight_grad", gathered, linear, g, g.kernel)


def conv(on: Backend, *args: Any, name: str | None = None) -> tuple[Tensor, Tensor]:
    return run(on, conv_call(*args), name)


def conv_transpose(on: Backend, *args: Any, name: str | None = None) -> tuple[Tensor, Tensor]:
    return run(on, conv_transpose_call(*args), name)


def weight_grad(on: Backend, *args: Any, name: str | None = None) -> Tensor:
    return run(on, weight_grad_call(*args), name)


def constant_call(g: Geometry, channels: Pair, dtype: torch.dtype, device: str = "cpu") -> Call:
    """A `conv` with statistics of an image whose pixels are all alike."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, channels[0], 1, 1, generator=generator).expand(4, -1, 18, 18)
    weight = torch.randn(channels[1], channels[0], *g.kernel, generator=generator)
    x, weight = (t.to(device, dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return conv_call(Operand(x), weight, g, Epilogue("stats", stat_groups=2))


def check_constant(out: Tensor, stats: Tensor, what: str, rounding: float = 0.0) -> None:
    """What a `constant_call` gives: the same everywhere, with that as its mean, and no variance. `rounding`: by how
    much of the largest output others may differ whose sums are other ones."""
    most = rounding * float(out.abs().max())
    assert (out - out[:1, :, :1, :1]).abs().max() <= most, what
    assert (stats[0] - out[::2, :, 0, 0]).abs().max() <= most, f"{what}: means"
    assert stats[1:].max() <= most**2, f"{what}: variances up to {float(stats[1:].max())}"


def reference(call: Call) -> Any:
    """What the reference returns for the call."""
    return REFERENCE.pytorch(call)


def wide(x: Any) -> Any:
    """The same in float64: a tensor, and those of an operand, an epilogue or a call."""
    if isinstance(x, Tensor):
        return x.double()
    return type(x)(*map(wide, x)) if isinstance(x, (Operand, Epilogue, Call)) else x
