"""What others write into parameters takes hold in FusedAdam's masters and copies, however it was written."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastdcgan
from fastdcgan.optim import FusedAdam
from tests.helpers.writes import KEEPS_OBJECTS
from tests.machine import DEVICE

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 1, 8)).to(DEVICE)


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(torch.bfloat16).to(DEVICE, p.dtype)
    optimizer.step()


def low_and_wide(
    dtype: torch.dtype, how: str
) -> tuple[nn.Module, FusedAdam, list[nn.Parameter], torch.optim.Optimizer]:
    """A 16-bit network with its FusedAdam, and float32 parameters of the same numbers with Adam."""
    net = network().to(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in net.parameters()]
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "amsgrad": how == "amsgrad"}
    return net, FusedAdam(net.parameters(), **settings), wide, torch.optim.Adam(wide, **settings)


@pytest.fixture(params=["kernel", "amsgrad", "reference"])
def how(request: pytest.FixtureRequest) -> Iterator[str]:
    """What runs FusedAdam: its kernel; PyTorch's fused Adam, for a setting or for a backend."""
    with fastdcgan.backend("reference" if request.param == "reference" else "auto"):
        yield request.param


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("write", KEEPS_OBJECTS.values(), ids=KEEPS_OBJECTS)
def test_a_step_goes_on_from_what_was_written(write: Any, dtype: torch.dtype, how: str) -> None:
    net, optimizer, wide, adam = low_and_wide(dtype, how)
    for i in range(4):
        if i == 2:
            write(net)
            for w, p in zip(wide, net.parameters(), strict=True):
                w.data.copy_(p)
        step(optimizer, list(net.parameters()), i)
        step(adam, wide, i)
    for w, p in zip(wide, net.parameters(), strict=True):
        master = optimizer.state[p]["master"]
        assert torch.equal(master.to(dtype), p)
        # A few roundings in each of four steps.
        torch.testing.assert_close(master, w.detach(), rtol=4 * 4 * 2.0**-24, atol=4 * 4 * 2.0**-24)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_clamping_after_each_step_takes_hold(dtype: torch.dtype, how: str) -> None:
    """As a WGAN does it. What lies within the bounds keeps what a 16-bit number can't hold."""
    net, optimizer, wide, adam = low_and_wide(dtype, how)
    bound = float(torch.tensor(0.01, dtype=dtype))
    for i in range(5):
        step(optimizer, list(net.parameters()), i)
        step(adam, wide, i)
        for p in (*net.parameters(), *wide):
            p.data.clamp_(-bound, bound)
    for w, p in zip(wide, net.parameters(), strict=True):
        assert float(p.detach().abs().max()) <= bound
        torch.testing.assert_close(p.detach(), w.detach().to(dtype), rtol=0, atol=bound * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_only_what_was_written_is_taken(dtype: torch.dtype, how: str) -> None:
    """NaN and infinity are written like any other number, and written over."""
    written = {3: 5.0, 40: torch.inf, 41: torch.nan, 64: -0.25}
    p = nn.Parameter(torch.randn(65, device=DEVICE).to(dtype))  # a vector and a rest of any kernel
    optimizer = FusedAdam([p], lr=1e-5, amsgrad=how == "amsgrad")
    step(optimizer, [p], 0)
    expected = optimizer.state[p]["master"].clone()
    assert not torch.equal(expected, expected.to(dtype).float())
    for at, value in written.items():
        p.data[at] = expected[at] = value
    p.grad = torch.zeros_like(p)
    optimizer.state[p]["exp_avg"].zero_()  # so that a step changes nothing by itself
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["master"], expected, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        p.fill_(0.5)
    optimizer.step()
    assert (p == 0.5).all() and (optimizer.state[p]["master"] == 0.5).all()


def test_a_master_beyond_the_range_of_float16_stays() -> None:
    """It rounds to infinity, which is what the parameter holds: nobody has written."""
    p = nn.Parameter(torch.zeros(20, device=DEVICE, dtype=torch.float16))
    optimizer = FusedAdam([p], lr=65535.0)
    step(optimizer, [p], 0)
    step(optimizer, [p], 0)
    assert p.isinf().any() and optimizer.state[p]["master"].isfinite().all()


def test_weights_and_optimizer_loaded_in_either_order(how: str) -> None:
    """Of one checkpoint both go on to the bit; of weights alone the weights count."""
    net, optimizer, _, _ = low_and_wide(torch.bfloat16, how)
    params = list(net.parameters())
    step(optimizer, params, 0)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    step(optimizer, params, 1)
    expected = [optimizer.state[p]["master"].clone() for p in params]
    for order in ((0, 1), (1, 0)):
        step(optimizer, params, 2)
        for i in order:
            (net, optimizer)[i].load_state_dict(copy.deepcopy(saved[i]))
        step(optimizer, params, 1)
        assert all(torch.equal(optimizer.state[p]["master"], e) for p, e in zip(params, expected, strict=True))


def test_a_parameter_that_is_float32_now_has_no_master(how: str) -> None:
    net, optimizer, wide, adam = low_and_wide(torch.bfloat16, how)
    params = list(net.parameters())
    step(optimizer, params, 0)
    step(adam, wide, 0)
    net.float()
    for w, p in zip(wide, params, strict=True):
        w.data.copy_(p)
    step(optimizer, params, 1)
    step(adam, wide, 1)
    for w, p in zip(wide, params, strict=True):
        assert "master" not in optimizer.state[p]
        torch.testing.assert_close(p, w, rtol=4 * 4 * 2.0**-24, atol=4 * 4 * 2.0**-24)


@pytest.mark.parametrize("write", KEEPS_OBJECTS.values(), ids=KEEPS_OBJECTS)
def test_copies_are_of_the_weights_after_a_step(write: Any) -> None:
    net = network()
    params = list(net.parameters())
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in params}
    optimizer = FusedAdam(params, lr=1e-3, copies=copies)
    for i in range(3):
        step(optimizer, params, i)
        assert all(torch.equal(copies[p], p.bfloat16()) for p in params)
        write(net)


@pytest.mark.parametrize(
    "convert",
    [{"memory_format": torch.channels_last}, {"dtype": torch.float16}, {"dtype": torch.float64}],
    ids=["channels_last", "float16", "float64"],
)
def test_copies_of_parameters_that_were_converted(convert: dict[str, Any]) -> None:
    net = network()
    params = list(net.parameters())
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in params}
    optimizer = FusedAdam(params, lr=1e-3, copies=copies)
    net.to(**convert)
    step(optimizer, params, 0)
    assert all(torch.equal(copies[p], p.bfloat16()) for p in params)


@pytest.mark.parametrize("of", ["state", "gradient"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_parameter_of_another_shape_is_refused(of: str, amsgrad: bool) -> None:
    p = nn.Parameter(torch.zeros(5, device=DEVICE))
    optimizer = FusedAdam([p], amsgrad=amsgrad)
    p.grad = torch.ones(5, device=DEVICE)
    optimizer.step()
    p.data = torch.zeros(500, device=DEVICE)
    if of == "state":
        p.grad = torch.ones(500, device=DEVICE)
    else:
        optimizer.state.clear()
    with pytest.raises(ValueError, match=r"shape \[5\] for a parameter of shape \[500\]: make a new FusedAdam"):
        optimizer.step()
