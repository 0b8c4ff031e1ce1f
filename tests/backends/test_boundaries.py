"""The rule for fusion boundaries where nothing was measured: `loads` counted by walking a kernel, and DCGAN's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdcgan.backends.boundaries import boundaries, loads
from fastdcgan.engine import match, planner
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Boundaries
from tests.models.dcgan import Discriminator, Generator

DCGAN = Geometry((4, 4), (2, 2), (1, 1))


@pytest.mark.parametrize(
    ("op", "operand", "channels", "own", "expected"),
    [
        ("conv", "gathered", 128, 64, 4),  # 16 taps, each of a quarter of the pixels
        ("conv", "gathered", 512, 256, 16),  # four tiles of channels
        ("conv_transpose", "linear", 64, 128, 16),  # four phases of four taps
        ("conv_transpose", "linear", 3, 64, 1),  # the image-side kernel
        ("weight_grad", "gathered", 128, 64, 4),
        ("weight_grad", "linear", 64, 128, 16),
        ("weight_grad", "linear", 3, 64, 1),
    ],
)
def test_loads(op: str, operand: str, channels: int, own: int, expected: float) -> None:
    assert loads(op, operand, DCGAN, (32, 32), channels, own) == expected


def test_loads_of_a_kernel_as_large_as_its_image() -> None:
    whole = Geometry((4, 4))
    assert loads("conv", "gathered", whole, (4, 4), 1, 512) == 1
    assert loads("conv_transpose", "linear", whole, (4, 4), 512, 100) == 64  # 16 taps of 512 channels, in tiles of 128
    assert loads("weight_grad", "gathered", whole, (4, 4), 100, 512) == 1


def chosen(net: nn.Sequential, shape: tuple[int, ...], needs_input: bool, trained: bool = True) -> Boundaries:
    net = net.to(torch.bfloat16)
    (chain,) = match.segments(net)
    assert isinstance(chain, match.FoundChain)
    made = [match.block_of(found, False, "reference") for found in chain.blocks]
    weights = [None if found.conv is None else found.conv.weight for found in chain.blocks]
    return boundaries(made, weights, shape[2:], [needs_input, *(trained and w is not None for w in weights)])


def test_what_dcgan_gets() -> None:
    d = chosen(Discriminator(ndf=64, pixels=64).main, (128, 3, 64, 64), False)
    assert d.deferred == (False, False, False, True)  # few channels behind the last
    assert d.lazy_grad == (True, False, False, False, False)  # the image side
    g = chosen(Generator(nz=100, ngf=64, pixels=64).main, (128, 100, 1, 1), False)
    assert g.deferred == (False, False, False, True)
    assert g.lazy_grad[1:4] == (False, False, False)
    assert all(g.epilogue_sums) and all(d.epilogue_sums)


def test_a_norm_defers_to_a_convolution_as_a_block_of_one_does() -> None:
    """It costs the convolution behind it the same; it can't itself read anything but a tensor."""
    last = [nn.ReLU(), nn.Conv2d(64, 16, 1), nn.ReLU(), nn.BatchNorm2d(16)]
    behind = chosen(nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), *last), (8, 64, 32, 32), True)
    alone = chosen(nn.Sequential(nn.BatchNorm2d(64), *last), (8, 64, 32, 32), True)
    assert behind.deferred == alone.deferred == (True, False)
    assert not alone.lazy_grad[0] and not alone.lazy_grad[2] and behind.lazy_grad[1] == alone.lazy_grad[1]


def test_a_deferred_boundary_costs_nothing_more_where_no_weight_learns() -> None:
    net = Discriminator(ndf=64, pixels=64).main
    trained, frozen = (chosen(net, (128, 3, 64, 64), True, trained) for trained in (True, False))
    assert sum(frozen.deferred) > sum(trained.deferred)
    assert not any(chosen(net, (128, 3, 64, 64), False, False).lazy_grad)  # nothing flows back at all


def test_backends_without_a_choice_are_not_asked() -> None:
    plan = planner.plan([*_blocks()], torch.zeros(2, 3, 8, 8), [], 1, "auto")
    assert plan.boundaries == Boundaries((False,), (False,), (False, False))
    plan = planner.plan([*_blocks()], torch.zeros(2, 3, 8, 8), [], 1, "deferred")
    assert plan.boundaries == Boundaries((True,), (True,), (False, False))


def _blocks() -> list[match.Block]:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    (chain,) = match.segments(net)
    assert isinstance(chain, match.FoundChain)
    return [match.block_of(found, False, "reference") for found in chain.blocks]
