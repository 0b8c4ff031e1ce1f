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


class PreActBlock(nn.Module):
    """The basic block with norm and activation before each convolution (He et al., 2016b)."""

    def __init__(self, ci: int, co: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(ci), nn.Conv2d(ci, co, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(co), nn.Conv2d(co, co, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        if stride != 1 or ci != co:
            self.shortcut = nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out += shortcut
        return out


class ResNet(nn.Module):
    """ResNet-18 for 32x32 pixels: a 3x3 convolution, four stages of two blocks."""

    def __init__(self, block: type[SequentialBlock] | type[BasicBlock] | type[PreActBlock], width: int) -> None:
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


def resnet18_preactivated(width: int) -> nn.Module:
    """Without the norm and ReLU that come after its last block."""
    return ResNet(PreActBlock, width)


class DenseLayer(nn.Module):
    """DenseNet's bottleneck: BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3, and the input beside the result."""

    def __init__(self, ci: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(ci), nn.Conv2d(ci, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class DenseNet(nn.Module):
    """DenseNet (Huang et al., 2017) for 32x32 pixels: three dense blocks of two layers, transitions between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2 * width, 3, padding=1, bias=False)
        modules: list[nn.Module] = []
        before = 2 * width
        for i in range(3):
            for _ in range(2):
                modules.append(DenseLayer(before, width))
                before += width
            if i < 2:
                modules += [nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, before // 2, 1, bias=False)]
                modules.append(nn.AvgPool2d(2))
                before //= 2
        self.features, self.bn = nn.Sequential(*modules), nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.features(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


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
    "resnet-18, pre-activation": Model(resnet18_preactivated, 64, _IMAGE, (4, (3, 16, 16))),
    "densenet": Model(DenseNet, 12, _IMAGE, (4, (3, 16, 16))),
    "mobilenet-v2": Model(MobileNet, 32, _IMAGE, (4, (3, 16, 16))),
    "digit classifier": Model(digit_classifier, 32, (1, 28, 28), (4, (1, 28, 28))),
}
