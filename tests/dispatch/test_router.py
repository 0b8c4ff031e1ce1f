"""What "auto" does on a GPU, with backends and times that stand in for one: algorithms, tiles, boundaries of chains."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdcgan
from fastdcgan import backends
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.dispatch import autotune, primitives, router
from fastdcgan.dispatch.router import PYTORCH, fastest
from fastdcgan.engine import planner
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Algorithm, Boundaries, Call, Operand, Plan
from tests.helpers.twins import assert_same, discriminator, generator, numbers, outcome, twin
from tests.machine import DEVICE


@dataclass(frozen=True)
class Tile:
    rows: int


class Own(ReferenceBackend):
    """A backend with an algorithm for every convolution but those with groups."""

    name = "own"

    def __init__(self, error: Exception | None = None, **how: Any) -> None:
        self.error, self.how = error, how
        self.calls: list[Tile | None] = []

    def algorithms(self, op: str) -> list[Algorithm]:
        def run(call: Call, tile: Tile | None) -> Any:
            self.calls.append(tile)
            if self.error is not None:
                raise self.error
            return self.pytorch(call)

        def why_not(call: Call) -> str | None:
            return "it has no groups" if call.geometry.groups > 1 else None

        return [Algorithm(self.name, why_not, run, **self.how)]

    def boundaries(self, blocks: Any, weights: Any, size: Any, needs: Any) -> Boundaries:
        n = len(blocks)
        return Boundaries((True,) * (n - 1), (True,) * (n - 1), (False,) * n)


class Other(Own):
    name = "other"


class Measuring:
    """Stands in for a GPU's clock."""

    def __init__(self) -> None:
        self.allowed, self.searching = True, False
        self.times: Callable[[Any], float] = lambda name: 1.0
        self.asked: list[list[Any]] = []

    def milliseconds(
        self, calls: dict[Any, Callable], device: torch.device, firsts: dict | None = None
    ) -> dict[Any, float]:
        self.asked.append(list(calls))
        for call in calls.values():
            call()
        return {name: self.times(name) for name in calls}


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measuring:
    found = Measuring()
    monkeypatch.setattr(autotune, "consulted", lambda device: not torch.are_deterministic_algorithms_enabled())
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))
    monkeypatch.setattr(autotune, "_files", {})
    monkeypatch.setattr(planner, "_known", {})
    monkeypatch.setattr(router, "_routes", {})
    monkeypatch.setattr(router, "_alike", {})
    monkeypatch.setattr(autotune, "milliseconds", found.milliseconds)
    monkeypatch.setattr(autotune, "may_compare", lambda device: found.allowed)
    monkeypatch.setattr(autotune, "may_search", lambda device: found.searching)
    return found


