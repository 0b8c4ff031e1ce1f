"""The search for an image's z."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.dcgan import Generator
from fastdcgan.dcgan.projection import InverseProjection, encode
from tests.dcgan.conftest import lively


def test_encode_finds_images_of_the_generator() -> None:
    torch.manual_seed(0)
    generator = lively(Generator(28, 1, nz=4, ngf=8))
    with torch.no_grad():
        images = generator(torch.randn(3, 4))
    z = encode(generator, images, steps=150)
    error = (generator(z) - images).square().mean((1, 2, 3))
    spread = (images - images.mean(0)).square().mean()
    assert (error < 0.2 * spread).all()
    with torch.inference_mode():  # as features are extracted
        assert torch.equal(InverseProjection(generator, steps=150)(images), z)
        features = InverseProjection(generator, ["up1"], steps=2)(images)
    assert features.shape == (3, 8 * 16)
    with pytest.raises(ValueError, match=r"expected \[N, 1, 28, 28\]"):
        encode(generator, images[:, :, :20])
