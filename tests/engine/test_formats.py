"""In which format a forward runs: by what its calls took, and by nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan.dispatch import autotune
from fastdcgan.engine import formats, reordered

SHAPE = (2, 3, 8, 8)


class Clock:
    """One that only goes on where a network says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Passes(torch.autograd.Function):
    """Takes its time, both ways, by the format that the forward runs in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, seconds: dict[bool, tuple[float, float]]) -> Tensor:
        ahead, ctx.back = seconds[reordered_now[-1]]
        ctx.clock = clock
        clock.now += ahead
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.clock.now += ctx.back
        return grad, None, None


reordered_now: list[bool] = []  # of each call, whether it ran in channels_last


class Net(nn.Module):
    def __init__(self, clock: Clock, seconds: dict[bool, tuple[float, float]]) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        reordered_now.append(reordered.is_on())
        x = torch.relu(self.conv2(torch.relu(self.conv(x))))
        return Passes.apply(x, self.clock, self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))
    monkeypatch.setattr(formats, "time", clock)
    monkeypatch.setattr(autotune, "consulted", lambda device: True)
    monkeypatch.setattr(autotune, "may_begin", lambda calls: False)  # chains run by the rule
    reordered_now.clear()
    yield clock
    reordered_now.clear()


def fused(clock: Clock, as_it_is: tuple[float, float], other: tuple[float, float]) -> Net:
    return fastdcgan.fuse(Net(clock, {False: as_it_is, True: other}))


def train(net: nn.Module, calls: int = 1) -> None:
    sum(net(torch.ones(SHAPE)).sum() for _ in range(calls)).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("slow", [(3.0, 1.0), (1.0, 3.0)], ids=["forward", "backward"])
@pytest.mark.parametrize("reorders", [True, False])
def test_the_faster_one_runs(reorders: bool, slow: tuple[float, float], clock: Clock) -> None:
    times = (slow, (1.0, 1.0)) if reorders else ((1.0, 1.0), slow)
    net = fused(clock, *times)
    for _ in range(50):
        train(net)
    assert not formats.undecided(net)
    assert set(reordered_now[:6]) == {False}  # a short script has one format
    assert set(reordered_now[-10:]) == {reorders}
    assert 10 < sum(reordered_now[:40]) < 40


def test_a_small_gain_changes_nothing(clock: Clock) -> None:
    net = fused(clock, (1.0, 1.0), (0.98, 0.98))
    for _ in range(50):
        train(net)
    assert not formats.undecided(net) and not any(reordered_now[-10:])


def test_without_gradients_each_call_is_a_round(clock: Clock) -> None:
    net = fused(clock, (2.0, 0.0), (1.0, 0.0))
    with torch.no_grad():
        for _ in range(50):
            net(torch.ones(SHAPE))
    assert reordered_now[-1]


def test_calls_of_one_backward_are_of_one_format(clock: Clock) -> None:
    net = fused(clock, (1.0, 1.0), (1.0, 1.0))
    for _ in range(20):
        train(net, calls=3)
    assert any(reordered_now)
    assert all(len(set(reordered_now[i : i + 3])) == 1 for i in range(0, 60, 3))


@pytest.mark.parametrize("every", [2, 3])
def test_what_takes_longer_every_other_time_is_no_reason(every: int, clock: Clock) -> None:
    """A penalty on D's gradient, say, is a backward of its own."""
    net = fused(clock, (1.0, 1.0), (1.0, 1.0))
    for i in range(60):
        net.seconds = dict.fromkeys((True, False), (9.0, 9.0) if i % every == 0 else (1.0, 1.0))
        train(net)
    assert not formats.undecided(net) and not any(reordered_now[-10:])


def test_rounds_in_which_a_chain_was_measured_do_not_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    net = fused(clock, (1.0, 1.0), (2.0, 2.0))
    for spent in range(60):
        monkeypatch.setattr(autotune, "spent", lambda spent=spent: spent)
        train(net)
    assert formats.undecided(net)


@pytest.mark.parametrize("why", ["off", "deterministic", "channels_last"])
def test_as_it_is(why: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    net = fused(clock, (9.0, 9.0), (1.0, 1.0))
    if why == "off":
        monkeypatch.setenv("FASTDCGAN_AUTOTUNE", "off")
    if why == "channels_last":
        net.to(memory_format=torch.channels_last)
    torch.use_deterministic_algorithms(why == "deterministic")
    try:
        for _ in range(30):
            train(net)
    finally:
        torch.use_deterministic_algorithms(False)
    assert sum(reordered_now) <= 1  # by which it is seen that nothing comes in another format


def test_what_was_found_is_found_again(clock: Clock) -> None:
    """By another process, for a network like it: from its first call on."""
    net = fused(clock, (2.0, 2.0), (1.0, 1.0))
    for _ in range(50):
        train(net)
    autotune._files.clear()
    reordered_now.clear()
    train(fused(clock, (1.0, 1.0), (2.0, 2.0)))
    assert reordered_now == [True]
    wider = fused(clock, (1.0, 1.0), (2.0, 2.0))
    wider.conv, wider.conv2 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 4, 3, 1, 1)
    train(wider)
    assert reordered_now == [True, False]


def test_a_copy_starts_anew(clock: Clock) -> None:
    net = fused(clock, (2.0, 2.0), (1.0, 1.0))
    for _ in range(50):
        train(net)
    assert net._trials and not copy.deepcopy(net).__dict__["_trials"]
    assert "_trials" not in fastdcgan.unfuse(net).__dict__