Explained = Callable[..., str]


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> Explained:
    """How a convolution runs on "auto" with these backends on the GPU."""

    def explained(
        *members: Own, groups: int = 1, again: bool = False, device: torch.device = DEVICE, batch: int = 2
    ) -> str:
        if not again:  # a new process
            monkeypatch.setattr(router, "_routes", {})
            monkeypatch.setattr(router, "_alike", {})
            monkeypatch.setitem(backends._loaded, "auto", members[0])
            monkeypatch.setattr(backends, "members", lambda name: list(members))
        x, w = numbers(batch, 4, 5, 5).to(device), numbers(6, 4 // groups, 3, 3).to(device)
        g = Geometry((3, 3), groups=groups)
        with router.recording() as seen:
            out, _ = router.run(Call("conv", Operand(x), w, g, (3, 3)), "auto")
        torch.testing.assert_close(out, torch.nn.functional.conv2d(x, w, groups=groups))
        (found,) = seen
        return found

    return explained


def test_unmeasured_calls_run_by_the_first_algorithm(clock: Measuring, explained: Explained) -> None:
    clock.allowed = False
    assert explained(Own()) == "own: not measured"
    assert clock.asked == []


def test_what_another_is_likely_to_beat_runs_last(clock: Measuring, explained: Explained) -> None:
    clock.allowed = False
    assert explained(Own(why_last=lambda call: "it is small")) == f"{PYTORCH}: not own: it is small"
    clock.allowed = True
    assert explained(Own(why_last=lambda call: "it is small")).startswith(f"{PYTORCH}: measured: {PYTORCH} 1.0000 ms")


def test_it_is_measured_as_soon_as_that_is_welcome(clock: Measuring, explained: Explained) -> None:
    clock.allowed = False
    explained(Own())
    clock.allowed = True
    assert explained(again=True) == f"own: measured: own 1.0000 ms, {PYTORCH} 1.0000 ms"
    explained(again=True)
    assert clock.asked == [[("own", None), (PYTORCH, None)]]


@pytest.mark.parametrize(("library", "expected"), [(0.98, "own"), (0.96, PYTORCH), (1.5, "own")])
def test_what_is_faster_by_more_than_noise_is_taken(
    clock: Measuring, explained: Explained, library: float, expected: str
) -> None:
    clock.times = lambda at: {"own": 1.0, PYTORCH: library}[at[0]]
    own = Own()
    assert explained(own) == f"{expected}: measured: own 1.0000 ms, {PYTORCH} {library:.4f} ms"
    before = len(own.calls)
    explained(again=True)
    assert len(own.calls) == before + (expected == "own")


def test_the_first_of_those_as_fast_as_the_fastest() -> None:
    assert fastest({"a": 1.2, "b": 1.02, "c": 1.0}) == "b"
    assert fastest({"a": 1.02, "b": 1.0}) == "a"
    assert fastest({"a": 1.0, "b": 1.0 - 2 * autotune.MARGIN}) == "b"


def test_what_lost_clearly_for_about_that_batch_is_not_tried_on_a_cpu(clock: Measuring, explained: Explained) -> None:
    clock.times = lambda at: {"own": 1.0, "other": 1.3, PYTORCH: 1.2}[at[0]]
    cpu = torch.device("cpu")
    explained(Own(), Other(), device=cpu, batch=4)
    for batch, tried in ((2, ["own", PYTORCH]), (8, ["own", PYTORCH]), (9, ["own", "other", PYTORCH])):
        explained(device=cpu, batch=batch, again=True)
        assert [name for name, _ in clock.asked[-1]] == tried


def test_what_can_not_be_as_fast_as_another_was_is_not_tried(clock: Measuring, explained: Explained) -> None:
    other = Other(least_ms=lambda call: 1e6)
    other.direct_ms = lambda call: 1e6  # type: ignore[method-assign] # of PyTorch's own
    assert explained(other, Own()) == "own: measured: own 1.0000 ms"
    assert other.calls == []


class Slow(Own):
    def pytorch(self, call: Call, tile: None = None) -> Any:
        time.sleep(0.03)
        return super().pytorch(call)


@pytest.mark.parametrize(("again", "tried"), [(1.0, ["own"]), (30.0, ["other", "own", PYTORCH])])
def test_a_first_call_that_took_long_gets_another(
    clock: Measuring, explained: Explained, monkeypatch: pytest.MonkeyPatch, again: float, tried: list[str]
) -> None:
    monkeypatch.setattr(autotune, "cpu_milliseconds", lambda call: again)
    other = Other(least_ms=lambda call: 20.0)
    other.direct_ms = lambda call: 20.0  # type: ignore[method-assign]
    explained(other, Slow())
    assert sorted(name for name, _ in clock.asked[0]) == sorted(tried)


def test_the_time_of_a_call_but_for_measuring(
    clock: Measuring, explained: Explained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def milliseconds(*args: Any) -> dict[Any, float]:
        time.sleep(0.5)
        return Measuring.milliseconds(clock, *args)

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    began = time.perf_counter()
    found = router.milliseconds_besides(lambda: (time.sleep(0.1), explained(Own())))
    assert time.perf_counter() - began > 0.6 and 100 <= found < 550


def test_what_may_be_as_fast_is_tried_and_stays_in_its_order(clock: Measuring, explained: Explained) -> None:
    found = explained(Other(least_ms=lambda call: 1e-6), Own())
    assert found == f"other: measured: other 1.0000 ms, own 1.0000 ms, {PYTORCH} 1.0000 ms"


def test_a_later_process_measures_nothing(
    clock: Measuring, explained: Explained, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.times = lambda at: {"own": 1.0, PYTORCH: 0.5}[at[0]]
    explained(Own())
    monkeypatch.setattr(autotune, "_files", {})
    assert explained(Own()).startswith(f"{PYTORCH}: measured")
    assert len(clock.asked) == 1


def test_entries_of_an_installation_with_other_algorithms_do_not_count(clock: Measuring, explained: Explained) -> None:
    explained(Other(), Own())
    clock.times = lambda at: {"own": 1.0, PYTORCH: 0.5}[at[0]]
    assert explained(Own()).startswith(f"{PYTORCH}: measured")


def test_what_no_algorithm_of_ours_can_run_says_why(clock: Measuring, explained: Explained) -> None:
    assert explained(Own(), groups=2) == f"{PYTORCH}: not own: it has no groups"
    assert clock.asked == []


def test_an_algorithm_that_fails_is_left_out_with_a_warning(clock: Measuring, explained: Explained) -> None:
    with pytest.warns(RuntimeWarning, match="leaves algorithm 'own' out: RuntimeError: no such tile"):
        assert explained(Own(RuntimeError("no such tile"))).startswith(PYTORCH)


@pytest.mark.parametrize("remembered", [False, True])
def test_a_route_that_can_not_run_falls_to_the_next(clock: Measuring, explained: Explained, remembered: bool) -> None:
    """Also where nothing may be measured, and where it was measured on a day on which it ran."""
    if remembered:
        clock.times = lambda at: {"own": 0.5}.get(at[0], 1.0)
        explained(Own(), Other())
    clock.allowed = False
    with pytest.warns(RuntimeWarning, match="fastdcgan leaves algorithm 'own' out: OSError: no C compiler") as caught:
        assert explained(Own(OSError("no C compiler")), Other()) == "other: not measured"
    assert len(caught) == 1 + remembered
    with pytest.raises(torch.OutOfMemoryError):
        explained(Own(torch.OutOfMemoryError("full")), Other())


def test_what_was_asked_for_by_name_is_not_replaced(clock: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.allowed = False
    own = Own(OSError("no C compiler"))
    monkeypatch.setitem(backends._loaded, "own", own)
    call = Call("conv", Operand(numbers(2, 4, 5, 5)), numbers(6, 4, 3, 3), Geometry((3, 3)), (3, 3))
    with pytest.raises(OSError, match="no C compiler"):
        router.run(call, "own")


def test_what_is_known_decides_not_where_bits_should_not_change(clock: Measuring, explained: Explained) -> None:
    clock.times = lambda at: {"own": 1.0, PYTORCH: 0.5}[at[0]]
    measured = f"{PYTORCH}: measured: own 1.0000 ms, {PYTORCH} 0.5000 ms"
    assert explained(Own()) == measured
    clock.allowed = False
    assert explained(Own()) == measured
    torch.use_deterministic_algorithms(True)
    try:
        assert explained(Own()) == "own: not measured"
    finally:
        torch.use_deterministic_algorithms(False)


# --- tiles ------------------------------------------------------------------------------------------------------------

TILES: dict[str, Any] = {"tiles": lambda call: [Tile(1), Tile(2)], "tile_type": Tile}


def test_tiles_are_searched_once_and_the_fastest_kept(
    clock: Measuring, explained: Explained, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.times = lambda at: {None: 1.0, Tile(1): 0.9, Tile(2): 0.5}[at[1]]
    own = Own(**TILES)
    explained(own)  # compared, with the tile of the algorithm's own rule
    assert own.calls[-1] is None
    clock.searching = True
    explained(own)
    assert own.calls[-1] == Tile(2)
    asked = len(clock.asked)
    monkeypatch.setattr(autotune, "_files", {})  # a new process
    clock.searching = False
    explained(own)
    assert own.calls[-1] == Tile(2) and len(clock.asked) == asked


def test_a_stored_tile_that_is_no_candidate_is_left_out(clock: Measuring, explained: Explained) -> None:
    clock.searching = True
    clock.times = lambda at: {None: 1.0, Tile(1): 0.9, Tile(2): 0.5}[at[1]]
    explained(Own(**TILES))
    clock.searching = clock.allowed = False
    other = Own(tiles=lambda call: [Tile(1)], tile_type=Tile)  # as after a build for another architecture
    assert explained(other) == "own: not measured"
    assert set(other.calls) == {None}


def test_a_tile_without_room_is_left_out_with_a_warning(clock: Measuring, explained: Explained) -> None:
    class Small(Own):
        def algorithms(self, op: str) -> list[Algorithm]:
            (found,) = super().algorithms(op)

            def run(call: Call, tile: Tile | None) -> Any:
                if tile == Tile(2):
                    raise RuntimeError("out of resources")
                return found.run(call, tile)

            return [dataclasses.replace(found, run=run)]

    clock.searching = True
    clock.times = lambda at: {None: 1.0, Tile(1): 0.9}[at[1]]
    own = Small(**TILES)
    with pytest.warns(RuntimeWarning, match=r"'own' with Tile\(rows=2\) out: RuntimeError: out of resources"):
        explained(own)
    assert own.calls[-1] == Tile(1)


@pytest.mark.parametrize("entry", [3, {}, {"algorithm": "own", "tile": {"columns": 1}, "milliseconds": {}}])
def test_an_entry_that_is_none_is_ignored_with_a_warning(clock: Measuring, explained: Explained, entry: Any) -> None:
    clock.allowed = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "lookup", lambda kind, *key: entry)
        with pytest.warns(UserWarning, match=r"autotune\.json is ignored"):
            assert explained(Own(**TILES)) == "own: not measured"


# --- whole networks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def on_auto(clock: Measuring, monkeypatch: pytest.MonkeyPatch) -> Own:
    """Blocks of float64 run on "auto", on any device."""
    backend = Own()
    monkeypatch.setitem(backends._loaded, "auto", backend)
    monkeypatch.setattr(backends, "members", lambda name: [backend])
    monkeypatch.setitem(backends._selected, (DEVICE.type, torch.float64), "auto")
    monkeypatch.setattr(Own, "chooses_boundaries", True)
    return backend


@pytest.mark.parametrize("make", [generator, discriminator])
def test_whole_networks(make: type, on_auto: Own, clock: Measuring) -> None:
    x = numbers(*((4, 5, 1, 1) if make is generator else (4, 3, 16, 16)))
    model = make()
    expected = outcome(model, x)
    with fastdcgan.backend("auto"):
        for _ in range(2):  # the first measures
            assert_same(outcome(twin(model), x), expected)
        rows = fastdcgan.explain(twin(model), x)
    assert {row.backend for row in rows} == {"auto"}
    assert all("measured: own" in row.why for row in rows)


def test_what_is_kept_stays_small(on_auto: Own, clock: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slope that changes makes no new entry, and shapes that go on changing not ever more."""
    monkeypatch.setattr(planner, "MOST_KNOWN", 4)
    monkeypatch.setattr(router, "MOST_ROUTES", 20)
    model = twin(discriminator())
    with fastdcgan.backend("auto"):
        for slope in (0.1, 0.2, 0.3):
            model[1].negative_slope = slope
            model(numbers(4, 3, 16, 16))
        assert len(planner._known) == 1
        for batch in range(1, 8):
            model(numbers(batch, 3, 16, 16))
            assert len(planner._known) <= 4
            assert len(router._routes) <= 20


def test_boundaries_are_measured_one_by_one(on_auto: Own, clock: Measuring) -> None:
    """A clock to which the fastest plan has the first boundary finished and the last block's dy stored nowhere."""

    def times(boundaries: Any) -> float:
        if not isinstance(boundaries, Boundaries):
            return 1.0
        return 2.0 + boundaries.deferred[0] - 0.5 * boundaries.lazy_grad[-1] - 0.01 * boundaries.epilogue_sums[0]

    clock.searching, clock.times = True, times
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


def test_boundaries_that_are_none_are_ignored_with_a_warning(on_auto: Own, clock: Measuring) -> None:
    clock.allowed = False
    model, x = twin(generator()), numbers(4, 5, 1, 1)
    with pytest.MonkeyPatch.context() as patch, fastdcgan.backend("auto"):
        patch.setattr(autotune, "lookup", lambda kind, *key: {"deferred": [True]} if kind == planner.KIND else None)
        with pytest.warns(UserWarning, match=r"autotune\.json is ignored"):
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
    assert primitives._quietly(Elsewhere(), lambda: list(current)) == ([0, 1] if entered else [0])  # type: ignore[arg-type]
    assert current == [0]
