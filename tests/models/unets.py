"""U-Nets for segmentation (Ronneberger et al., 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.model import Model


def double_conv(ci: int, co: int, middle: int | None = None) -> nn.Sequential:
    """(convolution, BatchNorm, ReLU) twice."""
    middle = middle or co
    return nn.Sequential(
        nn.Conv2d(ci, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(inplace=True),
        nn.Conv2d(middle, co, 3, padding=1, bias=False), nn.BatchNorm2d(co), nn.ReLU(inplace=True),
    )  # fmt: skip


class Up(nn.Module):
    """Twice the size by interpolation or by a transposed convolution, the skip connection beside it, a double conv."""

    def __init__(self, ci: int, co: int, bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = double_conv(ci, co, ci // 2)
        else:
            self.up = nn.ConvTranspose2d(ci, ci // 2, 2, stride=2)
            self.conv = double_conv(ci, co)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(below)], dim=1))


class SegmentationUNet(nn.Module):
    """Double convs as Sequentials, MaxPool down, and one of two ways up."""

    def __init__(self, width: int, bilinear: bool = True, classes: int = 2) -> None:
        super().__init__()
        half = 2 if bilinear else 1  # interpolation keeps the channels, so there are half as many at each level
        self.inc = double_conv(3, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), double_conv(width, width * 2))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double_conv(width * 2, width * 4))
        self.down3 = nn.Sequential(nn.MaxPool2d(2), double_conv(width * 4, width * 8 // half))
        self.up1 = Up(width * 8, width * 4 // half, bilinear)
        self.up2 = Up(width * 4, width * 2 // half, bilinear)
        self.up3 = Up(width * 2, width, bilinear)
        self.outc = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(self.down3(x3), x3)
        return self.outc(self.up3(self.up2(x, x2), x1))


def transposed_unet(width: int) -> nn.Module:
    return SegmentationUNet(width, bilinear=False)


class UNetStage(nn.Module):
    """Two 3x3 convolutions with BatchNorm and functional ReLUs, called by its forward."""

    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ci, co, 3, padding=1), nn.BatchNorm2d(co)
        self.conv2, self.bn2 = nn.Conv2d(co, co, 3, padding=1), nn.BatchNorm2d(co)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class FunctionalUNet(nn.Module):
    """The same with everything called by its forward, as tutorials write it; one logit per pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder1, self.encoder2 = UNetStage(3, width), UNetStage(width, width * 2)
        self.bottleneck = UNetStage(width * 2, width * 4)
        self.pool = nn.MaxPool2d(2, 2)
        self.upconv2, self.decoder2 = nn.ConvTranspose2d(width * 4, width * 2, 2, 2), UNetStage(width * 4, width * 2)
        self.upconv1, self.decoder1 = nn.ConvTranspose2d(width * 2, width, 2, 2), UNetStage(width * 2, width)
        self.conv = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        enc1 = self.encoder1(x)
        enc2 = self.encoder2(self.pool(enc1))
        dec2 = self.upconv2(self.bottleneck(self.pool(enc2)))
        dec2 = self.decoder2(torch.cat((dec2, enc2), dim=1))
        dec1 = self.decoder1(torch.cat((self.upconv1(dec2), enc1), dim=1))
        return torch.sigmoid(self.conv(dec1))


class NamedUNet(nn.Module):
    """Every intermediate in a variable of its own, as code that comes from other frameworks has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width * 2, 3, padding=1), nn.BatchNorm2d(width * 2)
        self.conv4, self.bn4 = nn.Conv2d(width * 2, width * 2, 3, padding=1), nn.BatchNorm2d(width * 2)
        self.up = nn.ConvTranspose2d(width * 2, width, 2, 2)
        self.conv5, self.bn5 = nn.Conv2d(width * 2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu, self.pool, self.out = nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        conv1 = self.conv1(x)
        norm1 = self.bn1(conv1)
        relu1 = self.relu(norm1)
        conv2 = self.conv2(relu1)
        norm2 = self.bn2(conv2)
        relu2 = self.relu(norm2)
        pooled = self.pool(relu2)
        conv3 = self.conv3(pooled)
        norm3 = self.bn3(conv3)
        relu3 = self.relu(norm3)
        conv4 = self.conv4(relu3)
        norm4 = self.bn4(conv4)
        relu4 = self.relu(norm4)
        up = self.up(relu4)
        both = torch.cat([relu2, up], dim=1)
        conv5 = self.conv5(both)
        norm5 = self.bn5(conv5)
        relu5 = self.relu(norm5)
        logits = self.out(relu5)
        return torch.sigmoid(logits)


_IMAGE, _SMALL = (3, 64, 64), (4, (3, 16, 16))
MODELS = {
    "unet": Model(SegmentationUNet, 64, _IMAGE, _SMALL),
    "unet, transposed": Model(transposed_unet, 64, _IMAGE, _SMALL),
    "unet, called one by one": Model(FunctionalUNet, 64, _IMAGE, _SMALL),
    "unet, every step named": Model(NamedUNet, 64, _IMAGE, _SMALL),
}
