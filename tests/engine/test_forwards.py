"""How a forward runs: by what its calls took, and by nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastdcgan
from fastdcgan.dispatch import autotune
from fastdcgan.engine import deferred, forwards, reordered
from fastdcgan.engine.choice import MODULES
from fastdcgan.engine.forwards import AS_IT_IS, CHANNELS_LAST, PLAIN
from fastdcgan.engine.pending import Cost

SHAPE = (2, 3, 8, 8)
WAYS = {"as_it_is": AS_IT_IS, "channels_last": CHANNELS_LAST, "plain": PLAIN}
Seconds = dict[str, tuple[float, float]]  # forward and backward


class Clock:
    """One that only goes on where a network says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Passes(torch.autograd.Function):
    """Takes its time, forward and backward, by the way that the forward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, seconds: Seconds) -> Tensor:
        ahead, ctx.back = seconds[ran[-1]]
        ctx.clock = clock
        clock.now += ahead
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.clock.now += ctx.back
        return grad, None, None


ran: list[str] = []  # of each call, how


class Net(nn.Module):
    def __init__(self, clock: Clock, seconds: Seconds) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        ran.append(CHANNELS_LAST if reordered.is_on() else PLAIN if forwards.is_plain() else AS_IT_IS)
        x = torch.relu(self.conv2(torch.relu(self.conv(x))))
        return Passes.apply(x, self.clock, self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))
    monkeypatch.setattr(forwards, "time", clock)
    monkeypatch.setattr(autotune, "consulted", lambda device: True)
    monkeypatch.setattr(autotune, "may_begin", lambda calls: False)  # chains run by the rule
    ran.clear()
    yield clock
    ran.clear()


def fused(clock: Clock, **faster: tuple[float, float]) -> Net:
    """A second forward and one backward, but for what is faster: `plain`, `channels_last`, `as_it_is`."""
    return fastdcgan.fuse(Net(clock, {way: faster.get(name, (1.0, 1.0)) for name, way in WAYS.items()}))


def train(net: nn.Module, calls: int = 1) -> None:
    sum(net(torch.ones(SHAPE)).sum() for _ in range(calls)).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("fast", [(0.5, 1.0), (1.0, 0.5)], ids=["forward", "backward"])
@pytest.mark.parametrize("fastest", WAYS)
def test_the_fastest_one_runs(fastest: str, fast: tuple[float, float], clock: Clock) -> None:
    net = fused(clock, **{fastest: fast})
    for _ in range(90):
        train(net)
    assert not forwards.undecided(net)
    assert set(ran[:6]) == {AS_IT_IS}  # a short script has one way
    assert set(ran[:40]) == set(WAYS.values())
    assert set(ran[-10:]) == {WAYS[fastest]}


def test_what_is_measured_at_once_never_runs_plain(clock: Clock) -> None:
    net = fused(clock, plain=(0.1, 0.1), channels_last=(0.5, 0.5))
    with autotune.at_once():
        for _ in range(90):
            train(net)
    assert set(ran) == {AS_IT_IS, CHANNELS_LAST} and ran[-1] == CHANNELS_LAST


def test_what_gains_little_runs_plain(clock: Clock) -> None:
    net = fused(clock, as_it_is=(0.98, 0.98), channels_last=(0.98, 0.98))
    for _ in range(90):
        train(net)
    assert not forwards.undecided(net) and set(ran[-10:]) == {PLAIN}


def test_a_small_gain_changes_no_format(clock: Clock) -> None:
    net = fused(clock, as_it_is=(0.9, 0.9), channels_last=(0.88, 0.88))
    for _ in range(90):
        train(net)
    assert not forwards.undecided(net) and set(ran[-10:]) == {AS_IT_IS}


def test_without_gradients_each_call_is_a_round(clock: Clock) -> None:
    net = fused(clock, channels_last=(0.5, 0.0))
    with torch.no_grad():
        for _ in range(90):
            net(torch.ones(SHAPE))
    assert ran[-1] == CHANNELS_LAST


def test_calls_of_one_backward_run_in_one_way(clock: Clock) -> None:
    net = fused(clock)
    for _ in range(20):
        train(net, calls=3)
    assert set(ran) == set(WAYS.values())
    assert all(len(set(ran[i : i + 3])) == 1 for i in range(0, 60, 3))


@pytest.mark.parametrize("every", [2, 3])
def test_what_takes_longer_every_other_time_is_no_reason(every: int, clock: Clock) -> None:
    """A penalty on D's gradient, say, is a backward of its own."""
    net = fused(clock)
    for i in range(90):
        net.seconds = dict.fromkeys(WAYS.values(), (9.0, 9.0) if i % every == 0 else (1.0, 1.0))
        train(net)
    assert not forwards.undecided(net) and set(ran[-10:]) == {PLAIN}


