"""How a chain runs on a CPU: the fastest that was measured, PyTorch's own modules among the candidates."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastdcgan
from fastdcgan.dispatch import autotune, router
from fastdcgan.engine import chain, choice, deferred, pending, run
from fastdcgan.engine.deferred import cost_of as deferred_cost
from fastdcgan.engine.module_chain import ModuleChain
from fastdcgan.engine.run import guarding_ms
from tests.helpers.twins import one_thread
from tests.machine import backends_here

pytestmark = pytest.mark.skipif("cpu" not in backends_here(), reason="the choice is that of the backend 'cpu'")

MODULES = choice.MODULES
MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "conv, BN, LeakyReLU": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, True)),
        (4, 3, 8, 8),
    ),
    "two blocks": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(5, 8, 3, 2, 1, 1),
            nn.BatchNorm2d(8, momentum=None),
            nn.ReLU(True),
            nn.Conv2d(8, 4, 3, padding="same", padding_mode="reflect"),
            nn.Tanh(),
        ),
        (4, 5, 6, 6),
    ),
    "norms first and last": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(True), nn.Conv2d(3, 6, 3), nn.ELU(), nn.BatchNorm2d(6)),
        (4, 3, 7, 7),
    ),
    "no statistics kept": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False, track_running_stats=False), nn.ELU()),
        (4, 4, 7, 7),
    ),
    "upsampling": (
        lambda: nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(4, 6, 3, 1, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.UpsamplingNearest2d(scale_factor=2),
            nn.Conv2d(6, 3, 3, 1, 1),
            nn.Tanh(),
        ),
        (4, 4, 4, 4),
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 6, 4, 2, 1)), nn.LeakyReLU(0.2)),
        (4, 3, 8, 8),
    ),
}


class Clock:
    """Stands for `autotune.milliseconds`: each candidate runs once, and took what `times` says."""

    def __init__(self) -> None:
        self.fastest = MODULES
        self.guarding = 0.0  # milliseconds that it costs to come to a chain
        self.measured: list[list[str]] = []

    def __call__(self, calls: dict, device: torch.device, firsts: dict | None = None) -> dict:
        for call in calls.values():
            call()
        if not all(isinstance(name, str) for name in calls):  # algorithms of a contraction
            return dict.fromkeys(calls, 1.0)
        self.measured.append(list(calls))
        return {name: 1.0 if name == self.fastest else 2.0 for name in calls}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    found = Clock()
    monkeypatch.setattr(autotune, "milliseconds", found)
    monkeypatch.setattr(autotune, "_by_rule", False)
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))
    monkeypatch.setattr(autotune, "_spent", 0.0)
    monkeypatch.setattr(run, "guarding_ms", lambda: found.guarding)
    monkeypatch.setattr(pending, "_chains", {})
    monkeypatch.setattr(deferred, "cost_of", lambda mode: pending.Cost(found.guarding, 0.0))
    with one_thread():
        yield found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each call of a chain ran."""
    found: list[str] = []
    as_modules, planned = ModuleChain.as_modules, chain.Planned.__call__

    def modules(*args):
        found.append("modules")
        return as_modules(*args)

    def fused(self, x, tensors, running):
        if not autotune._comparing:
            found.append("in channels_last" if self.plan.channels_last else "fused")
        return planned(self, x, tensors, running)

    monkeypatch.setattr(ModuleChain, "as_modules", modules)
    monkeypatch.setattr(chain.Planned, "__call__", fused)
    return found


