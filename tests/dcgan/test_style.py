"""Style transfer: its losses, what it optimises."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdcgan.dcgan import Discriminator, Generator
from fastdcgan.dcgan.features import FeatureExtractor
from fastdcgan.dcgan.projection import encode
from fastdcgan.dcgan.style import Weights, gram, total_variation, transfer
from tests.dcgan.conftest import lively


@pytest.fixture
def discriminator() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(28, 3, ndf=4).eval()


def stripes(height: int, width: int, period: int, across: bool) -> torch.Tensor:
    waves = torch.arange(width if across else height) * (2 * torch.pi / period)
    return (0.8 * waves.sin()).view(1, 1, *((1, -1) if across else (-1, 1))).expand(1, 3, height, width).contiguous()


def grams_distance(net: Discriminator, a: torch.Tensor, b: torch.Tensor) -> float:
    extractor = FeatureExtractor(net)
    with torch.no_grad():
        pairs = zip(extractor.maps(a).values(), extractor.maps(b).values(), strict=True)
        return sum(float((gram(x) - gram(y)).norm() / gram(y).norm()) for x, y in pairs)


def test_gram_and_variation_by_hand() -> None:
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]])
    assert torch.equal(gram(x), torch.tensor([[[2.5, 6.5], [6.5, 17.0]]]))
    assert total_variation(torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]])) == (4 + 16) / 2 + (1 + 9) / 2
    shuffled = torch.randn(1, 3, 4, 5)
    assert torch.allclose(gram(shuffled), gram(shuffled.flip(2, 3)))


def test_style_comes_nearer(discriminator: Discriminator) -> None:
    """Of images of two sizes; the content stays where it is; the network stays as it was."""
    content, style = stripes(24, 36, 12, across=True), stripes(40, 30, 4, across=False)
    before = copy.deepcopy(discriminator.state_dict())
    steps: list[int] = []
    result = transfer(discriminator, content, style, weights=Weights(1, 100, 0.05), steps=20, progress=steps.append)
    assert result.image.shape == content.shape
    assert result.image.abs().max() <= 1
    assert result.loss < 0.5 * result.first_loss
    assert steps == list(range(1, 21))
    assert grams_distance(discriminator, result.image, style) < 0.7 * grams_distance(discriminator, content, style)
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in discriminator.parameters())


def test_weights_count(discriminator: Discriminator) -> None:
    """With the content's loss alone, the content itself; total variation alone smooths."""
    content, style = stripes(24, 24, 6, across=True), stripes(24, 24, 4, across=False)
    same = transfer(discriminator, content, style, weights=Weights(1, 0, 0), steps=20)
    assert (same.image - content).abs().mean() < 0.1
    smooth = transfer(discriminator, content, style, weights=Weights(0, 0, 1), steps=20)
    assert total_variation(smooth.image) < 0.5 * total_variation(content)


def test_z_is_optimised(discriminator: Discriminator) -> None:
    torch.manual_seed(1)
    generator = lively(Generator(28, 3, nz=6, ngf=4))
    content, style = stripes(28, 28, 7, across=True), stripes(20, 50, 4, across=False)
    result = transfer(discriminator, content, style, generator=generator, steps=15)
    assert result.loss < result.first_loss
    z = encode(generator, result.image, steps=150)
    torch.testing.assert_close(generator(z), result.image, atol=0.1, rtol=0)
    assert all(p.requires_grad and p.grad is None for p in generator.parameters())
    with pytest.raises(ValueError, match=r"expected \[1, 3, 28, 28\], as it is generated"):
        transfer(discriminator, content[:, :, :20], style, generator=generator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": torch.zeros(1, 1, 30, 30)}, r"the content has shape \[1, 1, 30, 30\]: expected \[1, 3, H, W\]"),
        ({"style": torch.zeros(2, 3, 30, 30)}, r"the style has shape \[2, 3, 30, 30\]"),
        ({"style": torch.zeros(1, 3, 30, 8)}, "with sides of at least 16"),
        ({"style": torch.zeros(1, 3, 30, 30, dtype=torch.uint8)}, "the style is torch.uint8"),
        ({"weights": Weights(style=-1)}, "the style's weight is -1: expected at least 0"),
        ({"steps": 0}, "steps is 0"),
        ({"layers": ["lips"]}, "there is no layer 'lips'"),
        ({"content_layer": "lips"}, "there is no layer 'lips'"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str, discriminator: Discriminator) -> None:
    arguments = {"content": torch.zeros(1, 3, 30, 30), "style": torch.zeros(1, 3, 30, 30), **change}
    with pytest.raises(ValueError, match=message):
        transfer(discriminator, **arguments)
