"""Poisson blending."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastdcgan.dcgan import blending, masks


@pytest.mark.parametrize("name", masks.MASKS)
def test_blending_keeps_gradients_and_meets_the_border(name: str) -> None:
    """The least squares solution over all pairs of neighbours, found densely."""
    images, source = torch.rand(2, 2, 8, 8).sub(0.5), torch.rand(2, 2, 8, 8).sub(0.5)
    known = masks.make(name, 8, 2)
    result = blending.poisson(images, source, known)
    pixel = torch.arange(64).view(8, 8)
    pairs = torch.cat(
        [torch.stack([a, b], 1) for rows in (pixel, pixel.T) for a, b in pairwise(rows)]  # below, beside
    )
    differences = torch.zeros(len(pairs), 64, dtype=torch.float64)
    differences[torch.arange(len(pairs)), pairs[:, 0]] = 1
    differences[torch.arange(len(pairs)), pairs[:, 1]] = -1
    for n in range(2):
        here = known[n % len(known), 0].flatten()
        for channel in range(2):
            fixed, wanted = images[n, channel].flatten().double(), source[n, channel].flatten().double()
            right = differences @ wanted - differences[:, here] @ fixed[here]
            inside = torch.linalg.lstsq(differences[:, ~here], right[:, None], driver="gelsd").solution[:, 0]
            found = result[n, channel].flatten().double()
            assert torch.equal(found[here], fixed[here])
            torch.testing.assert_close(found[~here], inside.clamp(-1, 1), rtol=0, atol=1e-6)


def test_blending_undoes_a_shift() -> None:
    images = torch.rand(1, 3, 16, 16).sub(0.5)
    found = blending.poisson(images, images + 0.4, masks.make("centre", 16))
    torch.testing.assert_close(found, images)


def test_blending_without_a_border() -> None:
    images, source = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
    nothing = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    torch.testing.assert_close(blending.poisson(images, source, nothing), source)
    torch.testing.assert_close(blending.poisson(images, source, ~nothing), images)
