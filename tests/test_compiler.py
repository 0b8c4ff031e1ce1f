"""Backends of torch.compile: blocks fused in whatever style, the same numbers, options and refusals as without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdcgan.dispatch import autotune, primitives
from fastdcgan.engine import choice, pending
from tests.helpers.twins import assert_same, build, draw, one_thread, results
from tests.machine import backends_here
from tests.models import SMALL

BACKENDS = ("fastdcgan", "fastdcgan_inductor")
OWN = ("resnet-18, called one by one", "unet, called one by one", "srgan generator", "style transfer network")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the chains that run, or are traced, fused."""
    found: list[int] = []
    run = pending._CallChain.run

    def counted(self, *args):
        found.append(len(self._blocks))
        return run(self, *args)

    monkeypatch.setattr(pending._CallChain, "run", counted)
    return found


@one_thread()
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", [*OWN, "pix2pix unet", "dcgan discriminator", "resnet-18, pre-activated"])
def test_the_same_results(name: str, train: bool, device: torch.device, chains: list[int]) -> None:
    factory, shape = SMALL[name]
    x = draw(shape, torch.float64, device)
    plain = build(factory, torch.float64, device).train(train)
    model = copy.deepcopy(plain)
    model.compile(backend="fastdcgan")
    for _ in range(2):
        assert_same(results(plain, x), results(model, x))
    assert sum(chains) >= 4


@one_thread()
@pytest.mark.parametrize("name", OWN[:1])
def test_inductor_makes_the_rest(name: str, device: torch.device, chains: list[int]) -> None:
    factory, shape = SMALL[name]
    x = draw(shape, torch.float32, device)
    plain = build(factory, torch.float32, device)
    model = copy.deepcopy(plain)
    model.compile(backend="fastdcgan_inductor")
    expected, found = results(plain, x), results(model, x)
    assert expected.keys() == found.keys()
    for step in ("output 0", "output 1"):
        torch.testing.assert_close(found[step], expected[step])
    for (key, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=lambda m, key=key: f"{key}: {m}")
    assert sum(chains) >= 4


@pytest.mark.skipif("cpu" not in backends_here(), reason="the choice is that of the backend 'cpu'")
@pytest.mark.parametrize("fastest", [choice.COMPILED, "fused"])
def test_inductor_gets_what_is_the_fastest(
    fastest: str, chains: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def milliseconds(calls: dict, device: torch.device, firsts: dict | None = None) -> dict:
        for call in calls.values():
            call()
        return {name: 1.0 if name == fastest else 2.0 for name in calls}

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(autotune, "_by_rule", False)
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Tanh())
    model, x = copy.deepcopy(plain), torch.randn(4, 3, 9, 9)
    compiled = torch.compile(model, backend="fastdcgan_inductor", dynamic=True)
    for batch in (4, 3):
        torch.testing.assert_close(compiled(x[:batch]), plain(x[:batch]))
    assert bool(chains) == (fastest == "fused")
    torch.testing.assert_close(model[1].running_var, plain[1].running_var)
    assert not primitives._watched


@one_thread()
def test_breaks_of_the_graph_and_gradients_of_gradients(device: torch.device, chains: list[int]) -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.conv1(x))
            torch._dynamo.graph_break()
            return torch.nn.functional.silu(self.conv2(h))

    plain = build(Critic, torch.float64, device)
    model = copy.deepcopy(plain)
    model.compile(backend="fastdcgan")
    found = []
    for net in (plain, model):
        x = draw((2, 3, 8, 8), torch.float64, device).requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert_same(*found)
    assert len(chains) == 2
