"""The one table of activations: forward, derivative from the pre-activation `z`, C++ id, default slope, module.

The backward pass recomputes `z` from the raw convolution output, so every derivative here is a function of `z` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """One row of the table; `slope` is the parameter of leaky_relu (negative slope) and elu (alpha), else unused."""

    id: int  # shared with csrc/common/activations.h
    forward: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]
    module: type[nn.Module] | None = None
    default_slope: float = 0.0
    slope_name: str | None = None  # the module's attribute and argument that holds the slope

    def keeps_sign(self, slope: float) -> bool:
        """Whether `derivative` sees no more of z than `z > 0`, and `forward` keeps that: act'(z) = act'(act(z))."""
        return self.module is nn.ReLU or (self.module is nn.LeakyReLU and slope >= 0)


def _relu_derivative(z: Tensor, slope: float) -> Tensor:
    return torch.where(z <= 0, torch.zeros_like(z), 1.0)  # 0 at 0 and 1 at NaN, as PyTorch has it


def _leaky_relu_derivative(z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), slope)


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
    return torch.where(z <= 0, slope * torch.exp(z.clamp(max=0)), 1.0)  # 1 at NaN, as PyTorch has it


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(0, lambda z, slope: z, lambda z, slope: torch.ones_like(z)),
    "relu": Activation(1, lambda z, slope: F.relu(z), _relu_derivative, nn.ReLU),
    "leaky_relu": Activation(
        2, lambda z, slope: F.leaky_relu(z, slope), _leaky_relu_derivative, nn.LeakyReLU, 0.2, "negative_slope"
    ),
    "tanh": Activation(3, lambda z, slope: torch.tanh(z), _tanh_derivative, nn.Tanh),
    "sigmoid": Activation(4, lambda z, slope: torch.sigmoid(z), _sigmoid_derivative, nn.Sigmoid),
    "silu": Activation(5, lambda z, slope: F.silu(z), _silu_derivative, nn.SiLU),
    "gelu": Activation(6, lambda z, slope: F.gelu(z), _gelu_derivative, nn.GELU),
    "elu": Activation(7, lambda z, slope: F.elu(z, slope), _elu_derivative, nn.ELU, 1.0, "alpha"),
}
_NAMES = {row.module: name for name, row in ACTIVATIONS.items() if row.module is not None}


def from_module(module: nn.Module) -> tuple[str, float] | None:
    """(name, slope) of an activation module of exactly one of the table's types, else None."""
    name = _NAMES.get(type(module))
    if name is None or (name == "gelu" and module.approximate != "none"):
        return None
    slope_name = ACTIVATIONS[name].slope_name
    return name, 0.0 if slope_name is None else float(getattr(module, slope_name))


def to_module(name: str, slope: float | None = None) -> nn.Module | None:
    """The module of an activation, None for "identity"; `slope` None is the default slope."""
    row = ACTIVATIONS[name]
    if row.module is None or row.slope_name is None:
        return None if row.module is None else row.module()
    return row.module(**{row.slope_name: row.default_slope if slope is None else slope})
