"""What is measured: the blocks of the DCGAN, 32x32 to 128x128 (Radford et al., 2015), and the nets made of them.

The one description here serves the vanilla modules (`Block.module`, `NetShape.nets`), the block suite and the FLOP and
byte counts of `floors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

LEAKY_SLOPE = 0.2
IMAGE_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Block:
    """A convolution (plain or transposed, square kernel), BatchNorm or not, and an activation or not."""

    name: str
    transposed: bool
    in_channels: int
    out_channels: int
    in_size: int
    act: str  # "relu" | "leaky_relu" | "tanh" | "identity"
    norm: bool
    kernel: int = 4
    stride: int = 2
    padding: int = 1

    @property
    def out_size(self) -> int:
        if self.transposed:
            return (self.in_size - 1) * self.stride - 2 * self.padding + self.kernel
        return (self.in_size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def title(self) -> str:
        """Its name and sizes, as tables show them."""
        return f"{self.name} {self.in_channels}->{self.out_channels} {self.in_size}->{self.out_size}"

    @property
    def weights(self) -> int:
        """Number of convolution weights."""
        return self.in_channels * self.out_channels * self.kernel**2

    def inputs(self, batch: int) -> int:
        """Number of values of the input."""
        return batch * self.in_channels * self.in_size**2

    def outputs(self, batch: int) -> int:
        """Number of values of the output."""
        return batch * self.out_channels * self.out_size**2

    def data(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An input and an output's gradient, float32 contiguous on the CPU. The gradient is 1 or -1: whichever value
        rounding takes across a ReLU's kink then changes the results by as much as any other (`peers.tolerance`)."""
        x = torch.randn(batch, self.in_channels, self.in_size, self.in_size)
        return x, torch.randn(batch, self.out_channels, self.out_size, self.out_size).sign()

    def flops(self, batch: int) -> int:
        """FLOPs of any one of its three contractions (forward, input gradient, weight gradient).

        A multiply-add counts 2, and taps that fall on the padding count too."""
        positions = self.in_size if self.transposed else self.out_size
        return 2 * batch * self.weights * positions**2

    def layers(self) -> list[nn.Module]:
        """Its vanilla PyTorch modules, in order, with DCGAN's initialisation."""
        conv_type = nn.ConvTranspose2d if self.transposed else nn.Conv2d
        conv = conv_type(self.in_channels, self.out_channels, self.kernel, self.stride, self.padding, bias=False)
        nn.init.normal_(conv.weight, 0.0, 0.02)
        layers: list[nn.Module] = [conv]
        if self.norm:
            norm = nn.BatchNorm2d(self.out_channels)
            nn.init.normal_(norm.weight, 1.0, 0.02)
            layers.append(norm)
        if self.act == "relu":
            layers.append(nn.ReLU(inplace=True))
        elif self.act == "leaky_relu":
            layers.append(nn.LeakyReLU(LEAKY_SLOPE, inplace=True))
        elif self.act == "tanh":
            layers.append(nn.Tanh())
        elif self.act != "identity":
            raise ValueError(f"unknown activation {self.act!r} of block {self.name!r}")
        return layers

    def module(self) -> nn.Sequential:
        """The block alone, as vanilla PyTorch."""
        return nn.Sequential(*self.layers())


@dataclass(frozen=True)
class NetShape:
    """Sizes of a DCGAN. The generator ends in tanh, the discriminator in a logit."""

    image_size: int = 64
    channels: int = 3
    nz: int = 100
    ngf: int = 64
    ndf: int = 64

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size has to be a power of two of at least 16, not {self.image_size}")

    def generator(self) -> tuple[Block, ...]:
        """The blocks from noise [N, nz, 1, 1] up to images [N, channels, image_size, image_size]."""
        width = self.ngf * self.image_size // 8
        blocks = [Block("G0", True, self.nz, width, 1, "relu", True, stride=1, padding=0)]
        while blocks[-1].out_size < self.image_size // 2:
            size = blocks[-1].out_size
            blocks.append(Block(f"G{len(blocks)}", True, width, width // 2, size, "relu", True))
            width //= 2
        blocks.append(Block(f"G{len(blocks)}", True, width, self.channels, blocks[-1].out_size, "tanh", False))
        return tuple(blocks)

    def discriminator(self) -> tuple[Block, ...]:
        """The blocks from images down to logits [N, 1, 1, 1]."""
        blocks = [Block("D0", False, self.channels, self.ndf, self.image_size, "leaky_relu", False)]
        width = self.ndf
        while blocks[-1].out_size > 4:
            size = blocks[-1].out_size
            blocks.append(Block(f"D{len(blocks)}", False, width, width * 2, size, "leaky_relu", True))
            width *= 2
        blocks.append(Block(f"D{len(blocks)}", False, width, 1, 4, "identity", False, stride=1, padding=0))
        return tuple(blocks)

    def nets(self) -> tuple[nn.Sequential, nn.Sequential]:
        """(generator, discriminator) as plain `nn.Sequential`s of PyTorch's own modules."""

        def net(blocks: tuple[Block, ...]) -> nn.Sequential:
            return nn.Sequential(*(layer for block in blocks for layer in block.layers()))

        return net(self.generator()), net(self.discriminator())


def inputs(shape: NetShape, batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(real images in [-1, 1], noise) of one step, float32 contiguous on the CPU; random, because timings on constant
    data are better than real data will ever see."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(batch, shape.channels, shape.image_size, shape.image_size, generator=generator) * 2 - 1
    return real, torch.randn(batch, shape.nz, 1, 1, generator=generator)
