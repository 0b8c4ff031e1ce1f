"""The ways to run each contraction in Triton, in the order in which they are preferred where nothing was measured."""

from fastdcgan.kernels import conv, conv_transpose, flipped, image_side, image_side_transpose, weight_grad
from fastdcgan.spec import Algorithm

ALGORITHMS: dict[str, tuple[Algorithm, ...]] = {
    "conv": (image_side.CONV, flipped.CONV, conv.CONV),
    "conv_transpose": (image_side_transpose.CONV_TRANSPOSE, flipped.CONV_TRANSPOSE, conv_transpose.CONV_TRANSPOSE),
    "weight_grad": (image_side.WEIGHT_GRAD, flipped.WEIGHT_GRAD, weight_grad.WEIGHT_GRAD),
}
