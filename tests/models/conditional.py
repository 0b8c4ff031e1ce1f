"""Networks that are told a class: their only argument is the image or noise, and the classes take turns."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.model import Model

CLASSES = 10


def labels_of(x: Tensor) -> Tensor:
    """A class for each of a batch."""
    return torch.arange(x.shape[0], device=x.device) % CLASSES


class ConditionalGenerator(nn.Module):
    """A DCGAN generator of 32x32 pixels with the class, embedded, beside the noise (Mirza and Osindero, 2014)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 50)
        self.net = nn.Sequential(
            self._block(150, width * 8, 4, 1, 0), self._block(width * 8, width * 4, 4, 2, 1),
            self._block(width * 4, width * 2, 4, 2, 1), nn.ConvTranspose2d(width * 2, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def _block(self, ci: int, co: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
        up = nn.ConvTranspose2d(ci, co, kernel, stride, padding, bias=False)
        return nn.Sequential(up, nn.BatchNorm2d(co), nn.ReLU())

    def forward(self, noise: Tensor) -> Tensor:
        embedding = self.embed(labels_of(noise)).unsqueeze(2).unsqueeze(3)
        return self.net(torch.cat([noise, embedding], dim=1))


class ConditionalDiscriminator(nn.Module):
    """The discriminator to it: the class is embedded as one more channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 32 * 32)
        self.disc = nn.Sequential(
            nn.Conv2d(4, width, 4, 2, 1), nn.LeakyReLU(0.2),
            self._block(width, width * 2), self._block(width * 2, width * 4), nn.Conv2d(width * 4, 1, 4, 2, 0),
        )  # fmt: skip

    def _block(self, ci: int, co: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(ci, co, 4, 2, 1, bias=False), nn.BatchNorm2d(co), nn.LeakyReLU(0.2))

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.embed(labels_of(x)).view(-1, 1, 32, 32)
        return self.disc(torch.cat([x, embedding], dim=1))


class ConditionalNorm(nn.Module):
    """BatchNorm whose scale and shift depend on the class (Dumoulin et al., 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = nn.Embedding(CLASSES, channels), nn.Embedding(CLASSES, channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain, bias = (1 + self.gain(y))[:, :, None, None], self.bias(y)[:, :, None, None]
        return self.bn(x) * gain + bias


class BigBlock(nn.Module):
    """BigGAN's up-sampling block; each module is called by its forward."""

    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = ConditionalNorm(ci), ConditionalNorm(co)
        self.conv1, self.conv2 = nn.Conv2d(ci, co, 3, padding=1), nn.Conv2d(co, co, 3, padding=1)
        self.conv_sc = nn.Conv2d(ci, co, 1)
        self.activation = nn.ReLU(inplace=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.interpolate(self.activation(self.bn1(x, y)), scale_factor=2)
        h = self.conv2(self.activation(self.bn2(self.conv1(h), y)))
        return h + self.conv_sc(F.interpolate(x, scale_factor=2))


class BigGenerator(nn.Module):
    """A generator of 32x32 pixels of BigGAN's blocks (Brock et al., 2019), without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width * 4
        self.linear = nn.Linear(100, self.width * 4 * 4)
        widths = (width * 4, width * 4, width * 2, width)
        self.blocks = nn.ModuleList(BigBlock(ci, co) for ci, co in itertools.pairwise(widths))
        self.output_layer = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        y = labels_of(z)
        h = self.linear(z).view(-1, self.width, 4, 4)
        for block in self.blocks:
            h = block(h, y)
        return torch.tanh(self.output_layer(h))


MODELS = {
    "conditional generator": Model(ConditionalGenerator, 64, (100, 1, 1), (4, (100, 1, 1))),
    "conditional discriminator": Model(ConditionalDiscriminator, 64, (3, 32, 32), (4, (3, 32, 32)), input_grad=True),
    "biggan generator": Model(BigGenerator, 64, (100,), (4, (100,))),
}
