"""What a CUDA graph's capture forbids, found on a CPU: nothing in a step copies from the host or asks for a value; and
how a change of what a graph took for granted is noticed."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdcgan
from fastdcgan.capture import Captured, Granted
from fastdcgan.optim import FusedAdam
from fastdcgan.train_step import GradientPenalty
from tests.machine import DEVICE, backends_here

# Operators that make a tensor of numbers of Python's (torch.tensor, as_tensor), or ask the device for a value.
FORBIDDEN = {
    "lift", "lift_fresh", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave.Tensor", "_pin_memory",
}  # fmt: skip


class Watched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(getattr(i, "dtype", None) == torch.bool for i in args[1])
        if masks or {name, str(func).removeprefix("aten.")} & FORBIDDEN:
            where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[-6:-1]]
            self.found.append(f"{func} by {' < '.join(reversed(where))}")
        return func(*args, **(kwargs or {}))


def test_what_is_forbidden_is_found() -> None:
    x = torch.ones(3, device=DEVICE)
    for call in (lambda: torch.tensor([1.0]), x.sum().item, lambda: x[x > 0], lambda: bool(x[0]), x.unique):
        with Watched() as watched:
            call()
        assert len(watched.found) >= 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [None, "wgan-gp", "r1"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for dtype in (None, torch.bfloat16, torch.float16, torch.float64)
        for name in backends_here(torch.float64 if dtype == torch.float64 else torch.float32)
    ],
    ids=str,
)
def test_a_step_asks_nothing_of_the_host(
    name: str, dtype: torch.dtype | None, kind: str | None, accumulate: int
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with fastdcgan.backend(name):
        generator = fastdcgan.Generator(32, nz=8, ngf=4).to(DEVICE, wide)
        discriminator = fastdcgan.Discriminator(32, ndf=4).to(DEVICE, wide)
        optimizers = (FusedAdam(net.parameters(), capturable=True) for net in (generator, discriminator))
        step = fastdcgan.GANStep(
            generator,
            discriminator,
            *optimizers,
            noise=(8,),
            dtype=None if dtype == wide else dtype,
            scaler=torch.amp.GradScaler(DEVICE.type) if dtype == torch.float16 else None,
            penalty=None if kind is None else GradientPenalty(1.0, kind),
            accumulate=accumulate,
            ema=0.99,
            graph=False,
        )
        real, z = torch.rand(4, 3, 32, 32, device=DEVICE, dtype=wide), torch.randn(4, 8, device=DEVICE, dtype=wide)
        step.warm_up(real, z)
        step._settle_rates()
        with Watched() as watched:
            step(real, z)
    assert watched.calls > 50
    assert not watched.found, "\n".join(watched.found)


def test_a_step_with_labels_asks_nothing_of_the_host() -> None:
    nets = [fastdcgan.Generator(32, nz=8, ngf=4, classes=3), fastdcgan.Discriminator(32, ndf=4, classes=3)]
    optimizers = [FusedAdam(net.to(DEVICE).parameters(), capturable=True) for net in nets]
    step = fastdcgan.GANStep(*nets, *optimizers, noise=(8,), graph=False)
    real, labels = torch.rand(4, 3, 32, 32, device=DEVICE), torch.tensor([0, 2, 1, 2], device=DEVICE)
    step.warm_up(real, None, labels)
    step._settle_rates()
    with Watched() as watched:
        step(real, labels=labels)
    assert watched.calls > 50
    assert not watched.found, "\n".join(watched.found)


def test_a_replay_reads_the_inputs_that_it_is_given() -> None:
    """All of them, into the memory that was captured; one that is not there is left out."""
    real, labels = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    seen = []

    class Graph:
        def replay(self) -> None:
            seen.append((real.clone(), labels.clone()))

    captured = Captured(Graph(), torch.arange(6.0), (real, None, labels))  # type: ignore[arg-type]
    metrics = captured(torch.tensor([1.0, 2.0]), None, torch.tensor([3, 4]))
    assert [t.tolist() for t in seen[0]] == [[1.0, 2.0], [3, 4]]
    assert metrics.penalty == 5


def test_what_is_unchanged_is_seen_at_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = (fastdcgan.Generator(32, nz=8, ngf=4), fastdcgan.Discriminator(32, ndf=4))
    optimizers = [FusedAdam(net.parameters()) for net in nets]
    for optimizer in optimizers:
        optimizer.prepare()
    granted = Granted(nets, optimizers)
    looks = []
    look = Granted._look
    monkeypatch.setattr(Granted, "_look", lambda self: looks.append(self) or look(self))
    assert granted.holds() and granted.holds() and not looks
    nets[0].note = object()  # somebody's own attribute: looked at once
    assert granted.holds() and granted.holds() and len(looks) == 1
    state = optimizers[0].state[next(nets[0].parameters())]
    state["exp_avg"] = state["exp_avg"].clone()
    assert not granted.holds()
    granted = Granted(nets, optimizers)
    optimizers[1].param_groups[0]["betas"] = (0.1, 0.2)
    assert not granted.holds()
