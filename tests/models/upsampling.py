"""Generators that resize and then convolve."""

from __future__ import annotations

from torch import Tensor, nn

from tests.models.model import Model


class UpsamplingGenerator(nn.Module):
    """The generator to `DropoutDiscriminator`, of 32x32 pixels: BatchNorm first, then nearest up-sampling and 3x3
    convolutions (the remedy of Odena et al., 2016, to checkerboards)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width * 2
        self.l1 = nn.Sequential(nn.Linear(100, self.width * 8 * 8))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(self.width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(self.width, self.width, 3, stride=1, padding=1),
            nn.BatchNorm2d(self.width, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(self.width, width, 3, stride=1, padding=1),
            nn.BatchNorm2d(width, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 3, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.conv_blocks(self.l1(noise).view(-1, self.width, 8, 8))


class GLU(nn.Module):
    """Half of the channels, gated by the other half (Dauphin et al., 2017), as it is written in GANs."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return x[:, :half] * x[:, half:].sigmoid()


def up_block(ci: int, co: int, gate: nn.Module) -> nn.Sequential:
    """FastGAN's and StackGAN's: twice the size, one 3x3 convolution to twice the channels, and a gate."""
    up = nn.Upsample(scale_factor=2, mode="nearest")
    return nn.Sequential(up, nn.Conv2d(ci, co * 2, 3, 1, 1, bias=False), nn.BatchNorm2d(co * 2), gate)


def up_block_twice(ci: int, co: int) -> nn.Sequential:
    """FastGAN's block with a second convolution."""
    second = [nn.Conv2d(co, co * 2, 3, 1, 1, bias=False), nn.BatchNorm2d(co * 2), nn.GLU(1)]
    return nn.Sequential(*up_block(ci, co, nn.GLU(1)), *second)


def fast_gan(width: int) -> nn.Sequential:
    """A generator of 64x64 pixels of FastGAN's blocks (Liu et al., 2021), without its noise and skip layers."""
    first = nn.ConvTranspose2d(100, width * 16, 4, 1, 0, bias=False)
    return nn.Sequential(
        nn.Sequential(first, nn.BatchNorm2d(width * 16), nn.GLU(1)),
        up_block_twice(width * 8, width * 8), up_block(width * 8, width * 4, nn.GLU(1)),
        up_block_twice(width * 4, width * 2), up_block(width * 2, width, nn.GLU(1)),
        nn.Conv2d(width, 3, 3, 1, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


class StackGAN(nn.Module):
    """The first stage of StackGAN-v2's generator (Zhang et al., 2018): a linear layer, which for the sake of
    batches of one isn't normalised, then blocks with its own GLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width * 16
        self.fc = nn.Sequential(nn.Linear(100, self.width * 4 * 4 * 2), nn.GLU(1))
        self.upsample1 = up_block(self.width, self.width // 2, GLU())
        self.upsample2 = up_block(self.width // 2, self.width // 4, GLU())
        self.upsample3 = up_block(self.width // 4, self.width // 8, GLU())
        self.upsample4 = up_block(self.width // 8, self.width // 16, GLU())
        self.image = nn.Sequential(nn.Conv2d(width, 3, 3, 1, 1, bias=False), nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        x = self.fc(noise).view(-1, self.width, 4, 4)
        return self.image(self.upsample4(self.upsample3(self.upsample2(self.upsample1(x)))))


class ResidualUp(nn.Module):
    """Pre-activated, with a second path that is only resized and projected."""

    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.BatchNorm2d(ci), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(ci, co, 3, 1, 1),
            nn.BatchNorm2d(co), nn.ReLU(), nn.Conv2d(co, co, 3, 1, 1),
        )  # fmt: skip
        self.bypass = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(ci, co, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.bypass(x)


class ResidualGenerator(nn.Module):
    """SN-GAN's residual generator of 32x32 pixels (Miyato et al., 2018; Gulrajani et al., 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.dense = nn.Linear(100, width * 4 * 4)
        last = [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh()]
        self.model = nn.Sequential(*(ResidualUp(width, width) for _ in range(3)), *last)

    def forward(self, z: Tensor) -> Tensor:
        return self.model(self.dense(z).view(-1, self.width, 4, 4))


MODELS = {
    "upsampling generator": Model(UpsamplingGenerator, 64, (100,), (4, (100,))),
    "fastgan generator": Model(fast_gan, 32, (100, 1, 1), (2, (100, 1, 1))),
    "stackgan generator": Model(StackGAN, 32, (100,), (2, (100,))),
    "residual generator": Model(ResidualGenerator, 128, (100,), (4, (100,))),
}
