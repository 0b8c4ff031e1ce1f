"""The choice of tiles for the CUDA contractions: what fits, and that it suits the problem."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastdcgan.backends.cuda_tiles import H100, OF_SIZE, TILES, Device, Problem, blocks, choose, cost, resident

LARGE = Problem(128 * 16 * 16, 256, 512 * 16, 1, 2)


def test_every_tile_fits_every_supported_gpu_without_a_second_tensor() -> None:
    small = Device(28, 99 * 1024, 100 * 1024)  # the least of compute capability 8.0 and later
    for itemsize, numbers in OF_SIZE.items():
        for number in numbers:
            assert resident(replace(LARGE, itemsize=itemsize), TILES[number], small) >= 1


def test_a_tile_that_does_not_fit_is_not_chosen() -> None:
    tiny = Device(28, 80 * 1024, 100 * 1024)
    problem = replace(LARGE, second_left=True)
    assert choose(LARGE, tiny).number == 0 or resident(LARGE, TILES[0], tiny)
    assert resident(problem, TILES[0], tiny) == 0 and choose(problem, tiny).number != 0
    with pytest.raises(ValueError, match="no tile fits"):
        choose(LARGE, Device(28, 1024, 2048))


def test_large_problems_get_large_tiles_and_narrow_ones_narrow_tiles() -> None:
    assert choose(replace(LARGE, m=2**20), H100).number == 0
    assert choose(replace(LARGE, m=2**18, n=32), H100).tile.n == 32
    assert choose(replace(LARGE, itemsize=4), H100).number in OF_SIZE[4]


def test_parts_fill_a_gpu_where_tiles_are_few() -> None:
    weight_grad = Problem(128, 64, 1024 * 32 * 32, 16, 2)
    chosen = choose(weight_grad, H100)
    assert blocks(weight_grad, chosen.tile) < H100.processors <= blocks(weight_grad, chosen.tile) * chosen.splits
    assert cost(weight_grad, chosen, H100) < cost(weight_grad, replace(chosen, splits=1), H100) / 2
    assert choose(replace(LARGE, m=2**20), H100).splits == 1
    assert choose(Problem(64, 64, 64, 1, 2), H100).splits == 1  # too short to be cut
