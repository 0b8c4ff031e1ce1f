"""The one table of activations: forward, derivative from the pre-activation `z`, C++ id, default slope, module.

The backward pass recomputes `z` from the raw convolution output, so every derivative here is a function of `z` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    fixed: Mapping[str, Any] = field(default_factory=dict)  # others of them, which have to have these values
    float32_under_autocast: tuple[str, ...] = ()  # device types where PyTorch's autocast makes it one of float32

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


def _clamp_derivative(low: float, high: float) -> Callable[[Tensor, float], Tensor]:
    return lambda z, slope: torch.where((z <= low) | (z >= high), torch.zeros_like(z), 1.0)  # 1 at NaN, as hardtanh


def _hardswish_derivative(z: Tensor, slope: float) -> Tensor:
    inner = torch.where(z < 3, z / 3 + 0.5, 1.0)  # 1 at NaN, as PyTorch has it
    return torch.where(z <= -3, torch.zeros_like(z), inner)


def _mish_derivative(z: Tensor, slope: float) -> Tensor:
    a = torch.tanh(F.softplus(z))
    return a + z * torch.sigmoid(z) * (1 - a.square())


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(0, lambda z, slope: z, lambda z, slope: torch.ones_like(z)),
    "relu": Activation(1, lambda z, slope: F.relu(z), _relu_derivative, nn.ReLU),
    "leaky_relu": Activation(
        2, lambda z, slope: F.leaky_relu(z, slope), _leaky_relu_derivative, nn.LeakyReLU, 0.2, "negative_slope"
    ),
    "tanh": Activation(3, lambda z, slope: torch.tanh(z), _tanh_derivative, nn.Tanh),
    "sigmoid": Activation(4, lambda z, slope: torch.sigmoid(z), _sigmoid_derivative, nn.Sigmoid),
    "silu": Activation(5, lambda z, slope: F.silu(z), _silu_derivative, nn.SiLU),
    "gelu": Activation(6, lambda z, slope: F.gelu(z), _gelu_derivative, nn.GELU, fixed={"approximate": "none"}),
    "elu": Activation(7, lambda z, slope: F.elu(z, slope), _elu_derivative, nn.ELU, 1.0, "alpha"),
    "relu6": Activation(
        8, lambda z, slope: F.relu6(z), _clamp_derivative(0, 6), nn.ReLU6,
        fixed={"min_val": 0.0, "max_val": 6.0},
    ),
    "hardtanh": Activation(
        9, lambda z, slope: F.hardtanh(z), _clamp_derivative(-1, 1), nn.Hardtanh,
        fixed={"min_val": -1.0, "max_val": 1.0},
    ),
    "hardswish": Activation(10, lambda z, slope: F.hardswish(z), _hardswish_derivative, nn.Hardswish),
    "mish": Activation(11, lambda z, slope: F.mish(z), _mish_derivative, nn.Mish),
    "softplus": Activation(
        12, lambda z, slope: F.softplus(z), lambda z, slope: torch.where(z > 20, 1.0, torch.sigmoid(z)), nn.Softplus,
        fixed={"beta": 1.0, "threshold": 20.0}, float32_under_autocast=("cuda", "xpu", "mps", "mtia"),
    ),
    "logsigmoid": Activation(13, lambda z, slope: F.logsigmoid(z), lambda z, slope: torch.sigmoid(-z), nn.LogSigmoid),
}  # fmt: skip
_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    row.module: (name,) for name, row in ACTIVATIONS.items() if row.module is not None
}
_NAMES[nn.Hardtanh] = ("hardtanh", "relu6")  # Hardtanh(0, 6) is ReLU6
# The attributes by which a module is one activation or another.
DECISIVE = {n for row in ACTIVATIONS.values() for n in (row.slope_name, *row.fixed) if n is not None}


def find(module: type[nn.Module], given: Mapping[str, Any]) -> tuple[str, float] | None:
    """(name, slope) of what a module of exactly this type and these arguments is, None if the table has none.

    nn.PReLU is leaky_relu: its slope is a tensor (`Block.learns_slope`).
    """
    if module is nn.PReLU:
        return "leaky_relu", 0.0
    for name in _NAMES.get(module, ()):
        row = ACTIVATIONS[name]
        if all(given.get(n, value) == value for n, value in row.fixed.items()):
            return name, 0.0 if row.slope_name is None else float(given[row.slope_name])
    return None


def from_module(module: nn.Module) -> tuple[str, float] | None:
    """(name, slope) of an activation module of exactly one of the table's types, else None."""
    return find(type(module), module.__dict__)


def to_module(name: str, slope: float | None = None) -> nn.Module | None:
    """The module of an activation, None for "identity"; `slope` None is the default slope."""
    row = ACTIVATIONS[name]
    if row.module is None or row.slope_name is None:
        return None if row.module is None else row.module()
    return row.module(**{row.slope_name: row.default_slope if slope is None else slope})
