"""Super-resolution, four times the size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.model import Model


class SRBlock(nn.Module):
    """SRGAN's residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class SRGenerator(nn.Module):
    """SRGAN's generator (Ledig et al., 2017): 9x9 kernels at both ends, residual blocks, PixelShuffle, PReLU."""

    def __init__(self, width: int, blocks: int = 16) -> None:
        super().__init__()
        self.initial = nn.Sequential(nn.Conv2d(3, width, 9, 1, 4), nn.PReLU())
        self.residuals = nn.Sequential(*(SRBlock(width) for _ in range(blocks)))
        self.trunk = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        up = [(nn.Conv2d(width, width * 4, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU()) for _ in range(2)]
        self.upsampling = nn.Sequential(*(module for modules in up for module in modules))
        self.final = nn.Conv2d(width, 3, 9, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.initial(x)
        return torch.tanh(self.final(self.upsampling(first + self.trunk(self.residuals(first)))))


class DenseBlock(nn.Module):
    """ESRGAN's residual dense block; each convolution is called by its forward, with one LeakyReLU for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        growth = width // 2
        self.conv1 = nn.Conv2d(width, growth, 3, 1, 1)
        self.conv2 = nn.Conv2d(width + growth, growth, 3, 1, 1)
        self.conv3 = nn.Conv2d(width + 2 * growth, growth, 3, 1, 1)
        self.conv4 = nn.Conv2d(width + 3 * growth, growth, 3, 1, 1)
        self.conv5 = nn.Conv2d(width + 4 * growth, width, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.lrelu(self.conv1(x))
        x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = self.lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        return self.conv5(torch.cat((x, x1, x2, x3, x4), 1)) * 0.2 + x


class RRDBNet(nn.Module):
    """ESRGAN's generator (Wang et al., 2018) with two dense blocks of its 69: nothing is normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, width, 3, 1, 1)
        self.body = nn.Sequential(DenseBlock(width), DenseBlock(width))
        self.conv_body = nn.Conv2d(width, width, 3, 1, 1)
        self.conv_up1, self.conv_up2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.conv_hr, self.conv_last = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, 3, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        feat = self.conv_first(x)
        feat = feat + self.conv_body(self.body(feat))
        feat = self.lrelu(self.conv_up1(F.interpolate(feat, scale_factor=2, mode="nearest")))
        feat = self.lrelu(self.conv_up2(F.interpolate(feat, scale_factor=2, mode="nearest")))
        return self.conv_last(self.lrelu(self.conv_hr(feat)))


class EDSRBlock(nn.Module):
    """EDSR's residual block: nothing is normalised, and the branch is scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mul(0.1) + x


class EDSR(nn.Module):
    """EDSR (Lim et al., 2017) with 8 residual blocks."""

    def __init__(self, width: int, blocks: int = 8) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        self.body = nn.Sequential(*(EDSRBlock(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1))
        up = [m for _ in range(2) for m in (nn.Conv2d(width, width * 4, 3, padding=1), nn.PixelShuffle(2))]
        self.tail = nn.Sequential(*up, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(x + self.body(x))


class ESPCN(nn.Module):
    """ESPCN (Shi et al., 2016): 5x5 and 3x3 convolutions with Tanh, called one by one, and one PixelShuffle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 5, 1, 2)
        self.conv2 = nn.Conv2d(width, width // 2, 3, 1, 1)
        self.conv3 = nn.Conv2d(width // 2, 48, 3, 1, 1)
        self.pixel_shuffle = nn.PixelShuffle(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(x))
        return self.pixel_shuffle(self.conv3(torch.tanh(self.conv2(x))))


class FSRCNN(nn.Sequential):
    """FSRCNN (Dong et al., 2016): PReLU with a slope for each channel, and one transposed convolution at the end."""

    def __init__(self, width: int) -> None:
        few = width // 4
        sizes = [(width, few, 1), *[(few, few, 3)] * 4, (few, width, 1)]
        inner = [m for i, o, k in sizes for m in (nn.Conv2d(i, o, k, padding=k // 2), nn.PReLU(o))]
        first = (nn.Conv2d(3, width, 5, padding=2), nn.PReLU(width))
        super().__init__(*first, *inner, nn.ConvTranspose2d(width, 3, 9, 4, 4, output_padding=3))


_IMAGE, _SMALL = (3, 24, 24), (4, (3, 8, 8))
MODELS = {
    "srgan generator": Model(SRGenerator, 64, _IMAGE, _SMALL),
    "esrgan generator": Model(RRDBNet, 64, _IMAGE, _SMALL),
    "edsr": Model(EDSR, 64, _IMAGE, _SMALL),
    "fsrcnn": Model(FSRCNN, 56, _IMAGE, (8, (3, 8, 8))),
    "espcn": Model(ESPCN, 64, _IMAGE, _SMALL),
}
