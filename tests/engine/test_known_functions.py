"""The activation functions that a forward of a model's own calls: which of them fuse, and to what numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdcgan
from tests.helpers.twins import assert_same, draw, results

FUSED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu6": ("ReLU6", F.relu6),
    "relu6 in place": ("ReLU6", lambda x: F.relu6(x, True)),
    "nn.ReLU6": ("ReLU6", nn.ReLU6(True)),
    "hardtanh to 6": ("ReLU6", lambda x: F.hardtanh(x, min_val=0, max_val=6)),
    "hardtanh": ("Hardtanh", F.hardtanh),
    "hardtanh with its numbers": ("Hardtanh", lambda x: F.hardtanh(x, -1.0, 1.0, True)),
    "hardtanh_": ("Hardtanh", F.hardtanh_),
    "hardswish": ("Hardswish", F.hardswish),
    "hardswish in place": ("Hardswish", lambda x: F.hardswish(x, inplace=True)),
    "mish": ("Mish", F.mish),
    "nn.Mish": ("Mish", nn.Mish(True)),
    "softplus": ("Softplus", F.softplus),
    "softplus with its numbers": ("Softplus", lambda x: F.softplus(x, 1, threshold=20)),
    "nn.Softplus": ("Softplus", nn.Softplus()),
    "logsigmoid": ("LogSigmoid", F.logsigmoid),
    "nn.LogSigmoid": ("LogSigmoid", nn.LogSigmoid()),
    "leaky_relu": ("LeakyReLU", F.leaky_relu),
    "leaky_relu with a slope": ("LeakyReLU", lambda x: F.leaky_relu(x, 0.3, inplace=True)),
    "elu with an alpha": ("ELU", lambda x: F.elu(x, alpha=0.5)),
    "elu_": ("ELU", F.elu_),
    "gelu": ("GELU", lambda x: F.gelu(x, approximate="none")),
}
LEFT_ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardtanh of 2": lambda x: F.hardtanh(x, -2.0, 2.0),
    "hardtanh of one number": lambda x: F.hardtanh(x, 0.0),
    "softplus of beta 2": lambda x: F.softplus(x, 2.0),
    "softplus of threshold 2": lambda x: F.softplus(x, threshold=2.0),
    "nn.Softplus of beta 2": nn.Softplus(2),
}


class Own(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.first(x))))


@pytest.mark.parametrize("name", [*FUSED, *LEFT_ALONE])
def test_numbers_are_the_functions(name: str, device: torch.device) -> None:
    pattern, act = FUSED[name] if name in FUSED else (None, LEFT_ALONE[name])
    plain = Own(act).to(device, torch.float64)
    fused = fastdcgan.fuse(copy.deepcopy(plain))
    x = draw((4, 3, 9, 8), torch.float64, device)
    with fastdcgan.backend("reference"):
        ran = [row.pattern for row in fastdcgan.explain(fused, x) if row.fused]
        assert ran[0] == "Conv2d + BatchNorm2d" + ("" if pattern is None else f" + {pattern}")
        assert_same(results(plain, x), results(fused, x))
