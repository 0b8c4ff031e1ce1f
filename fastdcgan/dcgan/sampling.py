"""Images out of a trained generator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastdcgan.dcgan import images
from fastdcgan.dcgan.models import Generator

_BATCH = 64


@torch.inference_mode()
def sample(generator: Generator, count: int, seed: int = 0) -> Tensor:
    """`count` images [count, C, H, W] in [-1, 1] on the CPU; the same seed gives the same images, however many."""
    if count < 1:
        raise ValueError(f"count is {count}: expected at least 1")
    random = torch.Generator().manual_seed(seed)
    device = next(generator.parameters()).device
    parts = []
    for start in range(0, count, _BATCH):
        z = torch.stack([torch.randn(generator.nz, generator=random) for _ in range(min(_BATCH, count - start))])
        parts.append(generator(z.to(device)).float().cpu())
    return torch.cat(parts)


def save_samples(samples: Tensor, out: Path, grid: bool = True) -> list[Path]:
    """Write one grid to the file `out`, or each image to a file of its own in the folder `out`. Returns the files."""
    if grid:
        images.save_image(images.grid(samples), out)
        return [out]
    digits = len(str(len(samples) - 1))
    paths = [out / f"{i:0{digits}}.png" for i in range(len(samples))]
    for pixels, path in zip(images.to_pixels(samples), paths, strict=True):
        images.save_image(images.to_image(pixels), path)
    return paths
