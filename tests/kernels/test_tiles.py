"""The choice of tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdcgan.kernels import tiles
from fastdcgan.kernels.tiles import Device, Problem, TileConfig

H100 = tiles.KNOWN[90]
DEVICES = st.sampled_from(list(tiles.KNOWN.values()))
PROLOGUES = st.sampled_from(["none", "activate", "bn_backward"])
SIZES = st.integers(1, 2000)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    op = draw(st.sampled_from(["conv", "conv_transpose", "weight_grad"]))
    prologue = draw(PROLOGUES) + (" " + draw(PROLOGUES) if op == "weight_grad" else "")
    epilogue = "none" if op == "weight_grad" else draw(st.sampled_from(["none", "stats", "grad_stats"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return Problem(
        op,
        dtype,
        draw(SIZES),
        draw(SIZES),
        draw(SIZES) * draw(SIZES),
        4,
        prologue,
        epilogue,
        draw(st.booleans()),
        draw(st.integers(0, 2)),
    )


PROBLEM = Problem("conv", torch.bfloat16, 8192, 512, 4096, 1, "activate", "stats", True, 0)


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
    few = Problem("weight_grad", torch.bfloat16, 64, 128, 128 * 16 * 16, 16, "none none", "none", True, 0)
    chosen = tiles.heuristic(few, H100)
    programs = 16 * tiles.ceil_div(64, chosen.block_m) * tiles.ceil_div(128, chosen.block_n) * chosen.splits
    assert programs >= 0.9 * H100.processors
    many = tiles.heuristic(replace(PROBLEM, m=2**20), H100)
    assert many.block_m * many.block_n == 128 * 256


@given(st.sampled_from([16, 32, 64, 128, 256]), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_tma_tile_covers_with_powers_of_two(rows: int, batch: int, height: int, width: int) -> None:
    tile = tiles.tma_tile(rows, batch, height, width)
    assert tile[0] * tile[1] * tile[2] == rows
    assert all(side & (side - 1) == 0 and side <= 256 for side in tile)
    count = tiles.tile_count(rows, tile, batch, height, width)
    assert batch * height * width <= count * rows
    assert count <= tiles.tile_count(rows, (rows, 1, 1), batch, height, width)


@pytest.mark.parametrize(
    ("grid", "tile"), [((128, 4, 4), (8, 4, 4)), ((128, 8, 8), (2, 8, 8)), ((128, 32, 32), (1, 4, 32))]
)
def test_tma_tiles_of_dcgan_are_whole_rows(grid: tuple[int, int, int], tile: tiles.TmaTile) -> None:
    assert tiles.tma_tile(128, *grid) == tile


@pytest.mark.parametrize("changed", [{"block_m": 48}, {"block_n": 8}, {"block_k": 0}, {"num_warps": 3}])
def test_a_block_is_a_power_of_two(changed: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=f"{next(iter(changed))} must be a power of two.*{next(iter(changed.values()))}"
    ):
        TileConfig(**{"block_m": 64, "block_n": 64, "block_k": 32, **changed})