def pair(name: str) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A plain model, its fused twin and an input."""
    factory, shape = MODELS[name]
    torch.manual_seed(0)
    plain = factory()
    return plain, fastdcgan.fuse(copy.deepcopy(plain)), torch.randn(shape)


def train(model: nn.Module, x: Tensor, **kwargs) -> Tensor:
    model.zero_grad()
    out = model(x, **kwargs)
    out.square().mean().backward()
    return out.detach()


@pytest.mark.parametrize("name", MODELS)
def test_measuring_and_modules_leave_what_plain_modules_leave(name: str, clock: Clock, runs: list[str]) -> None:
    """Gradients are not added twice, running statistics and the vectors of spectral norm are updated once a call."""
    plain, fused, x = pair(name)
    for i in range(5):
        torch.testing.assert_close(train(fused, x), train(plain, x))
        assert bool(clock.measured) == (i >= autotune.CALLS_BY_RULE)
        for (of, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, msg=lambda m, of=of: f"{of}: {m}")
        for (of, a), b in zip(plain.state_dict().items(), fused.state_dict().values(), strict=True):
            torch.testing.assert_close(b, a, msg=lambda m, of=of: f"{of}: {m}")
    chains = len(clock.measured)
    assert "modules" not in runs[: 3 * chains]
    assert runs[3 * chains :] == []  # from then on the Sequential itself calls its modules
    if name != "spectral norm":  # which goes on by a power iteration at each call
        assert torch.equal(train(fused, x), train(plain, x))  # the very modules, so the very bits


def test_what_is_the_fastest_runs(clock: Clock, runs: list[str]) -> None:
    for fastest, expected in {"fused in contiguous": "fused", "fused in channels_last": "in channels_last"}.items():
        clock.fastest = fastest
        _, fused, x = pair("conv, BN, LeakyReLU")
        with autotune.at_once():
            train(fused, x[: len(clock.measured) + 1])  # another signature each time
            assert train(fused, x[: len(clock.measured)]).is_contiguous()
        assert runs[-2:] == [expected] * 2
        assert clock.measured[-1] == [MODULES, "fused in contiguous", "fused in channels_last"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_long_chain_is_only_compared_with_modules_where_there_is_time(
    at_once: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ["fused in contiguous", "fused in channels_last"]
    monkeypatch.setattr(router, "milliseconds_besides", lambda call: 2 * choice.LONG_MS)
    for _ in range(2):  # by what is measured, and by what the cache has
        _, fused, x = pair("conv, BN, LeakyReLU")
        with autotune.at_once() if at_once else contextlib.nullcontext():
            for _ in range(autotune.CALLS_BY_RULE + 1):
                train(fused, x)
        assert clock.measured == [ours if at_once else [MODULES, *ours]]
        autotune._files.clear()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [True, False])
def test_contractions_run_as_they_did_while_the_chain_was_measured(name: str, grad: bool, clock: Clock) -> None:
    """Or what was measured says nothing of what runs."""
    clock.fastest = "fused in contiguous"
    _, fused, x = pair(name)
    with torch.set_grad_enabled(grad):
        with autotune.at_once():
            fused(x)
        with router.recording() as seen:
            out = fused(x)
            if grad:
                out.square().mean().backward()
    assert len(seen) >= (2 if grad else 1)
    assert [each for each in seen if "not measured" in each] == []


def test_while_a_chain_is_measured_nothing_waits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules are those of PyTorch, also where a forward calls it whose convolutions wait."""
    waited: list[bool] = []
    run_call = pending.run_call
    monkeypatch.setattr(pending, "run_call", lambda *args: waited.append(autotune._comparing) or run_call(*args))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.first(x).relu())

    for fastest in (MODULES, choice.CONTIGUOUS):
        clock.fastest = fastest
        net = fastdcgan.fuse(Net()).to(memory_format=torch.channels_last)
        with autotune.at_once():
            train(net, torch.ones(len(clock.measured) + 2, 3, 9, 9))  # another signature each time
    assert waited and not any(waited) and len(clock.measured) == 4


