"""Networks from an image to an image of the same size."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.models.discriminators import Norm
from tests.models.model import Model


class SkipBlock(nn.Module):
    """One level of pix2pix's U-Net (Isola et al., 2017): down, the level below, up, and the input beside the result.

    Its first module is an in-place LeakyReLU, so what is concatenated is the input after that LeakyReLU.
    """

    def __init__(
        self, outer: int, inner: int, below: SkipBlock | None, norm: Norm, where: str = "", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.outermost = where == "outermost"
        bias = norm is nn.InstanceNorm2d
        down = nn.Conv2d(outer, inner, 4, 2, 1, bias=bias)
        wide = inner if where == "innermost" else inner * 2
        up = nn.ConvTranspose2d(wide, outer, 4, 2, 1, bias=bias or self.outermost)
        if self.outermost:
            parts: list[nn.Module | None] = [down, below, nn.ReLU(True), up, nn.Tanh()]
        elif where == "innermost":
            parts = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, norm(outer)]
        else:
            parts = [nn.LeakyReLU(0.2, True), down, norm(inner), below, nn.ReLU(True), up, norm(outer)]
            parts += [nn.Dropout(dropout)] if dropout else []
        self.model = nn.Sequential(*(part for part in parts if part is not None))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class UNet(nn.Module):
    """pix2pix's generator with `depth` levels, the innermost of 1x1 pixels in images of 2**depth."""

    def __init__(self, norm: Norm = nn.BatchNorm2d, width: int = 4, depth: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [3, *(min(width * 2**i, width * 8) for i in range(depth))]
        block: SkipBlock | None = None
        for i in reversed(range(depth)):
            where = "outermost" if i == 0 else "innermost" if i == depth - 1 else ""
            block = SkipBlock(widths[i], widths[i + 1], block, norm, where, dropout if i > 3 else 0.0)
        assert block is not None
        self.model = block

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


class ResidualBlock(nn.Module):
    """CycleGAN's (Zhu et al., 2017): reflection padding as a module or as the convolution's own, and a sum."""

    def __init__(self, width: int, norm: Norm, pad_in_conv: bool) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for i in range(2):
            if pad_in_conv:
                modules.append(nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"))
            else:
                modules += [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3)]
            modules.append(norm(width))
            if i == 0:
                modules.append(nn.ReLU(True))
        self.conv_block = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def resnet_generator(
    norm: Norm = nn.BatchNorm2d, pad_in_conv: bool = False, width: int = 4, blocks: int = 2
) -> nn.Sequential:
    """CycleGAN's generator: 7x7, two strided convolutions down, residual blocks, two transposed ones up, 7x7."""
    modules: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), norm(width), nn.ReLU(True)]
    for i in range(2):
        modules += [nn.Conv2d(width << i, width << (i + 1), 3, 2, 1), norm(width << (i + 1)), nn.ReLU(True)]
    modules += [ResidualBlock(width * 4, norm, pad_in_conv) for _ in range(blocks)]
    for i in (1, 0):
        up = nn.ConvTranspose2d(width << (i + 1), width << i, 3, 2, 1, output_padding=1)
        modules += [up, norm(width << i), nn.ReLU(True)]
    return nn.Sequential(*modules, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


class StyleConv(nn.Module):
    """Up-sampling if asked for, reflection padding and a convolution, each called by its forward."""

    def __init__(self, ci: int, co: int, kernel: int, stride: int = 1, upsample: int = 1) -> None:
        super().__init__()
        self.upsample = upsample
        self.reflection_pad = nn.ReflectionPad2d(kernel // 2)
        self.conv2d = nn.Conv2d(ci, co, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample > 1:
            x = nn.functional.interpolate(x, scale_factor=self.upsample, mode="nearest")
        return self.conv2d(self.reflection_pad(x))


class StyleResidual(nn.Module):
    """Two 3x3 convolutions with InstanceNorm, and a sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = StyleConv(width, width, 3), StyleConv(width, width, 3)
        self.in1, self.in2 = nn.InstanceNorm2d(width, affine=True), nn.InstanceNorm2d(width, affine=True)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.in2(self.conv2(self.relu(self.in1(self.conv1(x))))) + x


class StyleNet(nn.Module):
    """The fast style transfer network (Johnson et al., 2016) with InstanceNorm (Ulyanov et al., 2016), 9x9 kernels at
    both ends; each module is called by its forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.in1 = StyleConv(3, width, 9), nn.InstanceNorm2d(width, affine=True)
        self.conv2, self.in2 = StyleConv(width, width * 2, 3, 2), nn.InstanceNorm2d(width * 2, affine=True)
        self.conv3, self.in3 = StyleConv(width * 2, width * 4, 3, 2), nn.InstanceNorm2d(width * 4, affine=True)
        self.residuals = nn.Sequential(*(StyleResidual(width * 4) for _ in range(5)))
        self.deconv1 = StyleConv(width * 4, width * 2, 3, upsample=2)
        self.in4 = nn.InstanceNorm2d(width * 2, affine=True)
        self.deconv2, self.in5 = StyleConv(width * 2, width, 3, upsample=2), nn.InstanceNorm2d(width, affine=True)
        self.deconv3 = StyleConv(width, 3, 9)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.in1(self.conv1(x)))
        y = self.relu(self.in2(self.conv2(y)))
        y = self.relu(self.in3(self.conv3(y)))
        y = self.residuals(y)
        y = self.relu(self.in4(self.deconv1(y)))
        y = self.relu(self.in5(self.deconv2(y)))
        return self.deconv3(y)


def _unet(norm: Norm, dropout: float, width: int) -> nn.Module:
    return UNet(norm, width, 6 if width > 4 else 4, dropout)


def _resnet(norm: Norm, pad_in_conv: bool, width: int) -> nn.Module:
    return resnet_generator(norm, pad_in_conv, width, 6 if width > 4 else 2)


_IMAGE, _SMALL, _TINY = (3, 64, 64), (4, (3, 32, 32)), (4, (3, 16, 16))
MODELS = {
    "pix2pix unet": Model(partial(_unet, nn.BatchNorm2d, 0.0), 64, _IMAGE, _SMALL),
    "pix2pix unet, dropout": Model(partial(_unet, nn.BatchNorm2d, 0.5), 64, _IMAGE, _SMALL),
    "pix2pix unet, instance norm": Model(partial(_unet, nn.InstanceNorm2d, 0.0), 64, _IMAGE, _SMALL),
    "cyclegan generator": Model(partial(_resnet, nn.BatchNorm2d, False), 64, _IMAGE, _TINY),
    "cyclegan generator, padding in conv": Model(partial(_resnet, nn.BatchNorm2d, True), 64, _IMAGE, _TINY),
    "cyclegan generator, instance norm": Model(partial(_resnet, nn.InstanceNorm2d, False), 64, _IMAGE, _TINY),
    "style transfer network": Model(StyleNet, 32, _IMAGE, _TINY),
}
