"""Autoencoders, variational and not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.model import Model


class VAE(nn.Module):
    """What variational autoencoders share (Kingma and Welling, 2014): the code is sampled in training mode."""

    encoder: nn.Module
    decoder: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        mu, log_var = self.encoder(x).chunk(2, dim=1)
        if self.training:
            mu = mu + torch.randn(mu.shape, device=mu.device) * torch.exp(0.5 * log_var)
        return self.decoder(mu)


class ConvVAE(VAE):
    """A widely used layout for 64x64 pixels: 3x3 convolutions of stride 2 with BatchNorm and LeakyReLU, mirrored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width << i for i in range(5)]
        down = [self._down(ci, co) for ci, co in zip([3, *widths], widths, strict=False)]
        code = nn.Linear(widths[-1] * 2 * 2, 2 * 128)
        self.encoder = nn.Sequential(*down, nn.Flatten(), code)
        back = widths[::-1]
        up = [self._up(ci, co) for ci, co in zip(back, [*back[1:], width], strict=True)]
        self.decoder = nn.Sequential(
            nn.Linear(128, widths[-1] * 2 * 2), nn.Unflatten(1, (widths[-1], 2, 2)), *up,
            nn.Sequential(nn.Conv2d(width, 3, 3, padding=1), nn.Tanh()),
        )  # fmt: skip

    def _down(self, ci: int, co: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(ci, co, 3, stride=2, padding=1), nn.BatchNorm2d(co), nn.LeakyReLU())

    def _up(self, ci: int, co: int) -> nn.Sequential:
        up = nn.ConvTranspose2d(ci, co, 3, stride=2, padding=1, output_padding=1)
        return nn.Sequential(up, nn.BatchNorm2d(co), nn.LeakyReLU())


class BetaVAE(VAE):
    """The layout of Burgess et al., 2018, for 64x64 pixels: 4x4 convolutions of stride 2 with ReLU, not normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = width * 2
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.ReLU(True), nn.Conv2d(width, width, 4, 2, 1), nn.ReLU(True),
            nn.Conv2d(width, wide, 4, 2, 1), nn.ReLU(True), nn.Conv2d(wide, wide, 4, 2, 1), nn.ReLU(True),
            nn.Conv2d(wide, 256, 4, 1), nn.ReLU(True), nn.Flatten(), nn.Linear(256, 2 * 10),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(10, 256), nn.Unflatten(1, (256, 1, 1)), nn.ReLU(True),
            nn.ConvTranspose2d(256, wide, 4), nn.ReLU(True), nn.ConvTranspose2d(wide, wide, 4, 2, 1), nn.ReLU(True),
            nn.ConvTranspose2d(wide, width, 4, 2, 1), nn.ReLU(True),
            nn.ConvTranspose2d(width, width, 4, 2, 1), nn.ReLU(True), nn.ConvTranspose2d(width, 3, 4, 2, 1),
        )  # fmt: skip


class VQResidual(nn.Module):
    """VQ-VAE's residual block: ReLU first, 3x3, ReLU, 1x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width // 4, 3, padding=1), nn.ReLU(), nn.Conv2d(width // 4, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


def vq_vae(width: int) -> nn.Sequential:
    """VQ-VAE's encoder and decoder (van den Oord et al., 2017), without the quantiser between them, which convolves
    nothing."""
    encoder = nn.Sequential(
        nn.Conv2d(3, width // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), VQResidual(width), VQResidual(width), nn.ReLU(),
        nn.Conv2d(width, width // 2, 1),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Conv2d(width // 2, width, 3, padding=1), VQResidual(width), VQResidual(width), nn.ReLU(),
        nn.ConvTranspose2d(width, width // 2, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width // 2, 3, 4, 2, 1),
    )  # fmt: skip
    return nn.Sequential(encoder, decoder)


def denoising_autoencoder(width: int) -> nn.Sequential:
    """For 28x28 pixels (after Vincent et al., 2010): 3x3 convolutions and MaxPool, transposed 2x2 convolutions back."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
        nn.Conv2d(width, width * 2, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
        nn.ConvTranspose2d(width * 2, width, 2, stride=2), nn.ReLU(True),
        nn.ConvTranspose2d(width, 1, 2, stride=2), nn.Sigmoid(),
    )  # fmt: skip


_IMAGE = (3, 64, 64)
MODELS = {
    "vae": Model(ConvVAE, 32, _IMAGE, (2, _IMAGE)),
    "beta-vae": Model(BetaVAE, 32, _IMAGE, (2, _IMAGE)),
    "vq-vae": Model(vq_vae, 128, _IMAGE, (8, (3, 16, 16))),
    "denoising autoencoder": Model(denoising_autoencoder, 32, (1, 28, 28), (4, (1, 12, 12))),
}
