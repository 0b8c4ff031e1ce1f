"""Discriminators and critics other than the DCGAN's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.models.model import Model

Norm = type[nn.BatchNorm2d] | type[nn.InstanceNorm2d]


class DropoutDiscriminator(nn.Module):
    """3x3 convolutions of stride 2, each with LeakyReLU, Dropout2d and only then BatchNorm, with the 0.8 that a popular
    collection of PyTorch GANs gives it as its eps; 32x32 pixels (after Radford et al., 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(ci: int, co: int, norm: bool = True) -> list[nn.Module]:
            modules = [nn.Conv2d(ci, co, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(0.25)]
            return [*modules, nn.BatchNorm2d(co, 0.8)] if norm else modules

        widths = [width << i for i in range(4)]
        blocks = [m for ci, co in itertools.pairwise(widths) for m in block(ci, co)]
        self.model = nn.Sequential(*block(3, width, norm=False), *blocks)
        self.adv_layer = nn.Sequential(nn.Linear(widths[-1] * 2 * 2, 1), nn.Sigmoid())

    def forward(self, img: Tensor) -> Tensor:
        out = self.model(img)
        return self.adv_layer(torch.flatten(out, 1))


def critic(width: int) -> nn.Sequential:
    """WGAN-GP's critic of 64x64 pixels (Gulrajani et al., 2017): 5x5 convolutions of stride 2, nothing normalised."""
    modules: list[nn.Module] = []
    for ci, co in ((3, width), (width, width * 2), (width * 2, width * 4), (width * 4, width * 8)):
        modules += [nn.Conv2d(ci, co, 5, 2, 2), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(width * 8 * 4 * 4, 1))


def normed_critic(width: int) -> nn.Sequential:
    """The same paper's objective in a DCGAN's shape, as it is mostly written: InstanceNorm in BatchNorm's place."""
    modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for i in range(3):
        down = nn.Conv2d(width << i, width << (i + 1), 4, 2, 1, bias=False)
        modules.append(nn.Sequential(down, nn.InstanceNorm2d(width << (i + 1), affine=True), nn.LeakyReLU(0.2)))
    return nn.Sequential(*modules, nn.Conv2d(width * 8, 1, 4, 2, 0))


def sn_discriminator(norm: Callable[[nn.Module], nn.Module], width: int) -> nn.Sequential:
    """SN-GAN's discriminator of 32x32 pixels (Miyato et al., 2018): spectral norm on every convolution and on the last
    layer."""
    modules: list[nn.Module] = []
    before = 3
    for i in range(3):
        wide = width << i
        modules += [norm(nn.Conv2d(before, wide, 3, 1, 1)), nn.LeakyReLU(0.1)]
        modules += [norm(nn.Conv2d(wide, wide * 2, 4, 2, 1)), nn.LeakyReLU(0.1)]
        before = wide * 2
    modules += [norm(nn.Conv2d(before, before, 3, 1, 1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*modules, nn.Flatten(), norm(nn.Linear(before * 4 * 4, 1)))


def patch_gan(norm: Norm = nn.BatchNorm2d, width: int = 4) -> nn.Sequential:
    """pix2pix's 70x70 discriminator (Isola et al., 2017): one logit per patch."""
    bias = norm is nn.InstanceNorm2d
    modules: list[nn.Module] = [nn.Conv2d(6, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for i, stride in enumerate((2, 2, 1)):
        modules += [nn.Conv2d(width << i, width << (i + 1), 4, stride, 1, bias=bias), norm(width << (i + 1))]
        modules += [nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*modules, nn.Conv2d(width * 8, 1, 4, 1, 1))


def pixel_discriminator(width: int) -> nn.Sequential:
    """The same paper's 1x1 discriminator: one logit per pixel."""
    return nn.Sequential(
        nn.Conv2d(6, width, 1), nn.LeakyReLU(0.2, True),
        nn.Conv2d(width, width * 2, 1, bias=False), nn.BatchNorm2d(width * 2), nn.LeakyReLU(0.2, True),
        nn.Conv2d(width * 2, 1, 1, bias=False),
    )  # fmt: skip


class SRDiscriminator(nn.Module):
    """SRGAN's discriminator (Ledig et al., 2017): 3x3 convolutions, every second of stride 2; any image size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.LeakyReLU(0.2, True)]
        before = width
        for i in range(1, 8):
            wide = width << (i // 2)
            modules += [nn.Conv2d(before, wide, 3, 1 + i % 2, 1), nn.BatchNorm2d(wide), nn.LeakyReLU(0.2, True)]
            before = wide
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(before, before * 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(before * 2, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


_IMAGES, _PAIRS = (3, 64, 64), (6, 64, 64)
MODELS = {
    "dropout discriminator": Model(DropoutDiscriminator, 16, (3, 32, 32), (4, (3, 32, 32)), input_grad=True),
    "wgan-gp critic": Model(critic, 64, _IMAGES, (4, _IMAGES), input_grad=True),
    "wgan-gp critic, instance norm": Model(normed_critic, 64, _IMAGES, (4, _IMAGES), input_grad=True),
    "sngan discriminator": Model(
        partial(sn_discriminator, parametrizations.spectral_norm), 64, (3, 32, 32), (4, (3, 32, 32)), input_grad=True
    ),
    "patchgan": Model(partial(patch_gan, nn.BatchNorm2d), 64, _PAIRS, (4, (6, 32, 32)), input_grad=True),
    "patchgan, instance norm": Model(
        partial(patch_gan, nn.InstanceNorm2d), 64, _PAIRS, (4, (6, 32, 32)), input_grad=True
    ),
    "pixel discriminator": Model(pixel_discriminator, 64, _PAIRS, (4, (6, 16, 16)), input_grad=True),
    "srgan discriminator": Model(SRDiscriminator, 64, (3, 96, 96), (4, (3, 32, 32)), input_grad=True),
}
