"""Networks whose weights are computed at each call: for an equalised learning rate, or from a style."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.model import Model


class EqualConv2d(nn.Module):
    """A convolution with an equalised learning rate (Karras et al., 2018): He's constant is multiplied at each call."""

    def __init__(self, ci: int, co: int, kernel: int, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(co, ci, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(co))
        self.scale, self.padding = (2 / (ci * kernel**2)) ** 0.5, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


def pixel_norm(x: Tensor) -> Tensor:
    """The same length for the channels of each pixel."""
    return x / torch.sqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class ProGenerator(nn.Module):
    """ProGAN's generator (Karras et al., 2018), grown to 32x32 pixels: nearest up-sampling, two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width * 8, width * 8, width * 4, width * 2, width)
        self.first = EqualConv2d(100, widths[0], 4, padding=3)
        self.conv1 = nn.ModuleList(EqualConv2d(ci, co, 3, 1) for ci, co in itertools.pairwise(widths))
        self.conv2 = nn.ModuleList(EqualConv2d(co, co, 3, 1) for co in widths[1:])
        self.to_rgb = EqualConv2d(width, 3, 1)

    def forward(self, noise: Tensor) -> Tensor:
        x = pixel_norm(F.leaky_relu(self.first(pixel_norm(noise)), 0.2))
        for i, (conv1, conv2) in enumerate(zip(self.conv1, self.conv2, strict=True)):
            if i > 0:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = pixel_norm(F.leaky_relu(conv1(x), 0.2))
            x = pixel_norm(F.leaky_relu(conv2(x), 0.2))
        return self.to_rgb(x)


class ProDiscriminator(nn.Module):
    """The discriminator to it: average pooling down, and the deviation over the batch as one more channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, width * 2, width * 4, width * 8)
        self.from_rgb = EqualConv2d(3, width, 1)
        self.conv1 = nn.ModuleList(EqualConv2d(ci, ci, 3, 1) for ci in widths[:-1])
        self.conv2 = nn.ModuleList(EqualConv2d(ci, co, 3, 1) for ci, co in itertools.pairwise(widths))
        self.last, self.dense = EqualConv2d(width * 8 + 1, width * 8, 3, 1), EqualConv2d(width * 8, width * 8, 4)
        self.logit = EqualConv2d(width * 8, 1, 1)
        self.act, self.pool = nn.LeakyReLU(0.2), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.from_rgb(x))
        for conv1, conv2 in zip(self.conv1, self.conv2, strict=True):
            x = self.pool(self.act(conv2(self.act(conv1(x)))))
        deviation = (x.var(dim=0, correction=0) + 1e-8).sqrt().mean().expand(x.shape[0], 1, *x.shape[2:])
        x = self.act(self.last(torch.cat([x, deviation], dim=1)))
        return self.logit(self.act(self.dense(x))).flatten(1)


class ModulatedConv(nn.Module):
    """StyleGAN2's (Karras et al., 2020): weights of its own for each image of a batch, as one grouped convolution."""

    def __init__(self, ci: int, co: int, kernel: int, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(co, ci, kernel, kernel))
        self.modulation = nn.Linear(64, ci)
        self.scale, self.demodulate = (ci * kernel**2) ** -0.5, demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight = self.scale * self.weight[None] * (1 + self.modulation(style)).view(batch, 1, channels, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum([2, 3, 4], keepdim=True) + 1e-8)
        weight = weight.flatten(0, 1)
        x = x.reshape(1, batch * channels, height, width)
        out = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=batch)
        return out.view(batch, -1, *out.shape[2:])


class StyleBlock(nn.Module):
    """A modulated convolution, a bias and LeakyReLU."""

    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.conv, self.bias = ModulatedConv(ci, co, 3), nn.Parameter(torch.zeros(1, co, 1, 1))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x, style) + self.bias, 0.2)


class StyleGenerator(nn.Module):
    """StyleGAN2's synthesis of 32x32 pixels, without its noise: up-sampling, two style blocks, and images summed up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(100, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2))
        widths = (width * 8, width * 4, width * 2, width)
        self.constant = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.conv1 = nn.ModuleList(StyleBlock(ci, co) for ci, co in itertools.pairwise(widths))
        self.conv2 = nn.ModuleList(StyleBlock(co, co) for co in widths[1:])
        self.to_rgb = nn.ModuleList(ModulatedConv(co, 3, 1, demodulate=False) for co in widths[1:])

    def forward(self, z: Tensor) -> Tensor:
        style, image = self.mapping(pixel_norm(z)), None
        x = self.constant.repeat(z.shape[0], 1, 1, 1)
        for conv1, conv2, to_rgb in zip(self.conv1, self.conv2, self.to_rgb, strict=True):
            x = conv2(conv1(F.interpolate(x, scale_factor=2), style), style)
            rgb = to_rgb(x, style)
            image = rgb if image is None else F.interpolate(image, scale_factor=2) + rgb
        assert image is not None
        return image


_NOISE, _IMAGE = (100, 1, 1), (3, 32, 32)
MODELS = {
    "progan generator": Model(ProGenerator, 32, _NOISE, (2, _NOISE)),
    "progan discriminator": Model(ProDiscriminator, 32, _IMAGE, (2, _IMAGE), input_grad=True),
    "stylegan generator": Model(StyleGenerator, 32, (100,), (2, (100,))),
}
