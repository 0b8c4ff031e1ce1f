"""Hooks on any module see what they see in vanilla PyTorch; when they are gone the block runs fused again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import prune

import fastdcgan
from tests.helpers.networks import IMAGE
from tests.helpers.twins import assert_same, build, draw, one_thread, results

Seen = list[tuple[str, list[Tensor]]]


def network() -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.LeakyReLU(0.2))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), inner, nn.Conv2d(5, 2, 1), nn.Tanh()
    )


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for item in values for t in tensors(item)]


REGISTER: dict[str, Callable[[nn.Module, Callable], Any]] = {
    "forward": lambda m, see: m.register_forward_hook(lambda module, x, out: see("forward", x, out)),
    "forward with kwargs": lambda m, see: m.register_forward_hook(
        lambda module, x, kwargs, out: see("forward", x, kwargs, out), with_kwargs=True
    ),
    "forward pre": lambda m, see: m.register_forward_pre_hook(lambda module, x: see("pre", x)),
    "forward pre with kwargs": lambda m, see: m.register_forward_pre_hook(
        lambda module, x, kwargs: see("pre", x, kwargs), with_kwargs=True
    ),
    "full backward": lambda m, see: m.register_full_backward_hook(lambda module, dx, dy: see("backward", dx, dy)),
    "full backward pre": lambda m, see: m.register_full_backward_pre_hook(lambda module, dy: see("backward pre", dy)),
    "changed output": lambda m, see: m.register_forward_hook(lambda module, x, out: see("forward", x) or out * 2),
    "changed input": lambda m, see: m.register_forward_pre_hook(lambda module, x: see("pre", x) or (x[0] * 2,)),
    "changed gradient": lambda m, see: m.register_full_backward_hook(
        lambda module, dx, dy: see("backward", dy) or tuple(None if d is None else d * 2 for d in dx)
    ),
}


def recorder(seen: Seen) -> Callable[..., None]:
    return lambda kind, *values: seen.append((kind, tensors(list(values))))


@pytest.mark.parametrize("before_fuse", [True, False], ids=["registered before", "registered after"])
@pytest.mark.parametrize("where", ["", "0", "1", "2", "3", "3.0", "3.1", "3.2", "4", "5"])
@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_see_what_vanilla_shows_them(kind: str, where: str, before_fuse: bool, device: torch.device) -> None:
    x = draw(IMAGE, torch.float64, device)
    found = []
    for fused in (False, True):
        model, seen = build(network, torch.float64, device), Seen()
        if fused and not before_fuse:
            fastdcgan.fuse(model)
        handle = REGISTER[kind](model.get_submodule(where), recorder(seen))
        if fused and before_fuse:
            fastdcgan.fuse(model)
        passed = results(model, x)
        assert len(seen) == 2  # one per step
        handle.remove()
        after = results(model, x)
        assert len(seen) == 2
        found.append((seen, passed, after))
    vanilla, fused_found = found
    for (kind_a, values_a), (kind_b, values_b) in zip(vanilla[0], fused_found[0], strict=True):
        assert kind_a == kind_b
        assert len(values_a) == len(values_b)
        for a, b in zip(values_a, values_b, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
    assert_same(vanilla[1], fused_found[1])
    assert_same(vanilla[2], fused_found[2])


def test_a_block_runs_unfused_while_it_has_a_hook() -> None:
    model = fastdcgan.fuse(network())
    assert [row.fused for row in fastdcgan.explain(model)] == [True, True, True]
    handles = [model[i].register_forward_hook(lambda *args: None) for i in (0, 5)]
    handles.append(model[3].register_forward_hook(lambda *args: None))
    rows = fastdcgan.explain(model)
    assert {row.name: row.fused for row in rows} == {
        "0": False,
        "1": True,
        "3.0": True,
        "4": False,
        "5": False,
    }
    assert "hooks" in rows[0].why
    for handle in handles:
        handle.remove()
    assert [row.fused for row in fastdcgan.explain(model)] == [True, True, True]


@pytest.fixture
def global_forward_hook() -> Iterator[Seen]:
    seen: Seen = []
    handles = [
        global_hooks.register_module_forward_pre_hook(lambda m, x: seen.append((type(m).__name__, tensors(x)))),
        global_hooks.register_module_forward_hook(lambda m, x, out: seen.append((type(m).__name__, tensors([x, out])))),
        global_hooks.register_module_full_backward_hook(lambda m, dx, dy: seen.append(("backward", tensors([dx, dy])))),
    ]
    yield seen
    for handle in handles:
        handle.remove()


@one_thread()
def test_global_hooks_see_every_module(global_forward_hook: Seen, device: torch.device) -> None:
    x, found = draw(IMAGE, torch.float64, device), []
    for fused in (False, True):
        model = build(network, torch.float64, device)
        results(fastdcgan.fuse(model) if fused else model, x)
        found.append([*global_forward_hook])
        global_forward_hook.clear()
    assert len(found[0]) == 2 * 3 * 10  # steps, hooks, modules
    for (name_a, values_a), (name_b, values_b) in zip(*found, strict=True):
        assert name_b.removeprefix("Fused") == name_a
        for a, b in zip(values_a, values_b, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_an_inner_forward_that_was_replaced_is_called(device: torch.device) -> None:
    model = fastdcgan.fuse(build(network, torch.float64, device))
    x = draw(IMAGE, torch.float64, device)
    plain = model(x)
    model[2].forward = lambda z: torch.zeros_like(z)
    assert not torch.equal(model(x), plain)
    assert "replaced" in {row.name: row.why for row in fastdcgan.explain(model)}["2"]
    del model[2].forward

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    own = fastdcgan.fuse(
        nn.Sequential(Doubled(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()).to(device, torch.float64)
    )
    torch.testing.assert_close(own[:2](x), own[1](own[0](x)))
    rows = fastdcgan.explain(own)
    assert "forward of its own" in rows[0].why
    assert rows[-1].fused


def test_pruning_keeps_its_mask(device: torch.device) -> None:
    found = []
    for fused in (False, True):
        model = build(network, torch.float64, device)
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        found.append(results(fastdcgan.fuse(model) if fused else model, draw(IMAGE, torch.float64, device)))
    assert_same(*found)
