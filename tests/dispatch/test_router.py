"""What "auto" does on a GPU, with backends and times that stand in for one: routes, and boundaries of chains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdcgan
from fastdcgan import backends
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.dispatch import autotune, primitives
from fastdcgan.dispatch.router import LIBRARY, AutoBackend, fastest
from fastdcgan.engine import planner
from fastdcgan.geometry import Geometry
from fastdcgan.spec import STORE, Boundaries, Operand, Plan
from tests.helpers.twins import assert_same, discriminator, generator, numbers, outcome, twin


class Own(ReferenceBackend):
    """A backend with kernels of its own for every convolution but those with groups."""

    name = "own"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls = 0

    def why_not(self, op: str, *args: Any) -> str | None:
        return "it has no groups" if args[2].groups > 1 else None

    def conv(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return super().conv(*args)

    def boundaries(self, blocks: Any, weights: Any, size: Any, needs: Any) -> Boundaries:
        n = len(blocks)
        return Boundaries((True,) * (n - 1), (True,) * (n - 1), (False,) * n)


class Measuring:
    """Stands in for a GPU's clock."""

    def __init__(self) -> None:
        self.allowed = True
        self.times: Callable[[Any], float] = lambda name: 1.0
        self.asked: list[list[Any]] = []

    def milliseconds(self, calls: dict[Any, Callable], device: torch.device) -> dict[Any, float]:
        self.asked.append(list(calls))
        for call in calls.values():
            call()
        return {name: self.times(name) for name in calls}


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measuring:
    found = Measuring()
    monkeypatch.setenv("FASTDCGAN_MEASURED", str(tmp_path / "measured.json"))
    monkeypatch.setattr(autotune, "_files", {})
    monkeypatch.setattr(planner, "_known", {})
    monkeypatch.setattr(autotune, "milliseconds", found.milliseconds)
    for name in ("may_compare", "may_search"):
        monkeypatch.setattr(autotune, name, lambda device: found.allowed)
    return found


def explained(backend: AutoBackend, groups: int = 1) -> str:
    """Where a convolution goes."""
    backend.seen = []
    x, w = numbers(2, 4, 5, 5), numbers(6, 4 // groups, 3, 3)
    out, _ = backend.conv(Operand(x), w, Geometry((3, 3), groups=groups), STORE)
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, w, groups=groups))
    return backend.seen[0]


def test_unmeasured_calls_run_in_our_kernels(clock: Measuring) -> None:
    clock.allowed = False
    assert explained(AutoBackend([Own()])) == "own: not measured"
    assert clock.asked == []


def test_it_is_measured_as_soon_as_that_is_welcome(clock: Measuring) -> None:
    clock.allowed = False
    backend = AutoBackend([Own()])
    explained(backend)
    clock.allowed = True
    assert explained(backend).startswith("own: measured: own 1.0000 ms, pytorch 1.0000 ms")
    explained(backend)
    assert clock.asked == [["own", LIBRARY]]


@pytest.mark.parametrize(("library", "expected"), [(0.98, "own"), (0.96, LIBRARY), (1.5, "own")])
def test_what_is_faster_by_more_than_noise_is_taken(clock: Measuring, library: float, expected: str) -> None:
    clock.times = {"own": 1.0, LIBRARY: library}.__getitem__
    own = Own()
    backend = AutoBackend([own])
    assert explained(backend).startswith(f"{expected}: measured: own 1.0000 ms, pytorch {library:.4f} ms")
    before = own.calls
    explained(backend)
    assert own.calls == before + (expected == "own")


def test_the_first_of_those_as_fast_as_the_fastest() -> None:
    assert fastest({"a": 1.2, "b": 1.02, "c": 1.0}) == "b"
    assert fastest({"a": 1.02, "b": 1.0}) == "a"
    assert fastest({"a": 1.0, "b": 1.0 - 2 * autotune.MARGIN}) == "b"


