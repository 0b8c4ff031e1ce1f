"""Features out of networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastdcgan
from fastdcgan.dcgan import Discriminator, Generator
from fastdcgan.dcgan.features import FeatureExtractor, extract, raw_pixels


@pytest.fixture
def discriminator() -> Discriminator:
    """One whose BatchNorm has seen something."""
    torch.manual_seed(0)
    net = Discriminator(32, 1, ndf=4)
    net(torch.randn(16, 1, 32, 32))
    return net.eval()


def by_hand(net: Discriminator, x: torch.Tensor) -> dict[str, torch.Tensor]:
    plain, found = fastdcgan.unfuse(copy.deepcopy(net)), {}
    for name, block in plain.stages():
        found[name] = x = block(x)
    return found


# --- the extractor ---------------------------------------------------------------------------------------------------


def test_features_are_the_papers(discriminator: Discriminator) -> None:
    """Every layer but the logit, max-pooled to 4x4 by PyTorch's own modules."""
    x = torch.randn(3, 1, 32, 32)
    maps = by_hand(discriminator, x)
    expected = [F.max_pool2d(maps[name], maps[name].shape[2] // 4).flatten(1) for name in ("image", "down1", "down2")]
    found = FeatureExtractor(discriminator)(x)
    assert found.shape == (3, 16 * (4 + 8 + 16))
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_layers_by_name(discriminator: Discriminator, fused: bool) -> None:
    """In the network's order; blocks between them run without being kept."""
    x = torch.randn(2, 1, 32, 32)
    expected = by_hand(discriminator, x)
    net = discriminator if fused else fastdcgan.unfuse(discriminator)
    extractor = FeatureExtractor(net, ["down2", "image"], pool=None)
    maps = extractor.maps(x)
    assert list(maps) == ["image", "down2"]
    for name, values in maps.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5)
    assert extractor(x).shape == (2, 4 * 16**2 + 16 * 4**2)
    assert not any("logit" in key for key in extractor.state_dict())


def test_gradients_reach_images_and_weights(discriminator: Discriminator) -> None:
    extractor = FeatureExtractor(discriminator)
    x = torch.randn(2, 1, 32, 32, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    extractor(x).square().sum().backward()
    weight = discriminator.blocks.image.conv.weight
    assert weight.grad is not None
    maps = by_hand(discriminator, reference)
    sum(
        F.max_pool2d(maps[name], maps[name].shape[2] // 4).square().sum() for name in ("image", "down1", "down2")
    ).backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert not extractor(x).requires_grad


def test_eval_and_train_are_the_networks_own(discriminator: Discriminator) -> None:
    x = torch.randn(4, 1, 32, 32)
    extractor = FeatureExtractor(discriminator).eval()
    torch.testing.assert_close(extractor(x)[:1], extractor(x[:1]))
    extractor.train()
    assert not torch.allclose(extractor(x)[:1], extractor(x[:2])[:1])


def test_images_of_any_size(discriminator: Discriminator) -> None:
    x = torch.randn(1, 1, 50, 70)
    assert FeatureExtractor(discriminator)(x).shape == (1, 16 * (4 + 8 + 16))
    assert FeatureExtractor(discriminator, ["down1"], pool=None).maps(x)["down1"].shape == (1, 8, 12, 17)
    # Maps of the 4x4 grid or smaller are left alone.
    assert FeatureExtractor(discriminator, ["down2"])(torch.randn(1, 1, 16, 24)).shape == (1, 16 * 2 * 3)


def test_layers_of_a_generator() -> None:
    net = Generator(32, 1, nz=6, ngf=4).eval()
    z = torch.randn(3, 6)
    maps = FeatureExtractor(net, ["up1", "image"]).maps(z)
    assert maps["up1"].shape == (3, 8, 8, 8)
    torch.testing.assert_close(maps["image"], net(z))
    assert FeatureExtractor(net).layers == ["project", "up1", "up2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["down9"]}, "there is no layer 'down9': expected some of image, down1, down2, logit"),
        ({"layers": []}, "expected at least one, and none twice"),
        ({"layers": ["image", "image"]}, "expected at least one, and none twice"),
        ({"pool": 0}, "pool is 0: expected at least 1"),
    ],
)
def test_layers_that_are_none(arguments: dict, message: str, discriminator: Discriminator) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(discriminator, **arguments)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 32, 32), (2, 1)])
def test_images_that_do_not_fit(shape: tuple[int, ...], discriminator: Discriminator) -> None:
    with pytest.raises(ValueError, match=r"expected \[N, 1, H, W\]"):
        FeatureExtractor(discriminator)(torch.zeros(shape))


def test_extract(discriminator: Discriminator) -> None:
    """In batches what it is at once; pixels are the images in [-1, 1]."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), dtype=np.uint8)
    extractor = FeatureExtractor(discriminator)
    found = extract(extractor, pixels, batch=2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, extract(extractor, pixels), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(extract(raw_pixels, pixels), pixels.reshape(5, -1) / 127.5 - 1, atol=1e-6)
