"""Calls of contractions, and what the reference makes of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import STORE, Call, Epilogue, Operand

REFERENCE = ReferenceBackend()


def conv(a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue = STORE) -> Call:
    return Call("conv", a, weight, geometry, geometry.conv_size(*a.x.shape[2:]), epilogue)


def conv_transpose(a: Operand, weight: Tensor, geometry: Geometry, size: Pair, epilogue: Epilogue = STORE) -> Call:
    return Call("conv_transpose", a, weight, geometry, size, epilogue)


def weight_grad(gathered: Operand, linear: Operand, geometry: Geometry) -> Call:
    return Call("weight_grad", gathered, linear, geometry, geometry.kernel)


def wide(x: Any) -> Any:
    """The same in float64: a tensor, and those of an operand, an epilogue or a call."""
    if isinstance(x, Tensor):
        return x.double()
    return type(x)(*map(wide, x)) if isinstance(x, (Operand, Epilogue, Call)) else x


def reference(call: Call) -> Any:
    """What the reference returns for the call."""
    if call.op == "conv":
        return REFERENCE.conv(call.a, call.b, call.geometry, call.epilogue)
    if call.op == "conv_transpose":
        return REFERENCE.conv_transpose(call.a, call.b, call.geometry, call.size, call.epilogue)
    return REFERENCE.weight_grad(call.a, call.b, call.geometry)
