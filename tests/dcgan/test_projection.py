"""The search for an image's z."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.dcgan import Generator
from fastdcgan.dcgan.projection import InverseProjection, encode


def lively(generator: Generator) -> Generator:
    """In `eval`, with statistics that give images of some contrast."""
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    torch.nn.init.normal_(generator.blocks.image.conv.weight, std=0.2)
    with torch.no_grad():
        generator(torch.randn(64, generator.nz))
    return generator.eval()


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
