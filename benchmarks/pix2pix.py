"""A workload that nobody wrote with fused layers in mind: pix2pix in plain PyTorch, for `fuse()`.

A U-Net with skip connections and a PatchGAN discriminator (Isola et al., "Image-to-Image Translation with Conditional
Adversarial Networks", 2017, section 6.1), batch-normalised but for the outermost and innermost layers, without dropout,
so that all peers compute the same. D sees the source beside the image; G's loss has 100 times the L1 distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdcgan.benchmarks.steps import bce

L1_WEIGHT = 100.0


class UNet(nn.Module):
    """[N, channels, size, size] -> the same; `size` is 2 to the power of the number of levels."""

    def __init__(self, size: int, channels: int, width: int) -> None:
        super().__init__()
        levels = size.bit_length() - 1
        widths = [min(width * 2**i, width * 8) for i in range(levels)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before = channels
        for i, out in enumerate(widths):
            inner = 0 < i < levels - 1
            norm = [nn.BatchNorm2d(out)] if inner else []
            self.down.append(
                nn.Sequential(nn.Conv2d(before, out, 4, 2, 1, bias=not inner), *norm, nn.LeakyReLU(0.2, inplace=True))
            )
            before = out
        for i in reversed(range(levels)):
            given = widths[i] * (1 if i == levels - 1 else 2)  # the skip connection
            out = widths[i - 1] if i else channels
            end = [nn.BatchNorm2d(out), nn.ReLU(inplace=True)] if i else [nn.Tanh()]
            self.up.append(nn.Sequential(nn.ConvTranspose2d(given, out, 4, 2, 1, bias=not i), *end))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        for level, skip in zip(self.up, [None, *reversed(skips[:-1])], strict=True):
            x = level(x if skip is None else torch.cat([x, skip], 1))
        return x


class PatchDiscriminator(nn.Module):
    """(source, image), [N, channels, H, W] each -> a logit for each patch."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(2 * channels, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for i, stride in enumerate((2, 1)):
            inner, out = width * 2**i, width * 2 ** (i + 1)
            layers += [nn.Conv2d(inner, out, 4, stride, 1, bias=False), nn.BatchNorm2d(out)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.net = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 1, 1))

    def forward(self, source: Tensor, image: Tensor) -> Tensor:
        return self.net(torch.cat([source, image], 1))


@dataclass(frozen=True)
class Pix2PixShape:
    """Sizes of the workload."""

    image_size: int = 64
    channels: int = 3
    width: int = 64

    def nets(self) -> tuple[nn.Module, nn.Module]:
        """(generator, discriminator) of PyTorch's own modules, initialised as in the paper (section 6.2)."""
        nets = UNet(self.image_size, self.channels, self.width), PatchDiscriminator(self.channels, self.width)
        for module in (module for net in nets for module in net.modules()):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        return nets

    def inputs(self, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(target, source) [N, channels, size, size] in [-1, 1]; random, as in `shapes.inputs`."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2, batch, self.channels, self.image_size, self.image_size)
        target, source = torch.rand(shape, generator=generator) * 2 - 1
        return target, source

    def kinked(self, batch: int) -> int:
        """Values of the smallest layer in front of a ReLU: the U-Net's innermost."""
        return batch * self.width * 8


def pix2pix_step(
    generator: nn.Module,
    discriminator: nn.Module,
    opt_g: torch.optim.Optimizer,
    opt_d: torch.optim.Optimizer,
    target: Tensor,
    source: Tensor,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One step; arguments and result as in `steps.gan_step`, with a source image in the place of noise."""
    enabled = autocast is not None
    opt_d.zero_grad(set_to_none=True)
    with torch.autocast(target.device.type, dtype=autocast, enabled=enabled):
        fake = generator(source)
        on_real = discriminator(source, target)
        on_fake = discriminator(source, fake.detach())
    loss_d = (bce(on_real, 1.0) + bce(on_fake, 0.0)) / 2
    loss_d.backward()
    opt_d.step()

    discriminator.requires_grad_(False)
    opt_g.zero_grad(set_to_none=True)
    with torch.autocast(target.device.type, dtype=autocast, enabled=enabled):
        on_fake = discriminator(source, fake)
    loss_g = bce(on_fake, 1.0) + L1_WEIGHT * F.l1_loss(fake.to(target.dtype), target)
    loss_g.backward()
    opt_g.step()
    discriminator.requires_grad_(True)
    return loss_d.detach(), loss_g.detach()