def test_a_later_process_measures_nothing(clock: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.times = {"own": 1.0, LIBRARY: 0.5}.__getitem__
    explained(AutoBackend([Own()]))
    monkeypatch.setattr(autotune, "_files", {})
    assert explained(AutoBackend([Own()])).startswith(f"{LIBRARY}: measured")
    assert len(clock.asked) == 1


def test_measurements_of_an_installation_with_other_backends_do_not_count(clock: Measuring) -> None:
    class Other(Own):
        name = "other"

    explained(AutoBackend([Other(), Own()]))
    clock.times = {"own": 1.0, LIBRARY: 0.5}.__getitem__
    assert explained(AutoBackend([Own()])).startswith(f"{LIBRARY}: measured")


def test_what_no_kernel_of_ours_covers_says_why(clock: Measuring) -> None:
    assert explained(AutoBackend([Own()]), groups=2) == f"{LIBRARY}: not own: it has no groups"
    assert clock.asked == []


def test_a_kernel_that_fails_is_left_out_with_a_warning(clock: Measuring) -> None:
    with pytest.warns(UserWarning, match="'auto' leaves out backend 'own': RuntimeError: no such tile"):
        assert explained(AutoBackend([Own(RuntimeError("no such tile"))])).startswith(LIBRARY)


@pytest.fixture
def on_auto(clock: Measuring, monkeypatch: pytest.MonkeyPatch) -> AutoBackend:
    """Blocks of float64 on the CPU run on "auto" as on a GPU."""
    backend = AutoBackend([Own()])
    monkeypatch.setitem(backends._loaded, "auto", backend)
    monkeypatch.setitem(backends._selected, ("cpu", torch.float64), "auto")
    return backend


@pytest.mark.parametrize("make", [generator, discriminator])
def test_whole_networks(make: type, on_auto: AutoBackend, clock: Measuring) -> None:
    x = numbers(*((4, 5, 1, 1) if make is generator else (4, 3, 16, 16)))
    model = make()
    expected = outcome(model, x)
    with fastdcgan.backend("auto"):
        for _ in range(2):  # the first measures
            assert_same(outcome(twin(model), x), expected)
        rows = fastdcgan.explain(twin(model), x)
    assert {row.backend for row in rows} == {"auto"}
    assert all("measured: own" in row.why for row in rows)
    assert any(isinstance(name, Boundaries) for asked in clock.asked for name in asked)


def test_boundaries_are_measured_one_by_one(on_auto: AutoBackend, clock: Measuring) -> None:
    """A clock to which the fastest plan has the first boundary finished and the last block's dy stored nowhere."""

    def times(boundaries: Any) -> float:
        if not isinstance(boundaries, Boundaries):
            return 1.0
        return 2.0 + boundaries.deferred[0] - 0.5 * boundaries.lazy_grad[-1] - 0.01 * boundaries.epilogue_sums[0]

    clock.times = times
    model, x = twin(generator()), numbers(4, 5, 1, 1)
    plans: list[Plan] = []
    real = planner.plan
    with fastdcgan.backend("auto"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "plan", lambda *args: plans.append(real(*args)) or plans[-1])
        before = {name: value.clone() for name, value in model.named_buffers()}
        with torch.no_grad():
            model.eval()(x)
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
        model.train()(x)
        measured_once = len(clock.asked)
        model(x)
    assert len(clock.asked) == measured_once
    found = plans[-1].boundaries
    n = len(plans[-1].blocks)
    assert found.deferred == (False,) + (True,) * (n - 2)
    assert found.lazy_grad == (False,) * (n - 1) + (True,)
    assert found.epilogue_sums == (True,) * (n - 1)  # 0.01 is noise either way


def test_boundaries_that_are_none_are_ignored_with_a_warning(on_auto: AutoBackend, clock: Measuring) -> None:
    clock.allowed = False
    model, x = twin(generator()), numbers(4, 5, 1, 1)
    with pytest.MonkeyPatch.context() as patch, fastdcgan.backend("auto"):
        patch.setattr(autotune, "lookup", lambda kind, *key: {"deferred": [True]} if kind == planner.KIND else None)
        with pytest.warns(UserWarning, match=r"measured\.json are ignored"):
            model(x)


@pytest.mark.parametrize(("index", "entered"), [(1, True), (0, False)])
def test_primitives_run_on_the_gpu_of_their_first_argument(
    index: int, entered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        is_cuda = True
        device = torch.device("cuda", index)

    current = [0]

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    for argument in (Elsewhere(), Operand(Elsewhere())):  # type: ignore[arg-type]
        assert primitives._call(lambda x: list(current), argument) == ([0, 1] if entered else [0])
    assert current == [0]
