"""The choice of tiles, and measuring them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from fastdcgan.dispatch import autotune  # noqa: E402
from fastdcgan.kernels import tiles, tuning  # noqa: E402
from fastdcgan.kernels.tiles import Device, Problem, TileConfig  # noqa: E402

H100 = tiles.KNOWN[90]
DEVICES = st.sampled_from([*tiles.KNOWN.values(), Device("sm_86", 80, 84, 99 * 1024)])
PROLOGUES = st.sampled_from(["none", "activate", "bn_backward"])
SIZES = st.integers(1, 2000)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    op = draw(st.sampled_from(["conv", "conv_transpose", "weight_grad"]))
    prologue = draw(PROLOGUES) + (" " + draw(PROLOGUES) if op == "weight_grad" else "")
    epilogue = "none" if op == "weight_grad" else draw(st.sampled_from(["none", "stats", "grad_stats"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return Problem(
        op, dtype, draw(SIZES), draw(SIZES), draw(SIZES) * draw(SIZES), 4, prologue, epilogue, draw(st.booleans()), ()
    )


PROBLEM = Problem("conv", torch.bfloat16, 8192, 512, 4096, 1, "activate", "stats", True, (128, 256, 16, 16))


# --- tiles -----------------------------------------------------------------------------------------------------------


@given(problems(), DEVICES)
def test_the_heuristics_tile_is_in_the_bounded_search_space_and_fits(problem: Problem, device: Device) -> None:
    space = tiles.search_space(problem, device)
    assert 1 <= len(space) <= 100
    assert len(set(space)) == len(space)
    for config in space:
        assert problem.shared_memory(config) < device.shared_memory
        assert config.splits == 1 or problem.blocks(config) < 2 * device.processors
        assert config.descriptors == (device.arch >= 90 and problem.descriptors)
    assert tiles.heuristic(problem, device) in space


def test_the_heuristic_fills_the_chip() -> None:
    few = Problem("weight_grad", torch.bfloat16, 64, 128, 128 * 16 * 16, 16, "none none", "none", True, ())
    chosen = tiles.heuristic(few, H100)
    programs = 16 * tiles.ceil_div(64, chosen.block_m) * tiles.ceil_div(128, chosen.block_n) * chosen.splits
    assert programs >= 0.9 * H100.processors
    many = tiles.heuristic(replace(PROBLEM, m=2**20), H100)
    assert many.block_m * many.block_n == 128 * 256


@given(st.sampled_from([16, 32, 64, 128, 256]), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_box_covers_with_powers_of_two(rows: int, batch: int, height: int, width: int) -> None:
    box = tiles.box(rows, batch, height, width)
    assert box[0] * box[1] * box[2] == rows
    assert all(side & (side - 1) == 0 and side <= 256 for side in box)
    assert tiles.tiles(rows, box, batch, height, width) * rows >= batch * height * width
    assert tiles.tiles(rows, box, batch, height, width) <= tiles.tiles(rows, (rows, 1, 1), batch, height, width)


@pytest.mark.parametrize(
    ("grid", "box"), [((128, 4, 4), (8, 4, 4)), ((128, 8, 8), (2, 8, 8)), ((128, 32, 32), (1, 4, 32))]
)
def test_boxes_of_dcgan_are_whole_rows(grid: tuple[int, int, int], box: tuple[int, int, int]) -> None:
    assert tiles.box(128, *grid) == box


@pytest.mark.parametrize("changed", [{"block_m": 48}, {"block_n": 8}, {"block_k": 0}, {"num_warps": 3}])
def test_a_block_is_a_power_of_two(changed: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=f"{next(iter(changed))} must be a power of two.*{next(iter(changed.values()))}"
    ):
        TileConfig(**{"block_m": 64, "block_n": 64, "block_k": 32, **changed})


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "folder" / "measured.json"
    monkeypatch.setenv("FASTDCGAN_MEASURED", str(found))
    monkeypatch.setattr(autotune, "_files", {})
    monkeypatch.setattr(autotune, "gpu_key", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "device_of", lambda device: H100)
    monkeypatch.setattr(tuning, "_chosen", tuning._choices())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


CUDA = torch.device("cuda")
MEASURED = TileConfig(64, 32, 64, 4, 2)


def remember(problem: Problem, config: TileConfig) -> None:
    autotune.remember(tuning.KIND, "a GPU", tuning.problem_key(problem), asdict(config))


def test_what_was_measured_is_chosen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(PROBLEM, MEASURED)
    remember(replace(PROBLEM, shape=(1,)), replace(MEASURED, splits=2))
    monkeypatch.setattr(autotune, "_files", {})  # a new process
    assert tuning.choose(PROBLEM, CUDA, pytest.fail) == MEASURED
    assert tuning.choose(replace(PROBLEM, shape=(1,)), CUDA, pytest.fail).splits == 2
    assert tuning.choose(replace(PROBLEM, shape=(2,)), CUDA, pytest.fail) == tiles.heuristic(PROBLEM, H100)


@pytest.mark.parametrize("entry", [{"block_m": 3}, {"unknown": 64}, 5])
def test_a_tile_that_is_none_is_ignored_with_one_warning(file: Path, entry: object) -> None:
    autotune.remember(tuning.KIND, "a GPU", tuning.problem_key(PROBLEM), entry)
    with pytest.warns(UserWarning, match=r"measured\.json are ignored"):
        assert tuning.choose(PROBLEM, CUDA, pytest.fail) == tiles.heuristic(PROBLEM, H100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.choose(PROBLEM, CUDA, pytest.fail)


def test_tuning_measures_a_short_list_once_and_keeps_the_fastest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(calls: dict[TileConfig, Callable], device: torch.device) -> dict[TileConfig, float]:
        return {config: abs(config.block_m * config.block_n - 128 * 64) for config in calls}

    tried: list[TileConfig] = []
    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    assert tuning.choose(PROBLEM, CUDA, pytest.fail) == tiles.heuristic(PROBLEM, H100)
    with autotune.tuning():
        chosen = tuning.choose(PROBLEM, CUDA, tried.append)
        assert tuning.choose(PROBLEM, CUDA, pytest.fail) == chosen
    assert tuning.choose(PROBLEM, CUDA, pytest.fail) == chosen
    assert tried == tiles.shortlist(PROBLEM, H100)
    assert tried[0] == tiles.heuristic(PROBLEM, H100)
    assert chosen.block_m * chosen.block_n == 128 * 64
    assert autotune.lookup(tuning.KIND, "a GPU", tuning.problem_key(PROBLEM)) == asdict(chosen)


def test_a_tile_without_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "milliseconds", lambda calls, device: {config: config.block_m for config in calls})

    def attempt(config: TileConfig) -> None:
        if config.block_m == 64:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")

    small, large = TileConfig(64, 64, 64), TileConfig(128, 64, 64)
    assert tuning.fastest([small, large], attempt, CUDA) == large
    with pytest.raises(RuntimeError, match="none of 1 tiles fits"):
        tuning.fastest([small], attempt, CUDA)