@pytest.mark.parametrize("name", MODELS)
def test_modules_in_contiguous(name: str, clock: Clock) -> None:
    """What is channels_last may be computed in contiguous: what comes of it is in channels_last all the same."""
    clock.fastest = choice.CONTIGUOUS
    plain, fused, x = pair(name)
    x, found = x.to(memory_format=torch.channels_last), []
    for model in (plain, fused):
        leaf, given = x.clone().requires_grad_(), model.to(memory_format=torch.channels_last)
        with autotune.at_once():
            for _ in range(3):
                out = given(leaf)
                grads = torch.autograd.grad(out.square().mean(), [leaf, *given.parameters()])
        found.append([out, *grads, *given.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)
        assert b.stride() == a.stride()
    assert clock.measured[0] == [MODULES, "fused", choice.CONTIGUOUS]
    (row, *_) = fastdcgan.explain(fused, x)
    assert not row.fused and f"{choice.CONTIGUOUS} 1.0000 ms" in row.why


def test_a_backend_by_name_is_not_replaced(clock: Clock, runs: list[str]) -> None:
    _, fused, x = pair("conv, BN, LeakyReLU")
    with autotune.at_once():
        train(fused, x)
        with fastdcgan.backend("cpu"):
            train(fused, x)
            train(fused, x)
        train(fused, x)
    assert runs == ["fused"] * 3  # and then the modules
    assert clock.measured[1] == ["fused in contiguous", "fused in channels_last"]


def test_another_signature_is_another_choice(clock: Clock, runs: list[str]) -> None:
    _, fused, x = pair("conv, BN, LeakyReLU")
    with autotune.at_once():
        train(fused, x)
        train(fused, x)
        with torch.no_grad():
            fused(x)
        train(fused, x[:2])
        train(fused, x)
    assert len(clock.measured) == 3
    assert runs.count("fused") == 3


def test_what_was_measured_is_found_again(clock: Clock, runs: list[str]) -> None:
    with autotune.at_once():
        train(pair("conv, BN, LeakyReLU")[1], pair("conv, BN, LeakyReLU")[2])
    autotune._files.clear()  # as another process
    _, fused, x = pair("conv, BN, LeakyReLU")
    runs.clear()
    train(fused, x)
    train(fused, x)
    assert len(clock.measured) == 1
    assert runs == ["fused"]  # and then the modules


@pytest.mark.parametrize("why", ["deterministic", "off", "budget"])
def test_when_nothing_is_measured(why: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "off":
        monkeypatch.setattr(autotune, "_by_rule", True)
    elif why == "budget":
        monkeypatch.setattr(autotune, "_spent", 1e6)
    _, fused, x = pair("conv, BN, LeakyReLU")
    torch.use_deterministic_algorithms(why == "deterministic")
    try:
        for _ in range(4):
            train(fused, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not clock.measured


def test_statistics_of_parts(clock: Clock, runs: list[str]) -> None:
    plain, fused, x = pair("conv, BN, LeakyReLU")
    with autotune.at_once():
        for _ in range(2):
            expected = torch.cat([plain(part) for part in x.chunk(2)])
            torch.testing.assert_close(train(fused, x, stat_groups=2), expected.detach())
    assert runs == ["fused", "modules"]
    torch.testing.assert_close(fused[1].running_var, plain[1].running_var)
    assert fused[1].num_batches_tracked == 4


@pytest.mark.parametrize("spectral", [False, True])
def test_a_bare_convolution_is_fused_once_it_was_measured(spectral: bool, clock: Clock, runs: list[str]) -> None:
    clock.fastest = "fused in channels_last"
    conv = nn.Conv2d(4, 6, 3, 1, 1)
    plain = nn.Sequential(nn.Dropout(0.0), nn.utils.spectral_norm(conv) if spectral else conv, nn.Dropout(0.0))
    fused, x = fastdcgan.fuse(copy.deepcopy(plain)), torch.randn(3, 4, 8, 8)
    for _ in range(autotune.CALLS_BY_RULE + 2):
        torch.testing.assert_close(train(fused, x), train(plain, x))
        for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)
    for a, b in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(b, a)
    # What makes the weight would be called twice if the module ran while the chain is measured.
    assert runs == (["modules"] if spectral else ["modules"] * 2 + ["in channels_last"] * 2)
    if not spectral:
        torch.testing.assert_close(fused(x[0]), plain(x[0]))
        (row,) = fastdcgan.explain(fused, x)
        assert row.fused and row.pattern == "Conv2d"


def test_explain_says_so(clock: Clock) -> None:
    _, fused, x = pair("conv, BN, LeakyReLU")
    (row,) = fastdcgan.explain(fused, x)
    assert not row.fused
    assert row.why.startswith(f"runs as PyTorch's own: measured: {MODULES} 1.0000 ms, fused")
    clock.fastest = "fused in channels_last"
    (row,) = fastdcgan.explain(fused, x[:3])
    assert row.fused and row.backend == "cpu"


@pytest.mark.parametrize("cost", [guarding_ms, lambda: deferred_cost(deferred.Deferring).waiting])
def test_what_it_costs_to_come_to_a_chain_is_found_without_random_numbers(cost: Callable[[], float]) -> None:
    guarding_ms.cache_clear()
    deferred_cost.cache_clear()
    before = torch.get_rng_state()
    assert cost() >= 0
    assert torch.equal(torch.get_rng_state(), before)


class Own(nn.Module):
    """A block in a forward of its own."""

    def __init__(self, block: nn.Sequential) -> None:
        super().__init__()
        self.conv, self.bn, self.act = block

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


@pytest.mark.parametrize("make", [nn.Identity, Own])
@pytest.mark.parametrize("guarding", [0.1, 2.0])
def test_what_gains_less_than_it_costs_to_come_to_it_runs_plain(make: type, guarding: float, clock: Clock) -> None:
    """A chain of 1 ms where PyTorch's modules take 2, of which nine tenths count: to come to it costs less or more."""
    clock.fastest, clock.guarding = "fused in contiguous", guarding
    plain = MODELS["conv, BN, LeakyReLU"][0]()
    model = plain if make is nn.Identity else make(plain)
    fused, x = fastdcgan.fuse(copy.deepcopy(model)), torch.randn(4, 3, 8, 8)
    for _ in range(autotune.CALLS_BY_RULE + 2):
        torch.testing.assert_close(train(fused, x), train(model, x))
    assert clock.measured
    (row,) = fastdcgan.explain(fused, x)
    assert row.fused == (guarding < 1.0)
    assert row.fused or "would gain 0.800 ms" in row.why
    assert torch.equal(train(fused, x), train(model, x)) != row.fused  # the very modules give the very bits


@pytest.mark.parametrize("make", [nn.Identity, Own])
@pytest.mark.parametrize(("fastest", "guarding"), [(MODULES, 0.0), ("fused in contiguous", 2.0)])
def test_what_a_checkpoint_computes_again_runs_as_it_did(
    make: type, fastest: str, guarding: float, clock: Clock
) -> None:
    """Though its first call finds out that PyTorch's modules should run from then on."""
    clock.fastest, clock.guarding = fastest, guarding
    plain, x = MODELS["conv, BN, LeakyReLU"][0](), torch.randn(4, 3, 8, 8, requires_grad=True)
    model = plain if make is nn.Identity else make(plain)
    with autotune.at_once():
        train(fastdcgan.fuse(copy.deepcopy(model)), x)  # so that the cache knows it
    pending._chains.clear()
    fused = fastdcgan.fuse(model)
    for _ in range(3):
        checkpoint(fused, x, use_reentrant=False).square().mean().backward()
    assert len(clock.measured) == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["conv, BN, LeakyReLU", "spectral norm"])
def test_the_compiler_gets_modules_where_they_are_the_fastest(name: str, dynamic: bool, clock: Clock) -> None:
    """Measured while the call is traced: nothing is computed, no gradient added, no buffer updated by it."""
    for clock.fastest in (choice.COMPILED, "fused"):
        plain, fused, x = pair(name)
        targets: list[str] = []

        def compile_with(graph: torch.fx.GraphModule, inputs: list, targets: list[str] = targets) -> Callable:
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend=compile_with)
        batches = len(clock.measured) + 2  # that no entry of the cache is of
        for n in (batches, batches + 1):
            x = torch.randn(n, *x.shape[1:])
            torch.testing.assert_close(train(compiled, x), train(plain, x))
        for (of, a), b in zip(plain.state_dict().items(), fused.state_dict().values(), strict=True):
            torch.testing.assert_close(b, a, msg=lambda m, of=of: f"{of}: {m}")
        as_modules = any("conv2d" in t and "fastdcgan" not in t for t in targets)
        assert as_modules == (clock.fastest == choice.COMPILED), targets
    assert clock.measured and all(each == [choice.COMPILED, "fused"] for each in clock.measured)


def test_the_compiler_gets_no_module_that_breaks_the_graph(clock: Clock) -> None:
    clock.fastest = choice.COMPILED
    _, fused, x = pair("two blocks")
    fused[1].momentum = None  # PyTorch's BatchNorm then reads the count of batches
    torch._dynamo.reset()
    torch.compile(fused, fullgraph=True, backend="eager")(x)
    assert len(clock.measured) == 1  # the other chain
