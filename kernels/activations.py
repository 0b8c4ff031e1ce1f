"""The activations inside Triton kernels: forward, and derivative from the pre-activation `z`, chosen by `constexpr` id.

The ids, the meaning of `slope` and the values at 0 and NaN are those of `fastdcgan/activations.py`. `z` is a float32
block, and so is the result. Only `tl` functions that the interpreter has as well are used, so libdevice is not.
"""

import triton
import triton.language as tl

from fastdcgan.activations import ACTIVATIONS

IDENTITY = tl.constexpr(ACTIVATIONS["identity"].id)
RELU = tl.constexpr(ACTIVATIONS["relu"].id)
LEAKY_RELU = tl.constexpr(ACTIVATIONS["leaky_relu"].id)
TANH = tl.constexpr(ACTIVATIONS["tanh"].id)
SIGMOID = tl.constexpr(ACTIVATIONS["sigmoid"].id)
SILU = tl.constexpr(ACTIVATIONS["silu"].id)
GELU = tl.constexpr(ACTIVATIONS["gelu"].id)
ELU = tl.constexpr(ACTIVATIONS["elu"].id)

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_RSQRT_TWO_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def tanh(z):
    """Within 4 units in the last place of float32: a polynomial near 0, where `1 - 2/(exp(2z) + 1)` would cancel."""
    a = tl.abs(z)
    u = z * z
    p = -0.0062824729
    p = p * u + 0.0210777581
    p = p * u - 0.0538538579
    p = p * u + 0.1333260169
    p = p * u - 0.3333331805
    near = z + z * (u * p)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.where(a > 20.0, 20.0, a)) + 1.0)
    return tl.where(a < 0.55, near, tl.where(z < 0.0, -far, far))


@triton.jit
def _expm1_of_negative(z):
    """exp(z) - 1 for z <= 0 (0 for z > 0; NaN stays): exp(z) - 1 = tanh(z/2)*(exp(z) + 1)."""
    z = tl.where(z > 0.0, 0.0, z)
    return tanh(0.5 * z) * (tl.exp(z) + 1.0)


@triton.jit
def activation(z, slope, ACT: tl.constexpr):
    """act(z)."""
    if ACT == RELU:
        z = tl.where(z <= 0.0, 0.0, z)  # NaN stays
    elif ACT == LEAKY_RELU:
        z = tl.where(z > 0.0, z, z * slope)
    elif ACT == TANH:
        z = tanh(z)
    elif ACT == SIGMOID:
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACT == SILU:
        z = z / (1.0 + tl.exp(-z))
    elif ACT == GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))
    elif ACT == ELU:
        z = tl.where(z > 0.0, z, slope * _expm1_of_negative(z))
    else:
        tl.static_assert(ACT == IDENTITY, "unknown activation id")
    return z


@triton.jit
def activation_derivative(z, slope, ACT: tl.constexpr):
    """act'(z)."""
    if ACT == RELU:
        d = tl.where(z <= 0.0, 0.0, 1.0)  # 1 at NaN, as PyTorch has it
    elif ACT == LEAKY_RELU:
        d = tl.where(z > 0.0, 1.0, slope)
    elif ACT == TANH:
        a = tanh(z)
        d = 1.0 - a * a
    elif ACT == SIGMOID:
        a = 1.0 / (1.0 + tl.exp(-z))
        d = a * (1.0 - a)
    elif ACT == SILU:
        a = 1.0 / (1.0 + tl.exp(-z))
        d = a * (1.0 + z * (1.0 - a))
    elif ACT == GELU:
        cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        d = cdf + z * tl.exp(-0.5 * z * z) * _RSQRT_TWO_PI
    elif ACT == ELU:
        d = tl.where(z <= 0.0, slope * tl.exp(tl.where(z > 0.0, 0.0, z)), 1.0)
    else:
        tl.static_assert(ACT == IDENTITY, "unknown activation id")
        d = tl.full(z.shape, 1.0, tl.float32)
    return d
