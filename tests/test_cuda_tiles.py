"""The choice of tiles for the CUDA contractions: what fits, and that it suits the problem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdcgan.backends import cuda_contractions, cuda_tiles
from fastdcgan.backends.base import STORE, Operand
from fastdcgan.backends.cuda_tiles import H100, OF_SIZE, TILES, Device, Problem, blocks, choose, cost, resident
from fastdcgan.benchmarks import cuda_plan
from fastdcgan.benchmarks.shapes import Block, NetShape
from fastdcgan.geometry import Geometry

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


# --- the committed plan ----------------------------------------------------------------------------------------------


def chosen_for(block: Block, part: str, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """What the backend asks a tile for, in a call on tensors without memory."""
    asked: list[Problem] = []

    def choose(problem: Problem, device: Device) -> cuda_tiles.Choice:
        asked.append(problem)
        return cuda_tiles.Choice(0, 1)

    def results(shape: Any) -> torch.Tensor:
        return torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last)

    small, large = (block.in_size, block.out_size) if block.transposed else (block.out_size, block.in_size)
    of_small, of_large = block.in_channels, block.out_channels
    if not block.transposed:
        of_small, of_large = of_large, of_small
    geometry = Geometry((block.kernel,) * 2, (block.stride,) * 2, (block.padding,) * 2)
    image, grid = results((128, of_large, large, large)).bfloat16(), results((128, of_small, small, small)).bfloat16()
    weight = results((of_small, of_large, block.kernel, block.kernel)).bfloat16()
    taps = of_large * block.kernel**2
    ops = SimpleNamespace(
        contract=lambda x, *rest: (results((128, taps, 1, 1) if small == 1 and x is grid else (128, 1, 1, 1)), None),
        contract_weight_grad=lambda *rest: results((of_small, taps, 1, 1)),
    )
    monkeypatch.setattr(cuda_tiles, "choose", choose)
    if part == "weight gradient":
        cuda_contractions.weight_grad(ops, Operand(image), Operand(grid), geometry)
    elif block.transposed == (part == "forward"):
        cuda_contractions.conv_transpose(ops, Operand(grid), weight, geometry, (large, large), STORE)
    else:
        cuda_contractions.conv(ops, Operand(image), weight, geometry, STORE)
    (problem,) = asked
    return problem


@pytest.mark.parametrize("part", cuda_plan.PARTS)
def test_the_plan_is_of_the_problems_that_the_backend_has(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (*NetShape().generator()[:4], *NetShape().discriminator()[1:4]):
        assert cuda_plan.problem_of(block, part, 128) == chosen_for(block, part, monkeypatch), block.name


def test_the_committed_plan_is_what_is_planned(tmp_path: Path) -> None:
    cuda_plan.write(tmp_path / "plan.md")
    assert (tmp_path / "plan.md").read_text() == cuda_plan.PLAN.read_text(), "python -m fastdcgan.benchmarks.cuda_plan"
