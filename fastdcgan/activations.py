"""The one table of activations: forward, derivative from the pre-activation `z`, C++ id, default slope.

The backward pass recomputes `z` from the raw convolution output, so every derivative here is a function of `z` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """One row of the table; `slope` is the parameter of `leaky_relu` (negative slope) and `elu` (alpha), else unused."""

    id: int  # shared with csrc/common/activations.h
    forward: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]
    default_slope: float = 0.0


def _relu_derivative(z: Tensor, slope: float) -> Tensor:
    return torch.where(z <= 0, 0.0, 1.0).to(z.dtype)  # 0 at 0 and 1 at NaN, as PyTorch has it


def _leaky_relu_derivative(z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, 1.0, slope).to(z.dtype)


def _tanh_derivative(z: Tensor, slope: float) -> Tensor:
    return 1 - torch.tanh(z).square()


def _sigmoid_derivative(z: Tensor, slope: float) -> Tensor:
    a = torch.sigmoid(z)
    return a * (1 - a)


def _silu_derivative(z: Tensor, slope: float) -> Tensor:
    a = torch.sigmoid(z)
    return a * (1 + z * (1 - a))


def _gelu_derivative(z: Tensor, slope: float) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return cdf + z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def _elu_derivative(z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), slope * torch.exp(z.clamp(max=0)))


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(0, lambda z, slope: z, lambda z, slope: torch.ones_like(z)),
    "relu": Activation(1, lambda z, slope: F.relu(z), _relu_derivative),
    "leaky_relu": Activation(2, lambda z, slope: F.leaky_relu(z, slope), _leaky_relu_derivative, 0.2),
    "tanh": Activation(3, lambda z, slope: torch.tanh(z), _tanh_derivative),
    "sigmoid": Activation(4, lambda z, slope: torch.sigmoid(z), _sigmoid_derivative),
    "silu": Activation(5, lambda z, slope: F.silu(z), _silu_derivative),
    "gelu": Activation(6, lambda z, slope: F.gelu(z), _gelu_derivative),
    "elu": Activation(7, lambda z, slope: F.elu(z, slope), _elu_derivative, 1.0),
}
