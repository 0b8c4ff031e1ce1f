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
RELU6 = tl.constexpr(ACTIVATIONS["relu6"].id)
HARDTANH = tl.constexpr(ACTIVATIONS["hardtanh"].id)
HARDSWISH = tl.constexpr(ACTIVATIONS["hardswish"].id)
MISH = tl.constexpr(ACTIVATIONS["mish"].id)
SOFTPLUS = tl.constexpr(ACTIVATIONS["softplus"].id)
LOGSIGMOID = tl.constexpr(ACTIVATIONS["logsigmoid"].id)

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
def _clamp(z, LOW: tl.constexpr, HIGH: tl.constexpr):
    """NaN stays."""
    return tl.where(z <= LOW, LOW, tl.where(z >= HIGH, HIGH, z))


@triton.jit
def _clamp_derivative(z, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.where((z <= LOW) | (z >= HIGH), 0.0, 1.0)  # 1 at NaN, as PyTorch has it


@triton.jit
def _exp_up_to_20(z):
    return tl.exp(tl.where(z > 20.0, 20.0, z))


@triton.jit
def _mish_factor(e):
    """tanh(log(1 + e)): 1 where e = exp(z) would overflow."""
    n = e * (e + 2.0)
    return n / (n + 2.0)


@triton.jit
def _softplus(z):
    """max(z, 0) + log(1 + exp(-|z|)), the second as csrc/common/activations.h has it."""
    e = tl.exp(tl.where(z > 0.0, -z, z))
    q = e / (2.0 + e)
    u = q * q
    p = 2.8178335e-1
    p = p * u + 2.7960603e-1
    p = p * u + 4.0024910e-1
    p = p * u + 6.6666315e-1
    p = p * u + 2.0
    return tl.where(z > 0.0, z, 0.0) + p * q


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
    elif ACT == RELU6:
        z = _clamp(z, 0.0, 6.0)
    elif ACT == HARDTANH:
        z = _clamp(z, -1.0, 1.0)
    elif ACT == HARDSWISH:
        z = z * (_clamp(z + 3.0, 0.0, 6.0) * (1.0 / 6.0))
    elif ACT == MISH:
        z = z * _mish_factor(_exp_up_to_20(z))
    elif ACT == SOFTPLUS:
        z = _softplus(z)
    elif ACT == LOGSIGMOID:
        z = -_softplus(-z)
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
    elif ACT == RELU6:
        d = _clamp_derivative(z, 0.0, 6.0)
    elif ACT == HARDTANH:
        d = _clamp_derivative(z, -1.0, 1.0)
    elif ACT == HARDSWISH:
        d = tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, z * (1.0 / 3.0) + 0.5, 1.0))  # 1 at NaN
    elif ACT == MISH:
        e = _exp_up_to_20(z)
        a = _mish_factor(e)
        d = a + z * (e / (1.0 + e) * (1.0 - a * a))
    elif ACT == SOFTPLUS:
        d = 1.0 / (1.0 + tl.exp(-z))
    elif ACT == LOGSIGMOID:
        d = 1.0 / (1.0 + tl.exp(z))
    else:
        tl.static_assert(ACT == IDENTITY, "unknown activation id")
        d = tl.full(z.shape, 1.0, tl.float32)
    return d
