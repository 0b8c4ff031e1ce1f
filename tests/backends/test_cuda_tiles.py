"""The choice of tiles for the CUDA contractions: what fits, and that it suits the problem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdcgan.backends import cuda_boxes, cuda_contractions, cuda_tiles
from fastdcgan.backends.cuda_tiles import (
    H100,
    OF_SIZE,
    OF_WARPGROUPS,
    TILES,
    Device,
    Problem,
    WarpgroupTile,
    blocks,
    candidates,
    choose,
    cost,
    resident,
)
from fastdcgan.benchmarks import cuda_plan
from fastdcgan.benchmarks.shapes import Block, NetShape
from fastdcgan.dispatch import autotune
from fastdcgan.geometry import Geometry
from fastdcgan.spec import STORE, Operand

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


# --- warpgroups -------------------------------------------------------------------------------------------------------

BOXED = replace(LARGE, box_tiles=LARGE.m // 128)


def test_tiles_of_warpgroups_are_for_their_devices_and_for_boxes() -> None:
    ampere = replace(H100, warpgroups=False)
    for problem, device in ((LARGE, H100), (BOXED, ampere), (replace(BOXED, itemsize=4), H100)):
        assert not set(candidates(problem, device)) & set(OF_WARPGROUPS)
        assert choose(problem, device).number not in OF_WARPGROUPS
    assert set(candidates(BOXED, H100)) == {*OF_SIZE[2], *OF_WARPGROUPS}
    assert choose(BOXED, H100).number in OF_WARPGROUPS


def test_tiles_of_warpgroups_fit_with_a_prologue_and_without() -> None:
    for number in OF_WARPGROUPS:
        tile = TILES[number]
        assert isinstance(tile, WarpgroupTile)
        for prologue in (False, True):
            room = resident(replace(BOXED, prologue=prologue), tile, H100)
            stage = (tile.m * (1 + prologue) + tile.n) * tile.k * 2
            assert tile.ring_with(prologue) >= 2 * stage  # bn_backward's second tensor takes as much as the first
            assert room * (tile.ring_with(prologue) + 2048) <= H100.shared_in_all


def test_boxes_cover_pixels() -> None:
    assert cuda_boxes.pixel_box(128, 32, 32) == (1, 4, 32)
    assert cuda_boxes.pixel_box(128, 4, 4) == (8, 4, 4)
    assert cuda_boxes.pixel_box(128, 1, 1) == (128, 1, 1)
    assert cuda_boxes.pixel_box(64, 3, 5) == (2, 4, 8)
    assert cuda_boxes.pixel_tiles(128, 4, 4) == 16 and cuda_boxes.pixel_tiles(3, 5, 33) == 3 * 3


@pytest.mark.parametrize(
    ("op", "size", "channels", "geometry", "act", "fits"),
    [
        ("conv", (8, 8), (64, 3), Geometry((4, 4), (2, 2), (1, 1)), "tanh", True),
        ("conv", (8, 8), (72, 64), Geometry((4, 4), (2, 2), (1, 1)), None, False),  # a box would reach the next pixel
        ("conv", (8, 8), (72, 64), Geometry((4, 4), (2, 1), (1, 1)), None, True),
        ("conv", (9, 8), (64, 64), Geometry((4, 4), (2, 2), (1, 1)), None, False),
        ("conv", (9, 9), (12, 64), Geometry((3, 3)), None, False),
        ("conv", (9, 9), (8, 64), Geometry((3, 3)), "leaky_relu", True),
        ("conv", (9, 9), (8, 64), Geometry((3, 3)), "elu", False),
        ("conv_transpose", (5, 3), (8, 8), Geometry((5, 5), (3, 3)), "relu", True),
        ("conv_transpose", (5, 3), (8, 12), Geometry((5, 5), (3, 3)), None, False),
        ("weight_grad", (8, 8), (72, 8), Geometry((4, 4), (2, 2), (1, 1)), None, True),
        ("weight_grad", (8, 8), (72, 8), Geometry((4, 4), (2, 2), (1, 1)), "elu", True),
        ("weight_grad", (6, 6), (72, 8), Geometry((4, 4), (2, 2), (1, 1)), None, False),  # 3 pixels are no box
    ],
)
def test_what_boxes_can_be_cut_of(
    op: str, size: tuple[int, int], channels: tuple[int, int], geometry: Geometry, act: str | None, fits: bool
) -> None:
    x = torch.zeros(2, channels[0], *size, dtype=torch.bfloat16)
    a = Operand(x) if act in (None, "tanh") else Operand(x, None, torch.zeros(2, 1, channels[0]), str(act))
    shape = channels if op == "conv_transpose" else channels[::-1]
    weight = torch.zeros(*shape, *geometry.kernel, dtype=torch.bfloat16)
    if op == "weight_grad":
        linear = Operand(torch.zeros(2, channels[1], *geometry.conv_size(*size), dtype=torch.bfloat16))
        assert cuda_boxes.weight_grad_fits(a, linear, geometry) == fits
    elif op == "conv":
        assert cuda_boxes.conv_fits(a, weight, geometry) == fits
        assert not cuda_boxes.conv_fits(Operand(x.float()), weight, geometry)
    else:
        assert cuda_boxes.conv_transpose_fits(a, weight) == fits


# --- measuring --------------------------------------------------------------------------------------------------------


def test_tuning_measures_tiles_once_and_keeps_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDCGAN_MEASURED", str(tmp_path / "measured.json"))
    monkeypatch.setattr(autotune, "_files", {})
    monkeypatch.setattr(autotune, "gpu_key", lambda device: "a GPU")
    monkeypatch.setattr(autotune, "_idle", lambda device: True)
    monkeypatch.setattr(
        autotune, "milliseconds", lambda calls, device: {c: abs(c.number - 3) + c.splits for c in calls}
    )
    monkeypatch.setattr(cuda_tiles, "device_of", lambda device: H100)
    monkeypatch.setattr(cuda_contractions, "_chosen", cuda_contractions._choices())
    tried: list[tuple[int, int]] = []

    def contract(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tried.append(args[-3:-1])
        return torch.zeros(4, 24, 4, 6), torch.zeros(0)

    x, weight = torch.zeros(4, 64, 8, 12, dtype=torch.bfloat16), torch.zeros(24, 64, 4, 4, dtype=torch.bfloat16)
    ops, geometry = SimpleNamespace(contract=contract), Geometry((4, 4), (2, 2), (1, 1))

    def run() -> tuple[int, int]:
        tried.clear()
        cuda_contractions.conv(ops, Operand(x), weight, geometry, STORE)
        return tried[-1]

    problem = Problem(4 * 4 * 6, 24, 64 * 16, 1, 2, box_tiles=cuda_boxes.pixel_tiles(4, 4, 6))
    by_rule = choose(problem, H100)
    assert run() == (by_rule.number, by_rule.splits) and len(tried) == 1
    with autotune.tuning():
        best = run()
    assert [cuda_tiles.Choice(*each) for each in tried[:-1]] == cuda_tiles.shortlist(problem, H100)
    assert {number for number, _ in tried} == {*OF_SIZE[2], *OF_WARPGROUPS}
    assert best == (3, 1) and run() == best and len(tried) == 1
    monkeypatch.setattr(cuda_contractions, "_chosen", cuda_contractions._choices())  # a new process
    monkeypatch.setattr(autotune, "_files", {})
    assert run() == best


@pytest.mark.parametrize("entry", [{"number": 99, "splits": 1}, {"number": 1, "splits": 0}, {"tile": 3}, 5])
def test_an_entry_that_is_no_choice_is_ignored(entry: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        cuda_contractions._chosen._choice_of(entry)


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
    monkeypatch.setattr(cuda_contractions, "_chosen", cuda_contractions._choices())
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
