"""The inverse of a generator: the `z` whose image comes closest to a given one.

Lipton and Tripathi, "Precise Recovery of Latent Vectors from Generative Adversarial Networks" (2017): gradient descent
on the squared distance between images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdcgan.dcgan.features import GRID, FeatureExtractor
from fastdcgan.dcgan.models import Generator
from fastdcgan.folding import fold_batchnorm

_PRIOR = 1e-3  # weight of z's length, which keeps it where the generator was trained


def encode(generator: Generator, images: Tensor, *, steps: int = 200, lr: float = 0.1, seed: int = 0) -> Tensor:
    """`z` [N, nz] for images [N, C, H, W] in [-1, 1], by `steps` steps of Adam from a random start.

    The generator runs in eval mode with BatchNorm folded in, and stays as it is.
    Raises ValueError for images that are not of the generator's size.
    """
    shape = (generator.channels, generator.image_size, generator.image_size)
    if images.dim() != 4 or images.shape[1:] != shape:
        raise ValueError(f"images have shape {list(images.shape)}: expected [N, {', '.join(map(str, shape))}]")
    if steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1")
    random = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        paint = fold_batchnorm(generator).eval().requires_grad_(False)
        target = images.detach().clone()
        z = torch.randn(len(images), generator.nz, generator=random).to(images.device).requires_grad_()
        adam = torch.optim.Adam([z], lr)
        for _ in range(steps):
            error = (paint(z) - target).square().flatten(1).mean(1)
            (z.grad,) = torch.autograd.grad((error + _PRIOR * z.square().mean(1)).sum(), z)
            adam.step()
    return z.detach()


class InverseProjection:
    """Images -> features by way of `encode`: `z` itself, or layers of the generator at that `z`, max-pooled and
    concatenated as a `FeatureExtractor` does it: [N, C, H, W] -> [N, F].

    Raises ValueError as FeatureExtractor does.
    """

    def __init__(
        self,
        generator: Generator,
        layers: Sequence[str] = (),
        *,
        pool: int | None = GRID,
        steps: int = 200,
        seed: int = 0,
    ) -> None:
        self.generator, self.steps, self.seed = generator, steps, seed
        self.extractor = FeatureExtractor(generator, layers, pool) if layers else None

    def __call__(self, images: Tensor) -> Tensor:
        z = encode(self.generator, images, steps=self.steps, seed=self.seed)
        return z if self.extractor is None else self.extractor(z)
