"""Image-side layers of stride 1 through the kernels of their adjoints.

With stride 1 a convolution is a transposed one with its kernel flipped and a padding of `dilation*(kernel-1) -
padding`, and the two operands of the weight gradient change places. So `image_side.py` and `image_side_transpose.py`
also serve convolutions to 1 to 4 channels (a PatchGAN's last layer, a generator that ends in a plain convolution),
their input gradients and their weight gradients.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdcgan.geometry import Geometry
from fastdcgan.kernels import image_side, image_side_transpose
from fastdcgan.spec import Algorithm, Call, memory_format


def flip(geometry: Geometry) -> Geometry | None:
    """The same taps seen from the other side, or None if there is no such geometry."""
    if geometry.stride != (1, 1):
        return None
    rows, columns = (
        d * (k - 1) - p for k, p, d in zip(geometry.kernel, geometry.padding, geometry.dilation, strict=True)
    )
    if min(rows, columns) < 0:
        return None
    return Geometry(geometry.kernel, (1, 1), (rows, columns), geometry.dilation, geometry.groups)


def flip_weight(weight: Tensor) -> Tensor:
    """[A, B, kh, kw] -> [B, A, kh, kw], in the same memory format, with the taps in reverse."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=memory_format(weight))


def adjoint(call: Call) -> Call | None:
    """The call that computes the same once its kernel (or its result, a weight's gradient) is flipped, or None.

    Its weight has the flipped one's shape and not yet its values.
    """
    geometry = flip(call.geometry)
    if geometry is None:
        return None
    if call.op == "weight_grad":
        return call._replace(a=call.b, b=call.a, geometry=geometry)
    if call.op == "conv_transpose" and geometry.conv_size(*call.a.x.shape[2:]) != tuple(call.size):
        return None  # output padding
    op = "conv_transpose" if call.op == "conv" else "conv"
    return call._replace(op=op, b=call.b.transpose(0, 1), geometry=geometry)


def _flipped(through: Algorithm) -> Algorithm:
    """The algorithm that runs a call as its adjoint's, by way of `through`."""

    def why_not(call: Call) -> str | None:
        found = adjoint(call)
        return "a stride or padding whose kernel can't be flipped" if found is None else through.why_not(found)

    def run(call: Call, tile: Any = None) -> Any:
        found = adjoint(call)
        assert found is not None
        if call.op == "weight_grad":
            dw = flip_weight(through.run(found, tile))
            return dw.contiguous(memory_format=memory_format(call.a.x))
        return through.run(found._replace(b=flip_weight(call.b)), tile)

    return Algorithm("triton flipped", why_not, run)


CONV = _flipped(image_side_transpose.CONV_TRANSPOSE)
CONV_TRANSPOSE = _flipped(image_side.CONV)
WEIGHT_GRAD = _flipped(image_side.WEIGHT_GRAD)
