"""The choice of tiles, and the cache of measured ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

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


# --- measuring and the cache -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv("FASTDCGAN_TILES", str(file))
    monkeypatch.setattr(tuning, "_files", {})
    monkeypatch.setattr(tuning, "device_of", lambda device: H100)
    return file


CUDA = torch.device("cuda")
MEASURED = TileConfig(64, 32, 64, 4, 2)


def test_what_was_measured_is_chosen_and_survives(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.remember(cache, H100, PROBLEM, MEASURED)
    tuning.remember(cache, H100, replace(PROBLEM, shape=(1,)), replace(MEASURED, splits=2))
    monkeypatch.setattr(tuning, "_files", {})  # a new process
    assert tuning.choose(PROBLEM, CUDA, pytest.fail) == MEASURED
    assert tuning.choose(replace(PROBLEM, shape=(1,)), CUDA, pytest.fail).splits == 2
    assert tuning.choose(replace(PROBLEM, shape=(2,)), CUDA, pytest.fail) == tiles.heuristic(PROBLEM, H100)
    assert [file.name for file in cache.parent.iterdir()] == ["tiles.json"]


def test_other_gpus_and_versions_have_entries_of_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.remember(cache, H100, PROBLEM, MEASURED)
    monkeypatch.setattr(tuning, "device_of", lambda device: tiles.KNOWN[100])
    assert tuning.choose(PROBLEM, CUDA, pytest.fail) != MEASURED
    monkeypatch.setattr(tuning, "device_of", lambda device: H100)
    monkeypatch.setattr(triton, "__version__", "99.0")
    assert tuning.choose(PROBLEM, CUDA, pytest.fail) != MEASURED


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"format": "something-else", "version": 1}',
        '{"format": "fastdcgan-tiles", "version": 0, "tiles": {}}',
        '{"format": "fastdcgan-tiles", "version": 1, "tiles": {"gpu": {"key": {"block_m": 3}}}}',
        '{"format": "fastdcgan-tiles", "version": 1, "tiles": {"gpu": 3}}',
    ],
)
def test_a_foreign_file_is_ignored_with_one_warning_and_kept(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    with pytest.warns(UserWarning, match=r"tiles\.json are ignored"):
        chosen = tuning.choose(PROBLEM, CUDA, pytest.fail)
    assert chosen == tiles.heuristic(PROBLEM, H100)
    assert cache.read_text() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.choose(PROBLEM, CUDA, pytest.fail)


def test_tuning_measures_every_candidate_once_and_keeps_the_fastest(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[TileConfig] = []

    def milliseconds(call) -> float:
        call()
        return abs(tried[-1].block_m * tried[-1].block_n - 128 * 64)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.choose(PROBLEM, CUDA, pytest.fail) == tiles.heuristic(PROBLEM, H100)
    with tuning.tuning():
        chosen = tuning.choose(PROBLEM, CUDA, tried.append)
        assert tuning.choose(PROBLEM, CUDA, pytest.fail) == chosen
    assert tried == tiles.search_space(PROBLEM, H100)
    assert chosen.block_m * chosen.block_n == 128 * 64
    assert json.loads(cache.read_text())["version"] == tuning.VERSION


def test_nothing_is_tuned_while_a_graph_is_captured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tuning.tuning():
        assert tuning.choose(PROBLEM, CUDA, pytest.fail) == tiles.heuristic(PROBLEM, H100)
    assert not cache.exists()


def test_a_tile_without_room_is_left_out() -> None:
    def time(call) -> float:
        return call()

    def attempt(config: TileConfig) -> float:
        if config.block_m == 64:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return config.block_m

    small, large = TileConfig(64, 64, 64), TileConfig(128, 64, 64)
    assert tuning.fastest([small, large], attempt, time) == large
    with pytest.raises(RuntimeError, match="none of 1 tiles fits"):
        tuning.fastest([small], attempt, time)
