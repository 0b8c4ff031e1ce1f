"""The choice of tiles for the CUDA contractions: what fits, and that it suits the problem."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdcgan.backends import cuda_contractions, cuda_tiles, cuda_tma
from fastdcgan.backends.cuda_tiles import (
    H100,
    OF_SIZE,
    OF_SM90,
    TILES,
    Device,
    Problem,
    Sm90Tile,
    blocks,
    candidates,
    choose,
    cost,
    resident,
)
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Operand
from tests.helpers.contractions import conv_call

LARGE = Problem(128 * 16 * 16, 256, 512 * 16, 1, 2)


@pytest.mark.parametrize("itemsize", OF_SIZE)
def test_every_tile_fits_every_supported_gpu_without_a_second_tensor(itemsize: int) -> None:
    """And with two of them some do, in the 99 KiB that a block has on consumers' GPUs (RTX 30, 40 and 50)."""
    rtx = Device(128, 99 * 1024, 100 * 1024)
    problem = replace(LARGE, itemsize=itemsize)
    assert candidates(problem, rtx) == [*OF_SIZE[itemsize]]
    both = replace(problem, second_left=True, second_right=True)
    fitting = candidates(both, rtx)
    assert 0 < len(fitting) < len(OF_SIZE[itemsize])
    for number in fitting:
        assert TILES[number].shared_memory(itemsize, True, True) <= rtx.shared_memory


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


# --- sm_90a -----------------------------------------------------------------------------------------------------------

TILED = replace(LARGE, tma_tiles=LARGE.m // 128)


def test_sm90_tiles_are_for_their_devices_and_for_what_tma_can_copy() -> None:
    ampere = replace(H100, sm90=False)
    for problem, device in ((LARGE, H100), (TILED, ampere), (replace(TILED, itemsize=4), H100)):
        assert not set(candidates(problem, device)) & set(OF_SM90)
        assert choose(problem, device).number not in OF_SM90
    assert set(candidates(TILED, H100)) == {*OF_SIZE[2], *OF_SM90}
    assert choose(TILED, H100).number in OF_SM90


def test_sm90_tiles_fit_with_a_prologue_and_without() -> None:
    for number in OF_SM90:
        tile = TILES[number]
        assert isinstance(tile, Sm90Tile)
        for prologue in (False, True):
            room = resident(replace(TILED, prologue=prologue), tile, H100)
            stage = (tile.m * (1 + prologue) + tile.n) * tile.k * 2
            assert tile.ring_with(prologue) >= 2 * stage  # bn_backward's second tensor takes as much as the first
            assert room * (tile.ring_with(prologue) + 2048) <= H100.shared_in_all


def test_tma_tiles_cover_pixels() -> None:
    assert cuda_tma.pixel_tile(128, 32, 32) == (1, 4, 32)
    assert cuda_tma.pixel_tile(128, 4, 4) == (8, 4, 4)
    assert cuda_tma.pixel_tile(128, 1, 1) == (128, 1, 1)
    assert cuda_tma.pixel_tile(64, 3, 5) == (2, 4, 8)
    assert cuda_tma.pixel_tiles(128, 4, 4) == 16 and cuda_tma.pixel_tiles(3, 5, 33) == 3 * 3


@pytest.mark.parametrize(
    ("op", "size", "channels", "geometry", "act", "fits"),
    [
        ("conv", (8, 8), (64, 3), Geometry((4, 4), (2, 2), (1, 1)), "tanh", True),
        ("conv", (8, 8), (72, 64), Geometry((4, 4), (2, 2), (1, 1)), None, False),  # a tile would reach the next pixel
        ("conv", (8, 8), (72, 64), Geometry((4, 4), (2, 1), (1, 1)), None, True),
        ("conv", (9, 8), (64, 64), Geometry((4, 4), (2, 2), (1, 1)), None, False),
        ("conv", (9, 9), (12, 64), Geometry((3, 3)), None, False),
        ("conv", (9, 9), (8, 64), Geometry((3, 3)), "leaky_relu", True),
        ("conv", (9, 9), (8, 64), Geometry((3, 3)), "elu", False),
        ("conv_transpose", (5, 3), (8, 8), Geometry((5, 5), (3, 3)), "relu", True),
        ("conv_transpose", (5, 3), (8, 12), Geometry((5, 5), (3, 3)), None, False),
        ("weight_grad", (8, 8), (72, 8), Geometry((4, 4), (2, 2), (1, 1)), None, True),
        ("weight_grad", (8, 8), (72, 8), Geometry((4, 4), (2, 2), (1, 1)), "elu", True),
        ("weight_grad", (6, 6), (72, 8), Geometry((4, 4), (2, 2), (1, 1)), None, False),  # 3 pixels are no tile
    ],
)
def test_what_tma_can_copy(
    op: str, size: tuple[int, int], channels: tuple[int, int], geometry: Geometry, act: str | None, fits: bool
) -> None:
    x = torch.zeros(2, channels[0], *size, dtype=torch.bfloat16)
    a = Operand(x) if act in (None, "tanh") else Operand(x, None, torch.zeros(2, 1, channels[0]), str(act))
    shape = channels if op == "conv_transpose" else channels[::-1]
    weight = torch.zeros(*shape, *geometry.kernel, dtype=torch.bfloat16)
    if op == "weight_grad":
        linear = Operand(torch.zeros(2, channels[1], *geometry.conv_size(*size), dtype=torch.bfloat16))
        assert cuda_tma.weight_grad_fits(a, linear, geometry) == fits
    elif op == "conv":
        assert cuda_tma.conv_fits(a, weight, geometry) == fits
        assert not cuda_tma.conv_fits(Operand(x.float()), weight, geometry)
    else:
        assert cuda_tma.conv_transpose_fits(a, weight) == fits


# --- from a call to its tiles ----------------------------------------------------------------------------------------


def test_tuning_compares_the_shortlist_and_a_call_runs_with_the_tile_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_tiles, "device_of", lambda device: H100)
    tried: list[tuple[int, int]] = []

    def contract(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tried.append(args[-3:-1])
        return torch.zeros(4, 24, 4, 6), torch.zeros(0)

    x, weight = torch.zeros(4, 64, 8, 12, dtype=torch.bfloat16), torch.zeros(24, 64, 4, 4, dtype=torch.bfloat16)
    ops, call = SimpleNamespace(contract=contract), conv_call(Operand(x), weight, Geometry((4, 4), (2, 2), (1, 1)))
    problem = Problem(4 * 4 * 6, 24, 64 * 16, 1, 2, tma_tiles=cuda_tma.pixel_tiles(4, 4, 6))
    found = cuda_contractions.tiles(call)
    assert found == cuda_tiles.shortlist(problem, H100)
    assert {choice.number for choice in found} == {*OF_SIZE[2], *OF_SM90}
    for choice in (None, *found):
        cuda_contractions.run(ops, call, choice)
        expected = choice or choose(problem, H100)
        assert tried[-1] == (expected.number, expected.splits)


@pytest.mark.parametrize("entry", [{"number": 99, "splits": 1}, {"number": 1, "splits": 0}, {"tile": 3}])
def test_what_is_no_choice_is_refused(entry: dict[str, int]) -> None:
    with pytest.raises((TypeError, ValueError)):
        cuda_tiles.Choice(**entry)
