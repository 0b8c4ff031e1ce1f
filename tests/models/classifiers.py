"""Classifiers of 10 classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.model import Model


class VGG(nn.Module):
    """VGG-11 with BatchNorm (Simonyan and Zisserman, 2015) for 32x32 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        before = 3
        for times in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0):  # of the width; 0 is pooling
            if times == 0:
                modules.append(nn.MaxPool2d(2, 2))
                continue
            modules += [nn.Conv2d(before, width * times, 3, padding=1), nn.BatchNorm2d(width * times), nn.ReLU(True)]
            before = width * times
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class SequentialBlock(nn.Module):
    """ResNet's basic block (He et al., 2016) as two Sequentials and a sum."""

    def __init__(self, ci: int, co: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(ci, co, 3, stride, 1, bias=False), nn.BatchNorm2d(co), nn.ReLU(inplace=True),
            nn.Conv2d(co, co, 3, 1, 1, bias=False), nn.BatchNorm2d(co),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or ci != co:
            self.shortcut = nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class BasicBlock(nn.Module):
    """The same with each module called by its forward."""

    def __init__(self, ci: int, co: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ci, co, 3, stride, 1, bias=False), nn.BatchNorm2d(co)
        self.conv2, self.bn2 = nn.Conv2d(co, co, 3, 1, 1, bias=False), nn.BatchNorm2d(co)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or ci != co:
            self.downsample = nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class ResNet(nn.Module):
    """ResNet-18 for 32x32 pixels: a 3x3 convolution, four stages of two blocks."""

    def __init__(self, block: type[SequentialBlock] | type[BasicBlock], width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True))
        stages: list[nn.Module] = [block(width, width, 1), block(width, width, 1)]
        for i in range(3):
            stages += [block(width << i, width << (i + 1), 2), block(width << (i + 1), width << (i + 1), 1)]
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def resnet18(width: int) -> nn.Module:
    return ResNet(SequentialBlock, width)


def resnet18_called(width: int) -> nn.Module:
    return ResNet(BasicBlock, width)


class PreactivatedBlock(nn.Module):
    """The block with its norms and activations before its convolutions (He et al., 2016, Identity mappings)."""

    def __init__(self, ci: int, co: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(ci), nn.Conv2d(ci, co, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(co), nn.Conv2d(co, co, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(ci, co, 1, stride, bias=False) if stride != 1 or ci != co else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + x
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreactivatedResNet(nn.Module):
    """ResNet-18 of those for 32x32 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        stages = [PreactivatedBlock(width, width, 1), PreactivatedBlock(width, width, 1)]
        for i in range(3):
            wide = width << (i + 1)
            stages += [PreactivatedBlock(width << i, wide, 2), PreactivatedBlock(wide, wide, 1)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.BatchNorm2d(width * 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(width * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.stages(self.stem(x))))


class DenseLayer(nn.Module):
    """1x1, then 3x3 to `growth` channels, each behind a norm and an activation, and beside what comes in."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, growth * 4, 1, bias=False),
            nn.BatchNorm2d(growth * 4), nn.ReLU(inplace=True), nn.Conv2d(growth * 4, growth, 3, 1, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def dense_net(growth: int) -> nn.Sequential:
    """A DenseNet-BC (Huang et al., 2017) for 32x32 pixels: three stages of four layers."""
    channels = growth * 2
    modules: list[nn.Module] = [nn.Conv2d(3, channels, 3, 1, 1, bias=False)]
    for stage in range(3):
        for _ in range(4):
            modules.append(DenseLayer(channels, growth))
            channels += growth
        modules += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if stage < 2:
            modules += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class InvertedResidual(nn.Module):
    """MobileNetV2's: 1x1 to more channels, 3x3 per channel, 1x1 back, and a sum where sizes agree."""

    def __init__(self, ci: int, co: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = ci * expand
        self.adds = stride == 1 and ci == co
        modules: list[nn.Module] = []
        if expand != 1:
            modules += [nn.Conv2d(ci, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)]
        modules += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)]
        modules += [nn.ReLU6(inplace=True), nn.Conv2d(wide, co, 1, bias=False), nn.BatchNorm2d(co)]
        self.conv = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNet(nn.Module):
    """MobileNetV2 (Sandler et al., 2018) for 32x32 pixels: seven inverted residuals."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True)),
            InvertedResidual(width, half, 1, 1), InvertedResidual(half, width, 2, 6),
            InvertedResidual(width, width, 1, 6), InvertedResidual(width, width * 2, 2, 6),
            InvertedResidual(width * 2, width * 2, 1, 6), InvertedResidual(width * 2, width * 3, 1, 6),
            InvertedResidual(width * 3, width * 3, 1, 6),
            nn.Sequential(nn.Conv2d(width * 3, width * 10, 1, bias=False), nn.BatchNorm2d(width * 10), nn.ReLU6(True)),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(width * 10, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


def digit_classifier(width: int) -> nn.Sequential:
    """LeNet's shape (LeCun et al., 1998) as it is written today: 5x5 kernels, ReLU, MaxPool, for 28x28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, width * 2, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(width * 2 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


_IMAGE = (3, 32, 32)
MODELS = {
    "vgg-11": Model(VGG, 64, _IMAGE, (2, _IMAGE)),
    "resnet-18": Model(resnet18, 64, _IMAGE, (4, (3, 16, 16))),
    "resnet-18, called one by one": Model(resnet18_called, 64, _IMAGE, (4, (3, 16, 16))),
    "resnet-18, pre-activated": Model(PreactivatedResNet, 64, _IMAGE, (4, (3, 16, 16))),
    "densenet": Model(dense_net, 16, _IMAGE, (2, (3, 16, 16))),
    "mobilenet-v2": Model(MobileNet, 32, _IMAGE, (4, (3, 16, 16))),
    "digit classifier": Model(digit_classifier, 32, (1, 28, 28), (4, (1, 28, 28))),
}
