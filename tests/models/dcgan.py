"""Generators and discriminators of strided convolutions throughout."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from tests.models.model import Model


class Generator(nn.Module):
    """The generator of PyTorch's DCGAN example for 64x64 pixels (Radford et al., 2015); `pixels=32` has one block
    less."""

    def __init__(self, nz: int = 100, ngf: int = 4, nc: int = 3, pixels: int = 64) -> None:
        super().__init__()
        width = ngf * pixels // 8
        modules = [nn.ConvTranspose2d(nz, width, 4, 1, 0, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
        while width > ngf:
            modules += [nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width // 2)]
            modules += [nn.ReLU(True)]
            width //= 2
        self.main = nn.Sequential(*modules, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, input: Tensor) -> Tensor:
        return self.main(input)


class Discriminator(nn.Module):
    """The discriminator of the same example; `sigmoid=False` gives logits."""

    def __init__(self, ndf: int = 4, nc: int = 3, pixels: int = 64, sigmoid: bool = True) -> None:
        super().__init__()
        modules = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        width = ndf
        while width < ndf * pixels // 8:
            modules += [nn.Conv2d(width, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2)]
            modules += [nn.LeakyReLU(0.2, inplace=True)]
            width *= 2
        modules.append(nn.Conv2d(width, 1, 4, 1, 0, bias=False))
        self.main = nn.Sequential(*modules, *([nn.Sigmoid()] if sigmoid else []))

    def forward(self, input: Tensor) -> Tensor:
        return self.main(input).view(-1, 1).squeeze(1)


def dcgan_weights(module: nn.Module) -> None:
    """N(0, 0.02) weights (Radford et al., 2015, section 4); `model.apply(dcgan_weights)`."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def digit_generator(width: int) -> nn.Sequential:
    """A DCGAN generator of 28x28 pixels, as for MNIST: 1, 7, 14, 28."""
    return nn.Sequential(
        nn.ConvTranspose2d(100, width * 4, 7, 1, 0, bias=False), nn.BatchNorm2d(width * 4), nn.ReLU(True),
        nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2), nn.ReLU(True),
        nn.ConvTranspose2d(width * 2, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


def digit_discriminator(width: int) -> nn.Sequential:
    """The discriminator to it."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2, True),
        nn.Conv2d(width, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2), nn.LeakyReLU(0.2, True),
        nn.Flatten(), nn.Linear(width * 2 * 7 * 7, 1), nn.Sigmoid(),
    )  # fmt: skip


def _generator(pixels: int, width: int) -> nn.Module:
    return Generator(ngf=width, pixels=pixels)


def _discriminator(pixels: int, width: int) -> nn.Module:
    return Discriminator(ndf=width, pixels=pixels)


NOISE = (100, 1, 1)
MODELS = {
    "dcgan generator": Model(partial(_generator, 64), 64, NOISE, (4, NOISE)),
    "dcgan generator, 32x32": Model(partial(_generator, 32), 64, NOISE, (4, NOISE)),
    "dcgan discriminator": Model(partial(_discriminator, 64), 64, (3, 64, 64), (4, (3, 64, 64)), input_grad=True),
    "dcgan discriminator, 32x32": Model(
        partial(_discriminator, 32), 64, (3, 32, 32), (4, (3, 32, 32)), input_grad=True
    ),
    "digit generator": Model(digit_generator, 64, NOISE, (4, NOISE)),
    "digit discriminator": Model(digit_discriminator, 64, (1, 28, 28), (4, (1, 28, 28)), input_grad=True),
}
