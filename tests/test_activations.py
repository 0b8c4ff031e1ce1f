"""The activation table against PyTorch's modules and autograd, in float64 and at the awkward points."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastdcgan.activations import ACTIVATIONS, from_module, to_module

NAMES = list(ACTIVATIONS)
SLOPES = {"leaky_relu": [0.2, 0.01, 0.0, -0.5, 1.5], "elu": [1.0, 0.3]}
CASES = [(name, slope) for name in NAMES for slope in SLOPES.get(name, [0.0])]
HEADER = Path(__file__).parents[1] / "csrc" / "common" / "activations.h"


def module_of(name: str, slope: float) -> nn.Module:
    return to_module(name, slope) or nn.Identity()


def points(device: torch.device) -> Tensor:
    awkward = torch.tensor([0.0, -0.0, 1e-300, -1e-300, 5.0, -5.0, 40.0, -40.0, 800.0, -800.0], dtype=torch.float64)
    return torch.cat([awkward, torch.linspace(-8, 8, 401, dtype=torch.float64)]).to(device)


@pytest.mark.parametrize(("name", "slope"), CASES)
def test_forward_is_the_modules(name: str, slope: float, device: torch.device) -> None:
    z = torch.cat([points(device), z_infinite(device)])
    torch.testing.assert_close(
        ACTIVATIONS[name].forward(z, slope), module_of(name, slope)(z), rtol=0, atol=0, equal_nan=True
    )


def z_infinite(device: torch.device) -> Tensor:
    return torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64, device=device)


@pytest.mark.parametrize(("name", "slope"), CASES)
def test_derivative_is_autograds(name: str, slope: float, device: torch.device) -> None:
    z = points(device).requires_grad_()
    expected = torch.autograd.grad(module_of(name, slope)(z).sum(), z)[0]
    found = ACTIVATIONS[name].derivative(z.detach(), slope)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [3.0, -3.0, 1.0, -1.0, 6.0, 20.0, torch.inf, -torch.inf])
@pytest.mark.parametrize(("name", "slope"), CASES)
def test_derivative_where_a_formula_changes(name: str, slope: float, value: float, device: torch.device) -> None:
    z = torch.full((4,), value, dtype=torch.float64, device=device, requires_grad=True)
    expected = torch.autograd.grad(module_of(name, slope)(z).sum(), z)[0]
    found = ACTIVATIONS[name].derivative(z.detach(), slope)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize(("name", "slope"), CASES)
def test_a_nan_gives_the_gradient_that_pytorch_gives(name: str, slope: float, device: torch.device) -> None:
    z = torch.full((4,), torch.nan, dtype=torch.float64, device=device, requires_grad=True)
    expected = torch.autograd.grad(module_of(name, slope)(z).sum(), z)[0]
    torch.testing.assert_close(ACTIVATIONS[name].derivative(z.detach(), slope), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_both_keep_the_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    z = torch.randn(8, dtype=dtype, device=device)
    row = ACTIVATIONS[name]
    assert row.forward(z, row.default_slope).dtype == dtype
    assert row.derivative(z, row.default_slope).dtype == dtype


@pytest.mark.parametrize(("name", "slope"), CASES)
def test_a_module_there_and_back(name: str, slope: float) -> None:
    module = to_module(name, slope)
    if name == "identity":
        assert module is None
    else:
        assert module is not None
        assert from_module(module) == (name, slope)


def test_default_slopes_are_dcgans_and_pytorchs() -> None:
    assert from_module(to_module("leaky_relu")) == ("leaky_relu", 0.2)  # type: ignore[arg-type]
    assert from_module(to_module("elu")) == ("elu", 1.0)  # type: ignore[arg-type]
    assert from_module(nn.LeakyReLU()) == ("leaky_relu", 0.01)


class Clipped(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=1)


def relu4() -> nn.Module:
    module = nn.ReLU6()
    module.max_val = 4.0
    return module


OTHERS = [
    nn.GELU(approximate="tanh"), Clipped(), nn.Identity(), nn.Softplus(2.0), nn.Softplus(threshold=10.0),
    nn.Hardtanh(-2.0, 2.0), nn.Hardtanh(0.0, 1.0), relu4(),
]  # fmt: skip


@pytest.mark.parametrize("module", OTHERS, ids=repr)
def test_modules_that_the_table_does_not_have(module: nn.Module) -> None:
    assert from_module(module) is None


def test_other_spellings() -> None:
    assert from_module(nn.PReLU(3)) == ("leaky_relu", 0.0)
    assert from_module(nn.Hardtanh(0, 6)) == ("relu6", 0.0)
    assert from_module(nn.Softplus(1, 20)) == ("softplus", 0.0)


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "xpu", "mps", "mtia"])
def test_what_autocast_makes_float32_is_what_pytorch_does(device_type: str) -> None:
    """On these device types PyTorch's autocast has kernels for what it casts, and for nothing else here."""
    key = {"cpu": "AutocastCPU"}.get(device_type, f"Autocast{device_type.upper()}")
    operator = {"relu6": "hardtanh", "logsigmoid": "log_sigmoid"}
    for name in set(ACTIVATIONS) - {"identity"}:
        casts = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator.get(name, name)}", key)
        assert casts == (device_type in ACTIVATIONS[name].float32_under_autocast), name


def test_ids_are_those_of_the_cpp_header() -> None:
    enum = re.search(r"enum class ActId[^{]*{([^}]*)}", HEADER.read_text())
    assert enum is not None
    ids = {name: int(value) for name, value in re.findall(r"(\w+)\s*=\s*(\d+)", enum.group(1))}
    assert ids == {name: row.id for name, row in ACTIVATIONS.items()}