def test_rounds_in_which_a_chain_was_measured_do_not_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    net = fused(clock)
    for spent in range(90):
        monkeypatch.setattr(autotune, "spent", lambda spent=spent: spent)
        train(net)
    assert forwards.undecided(net)


@pytest.mark.parametrize("why", ["off", "deterministic"])
def test_as_it_is(why: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    net = fused(clock, plain=(0.1, 0.1), channels_last=(0.1, 0.1))
    if why == "off":
        monkeypatch.setattr(autotune, "_by_rule", True)
    torch.use_deterministic_algorithms(why == "deterministic")
    try:
        for _ in range(40):
            train(net)
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(ran) == {AS_IT_IS}


def test_what_was_measured_is_asked_no_more(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With deterministic algorithms, or on another device."""
    net = fused(clock, plain=(0.5, 0.5))
    for _ in range(90):
        train(net)
    assert ran[-1] == PLAIN
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "consulted", lambda device: False)
        train(net)
    assert ran[-1] == AS_IT_IS
    net.to("meta")(torch.ones(SHAPE, device="meta"))
    assert ran[-1] == AS_IT_IS


def test_what_is_channels_last_has_no_other_format(clock: Clock) -> None:
    net = fused(clock, plain=(0.5, 0.5)).to(memory_format=torch.channels_last)
    for _ in range(90):
        train(net)
    assert ran.count(CHANNELS_LAST) == 1  # by which that is seen
    assert ran[-1] == PLAIN


def test_explain_says_that_it_runs_plain(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(calls: dict, device: torch.device, firsts: dict | None = None) -> dict:
        return {name: 2.0 if name == MODULES else 1.0 for name in calls}

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)  # by which every chain runs fused
    monkeypatch.setattr(deferred, "cost_of", lambda mode: Cost(0.0, 0.0))
    net = fused(clock, plain=(0.5, 0.5))
    for _ in range(90):
        train(net)
    rows = fastdcgan.explain(net, torch.ones(SHAPE))
    assert rows and not any(row.fused for row in rows)
    assert f"measured in its network: {PLAIN} 1000.0000 ms, {AS_IT_IS} 2000.0000 ms" in rows[0].why


def test_plain_modules_leave_what_plain_modules_leave(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Dropout(0.0))
    fused, x = fastdcgan.fuse(copy.deepcopy(plain)), torch.randn(SHAPE)
    monkeypatch.setattr(forwards.Trial, "_turn", lambda trial: PLAIN)
    for net in (plain, fused):
        for _ in range(2):
            net(x).square().sum().backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(b.grad, a.grad)
    assert all(map(torch.equal, plain.buffers(), fused.buffers()))


def test_what_was_found_is_found_again(clock: Clock) -> None:
    """By another process, for a network like it: from its first call on."""
    net = fused(clock, channels_last=(0.5, 0.5))
    for _ in range(90):
        train(net)
    autotune._files.clear()
    ran.clear()
    train(fused(clock))
    assert ran == [CHANNELS_LAST]
    wider = fused(clock)
    wider.conv, wider.conv2 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 4, 3, 1, 1)
    train(wider)
    assert ran == [CHANNELS_LAST, AS_IT_IS]


def test_a_copy_starts_anew(clock: Clock) -> None:
    net = fused(clock)
    for _ in range(90):
        train(net)
    assert net._trials and not copy.deepcopy(net).__dict__["_trials"]
    assert "_trials" not in fastdcgan.unfuse(net).__dict__


def test_which_calls_are_alike() -> None:
    net, x = nn.Identity(), torch.ones(SHAPE)
    alike = forwards.glance(net, (x,), {})
    assert alike == forwards.glance(net, (torch.zeros(SHAPE),), {}) is not None
    others = [
        forwards.glance(net, args, kwargs)
        for args, kwargs in (
            ((x[:1],), {}), ((x.double(),), {}), ((x.clone().requires_grad_(),), {}), ((x, x), {}), ((x, True), {}),
            ((), {"x": x}), ((x,), {"features": True}), ((x,), {"features": False}), ((x,), {"mode": "nearest"}),
        )
    ]  # fmt: skip
    others += [forwards.glance(net.eval(), (x,), {}), forwards.glance(net.eval(), (x,), {}, (2,))]
    assert len({alike, *others}) == len(others) + 1 and None not in others
    assert forwards.glance(net, (x, 0.5), {}) is forwards.glance(net, ([x],), {}) is None


def test_who_follows_each_function_is_not_measured(clock: Clock) -> None:
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    net = fused(clock, plain=(0.1, 0.1), channels_last=(0.1, 0.1))
    with Watch():
        for _ in range(90):
            train(net)
    assert set(ran) == {AS_IT_IS} and not net.__dict__.get("_trials")
