"""Image-side layers of stride 1 through the kernels of their adjoints.

With stride 1 a convolution is a transposed one with its kernel turned round and a padding of `dilation*(kernel-1) -
padding`, and the two operands of the weight gradient change places. So `narrow.py` and `narrow_transpose.py` also serve
convolutions to 1 to 4 channels (a PatchGAN's last layer, a generator that ends in a plain convolution), their input
gradients and their weight gradients.
"""

from __future__ import annotations

from torch import Tensor

from fastdcgan.geometry import Geometry, Pair
from fastdcgan.kernels import narrow, narrow_transpose
from fastdcgan.spec import STORE, Epilogue, Operand, memory_format


def turn(geometry: Geometry) -> Geometry | None:
    """The same taps seen from the other side, or None if there is no such geometry."""
    if geometry.stride != (1, 1):
        return None
    rows, columns = (
        d * (k - 1) - p for k, p, d in zip(geometry.kernel, geometry.padding, geometry.dilation, strict=True)
    )
    if min(rows, columns) < 0:
        return None
    return Geometry(geometry.kernel, (1, 1), (rows, columns), geometry.dilation, geometry.groups)


def turn_weight(weight: Tensor) -> Tensor:
    """[A, B, kh, kw] -> [B, A, kh, kw], in the same memory format, with the taps in reverse."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=memory_format(weight))


_STRIDE = "a stride or padding that can't be turned round"


def covers_conv(a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue = STORE) -> str | None:
    """None if `conv` takes this call, else the reason."""
    turned = turn(geometry)
    if turned is None:
        return _STRIDE
    size = geometry.conv_size(*a.x.shape[2:])
    return narrow_transpose.covers_conv_transpose(a, weight.transpose(0, 1), turned, size, epilogue)


def conv(a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue = STORE) -> tuple[Tensor, Tensor]:
    """`Backend.conv` to 1 to 4 channels with stride 1."""
    turned = turn(geometry)
    assert turned is not None
    size = geometry.conv_size(*a.x.shape[2:])
    return narrow_transpose.conv_transpose(a, turn_weight(weight), turned, size, epilogue)


def covers_conv_transpose(
    a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue = STORE
) -> str | None:
    """None if `conv_transpose` takes this call, else the reason."""
    turned = turn(geometry)
    if turned is None or turned.conv_size(*a.x.shape[2:]) != tuple(output_size):
        return _STRIDE
    return narrow.covers_conv(a, weight.transpose(0, 1), turned, epilogue)


def conv_transpose(
    a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue = STORE
) -> tuple[Tensor, Tensor]:
    """`Backend.conv_transpose` from 1 to 4 channels with stride 1."""
    turned = turn(geometry)
    assert turned is not None
    return narrow.conv(a, turn_weight(weight), turned, epilogue)


def covers_weight_grad(gathered: Operand, linear: Operand, geometry: Geometry) -> str | None:
    """None if `weight_grad` takes this call, else the reason."""
    turned = turn(geometry)
    return _STRIDE if turned is None else narrow.covers_weight_grad(linear, gathered, turned)


def weight_grad(gathered: Operand, linear: Operand, geometry: Geometry) -> Tensor:
    """`Backend.weight_grad` where the linear operand has 1 to 4 channels, with stride 1."""
    turned = turn(geometry)
    assert turned is not None
    dw = turn_weight(narrow.weight_grad(linear, gathered, turned))
    return dw.contiguous(memory_format=memory_format(gathered.x))
