"""Filling in what is missing of an image: semantic inpainting with a trained DCGAN.

Yeh, Chen, Lim, Schwing, Hasegawa-Johnson and Do, "Semantic Image Inpainting with Deep Generative Models" (CVPR 2017):
search for the `z` whose image agrees with what is known (section 3.2: context loss) and looks real to D (prior loss),
then blend that image in (section 3.3).

    trained = load_trained("runs/mine")
    result = inpaint(trained.generator, trained.discriminator, images, masks.centre(32))
    save_image(grid(result.images), Path("filled.png"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.dcgan import blending, masks
from fastdcgan.dcgan.images import grid
from fastdcgan.dcgan.models import Discriminator, Generator
from fastdcgan.folding import fold_batchnorm

WINDOW = 7  # pixels: the neighbourhood that the context loss weighs a pixel by (section 3.2)


@dataclass(frozen=True)
class Inpainted:
    """`images` are the known pixels with the rest filled in, `generated` the generator's images before blending: both
    [N, C, H, W] in [-1, 1]. `z` [N, nz] made them, and `loss` [N] is what was left of the loss."""

    images: Tensor
    generated: Tensor
    z: Tensor
    loss: Tensor


def inpaint(
    generator: Generator,
    discriminator: Discriminator,
    images: Tensor,
    known: Tensor,
    *,
    steps: int = 300,
    restarts: int = 4,
    lr: float = 0.05,
    prior: float = 0.003,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Inpainted:
    """Fill in `images` [N, C, H, W] in [-1, 1] where `known`, bool [N or 1, 1, H, W], is False; those pixels of
    `images` are not looked at.

    Every image gets `restarts` searches of `steps` steps of Adam from different `z`, all in one batch, and keeps the
    one that ends with the lowest loss: weighted context loss plus `prior` times the prior loss. `z` is kept at the
    length that draws from a normal distribution have, sqrt(nz), as the paper keeps it in the range of its uniform one.
    The networks run in eval mode with BatchNorm folded in, and gradients are taken with respect to `z` alone; both
    networks stay as they are.
    Raises ValueError for images or a mask that don't fit the networks, and for networks that don't fit each other.
    """
    _check(generator, discriminator, images, known, steps, restarts)
    device = next(generator.parameters()).device
    n = len(images)
    images, known = images.to(device, torch.float32), known.to(device).expand(n, 1, *images.shape[2:])
    # Copies, so that nobody's requires_grad changes.
    paint = fold_batchnorm(generator).requires_grad_(False)
    judge = fold_batchnorm(discriminator).requires_grad_(False)

    target, weights = _repeated(images, restarts), _repeated(context_weights(known), restarts)
    z = torch.randn(n * restarts, generator.nz, generator=torch.Generator().manual_seed(seed)).to(device)
    length = generator.nz**0.5
    z = (z * (length / z.norm(dim=1, keepdim=True))).requires_grad_()
    adam = torch.optim.Adam([z], lr)
    for step in range(1, steps + 1):
        total = _losses(paint(z), target, weights, judge, prior).sum()
        (z.grad,) = torch.autograd.grad(total, z)
        adam.step()
        with torch.no_grad():
            z *= length / z.norm(dim=1, keepdim=True)
        if progress is not None:
            progress(step)
    with torch.no_grad():
        made = paint(z)
        losses = _losses(made, target, weights, judge, prior).view(n, restarts)
        best = losses.argmin(1) + restarts * torch.arange(n, device=device)
        generated = made[best]
        return Inpainted(blending.poisson(images, generated, known), generated, z[best].detach(), losses.amin(1))


def context_weights(known: Tensor, window: int = WINDOW) -> Tensor:
    """How much each known pixel counts: the share of missing ones in the window around it (equation 3), float32
    [N, 1, H, W]. Zero for missing pixels, and for known ones that are far from any."""
    missing = (~known).float()
    share = F.avg_pool2d(missing, window, 1, window // 2, count_include_pad=False)
    return share * known


def psnr(images: Tensor, truth: Tensor, missing: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], per image: [N]. With `missing` [N or 1, 1, H, W] over
    those pixels alone."""
    error = (images.float() - truth.float()).square()
    if missing is None:
        mse = error.flatten(1).mean(1)
    else:
        here = missing.expand_as(error)
        mse = (error * here).flatten(1).sum(1) / here.flatten(1).sum(1)
    return 10 * torch.log10(4 / mse)


def fill_with(images: Tensor, known: Tensor, value: Tensor) -> Tensor:
    """`images` with `value`, of any shape that broadcasts, where they are not known."""
    return torch.where(known, images, value.expand_as(images))


def mean_of_known(images: Tensor, known: Tensor) -> Tensor:
    """The mean colour of each image's known pixels: [N, C, 1, 1]."""
    here = known.expand(len(images), 1, *images.shape[2:])
    return (images * here).sum((2, 3), keepdim=True) / here.sum((2, 3), keepdim=True)


def sheet(images: Tensor, known: Tensor, filled: Tensor, columns: int = 12) -> Image.Image:
    """Three rows of pictures: the originals, what is known of them (the rest in grey), and the filled ones; below these
    three more for those that find no place, and so on. `images` and `filled` are [N, C, H, W]."""
    rows = torch.stack([images, fill_with(images, known, images.new_zeros(())), filled])
    columns = min(columns, len(images))
    missing = -len(images) % columns
    rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, missing), value=-1.0)
    in_blocks = rows.unflatten(1, (-1, columns)).transpose(0, 1)
    return grid(in_blocks.flatten(0, 2), columns)


def _losses(made: Tensor, target: Tensor, weights: Tensor, judge: Discriminator, prior: float) -> Tensor:
    """The loss of each image: context loss (equation 4) plus `prior` times log(1 - D(G(z))) (equation 6)."""
    context = (weights * (made - target).abs()).flatten(1).sum(1)
    return context - prior * F.softplus(judge(made))


def _repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, 0)


def _check(
    generator: Generator, discriminator: Discriminator, images: Tensor, known: Tensor, steps: int, restarts: int
) -> None:
    shape = (generator.channels, generator.image_size, generator.image_size)
    other = (discriminator.channels, discriminator.image_size, discriminator.image_size)
    if other != shape:
        raise ValueError(f"the discriminator takes images {list(other)}: the generator makes {list(shape)}")
    if images.dim() != 4 or images.shape[1:] != shape or not len(images):
        raise ValueError(f"images have shape {list(images.shape)}: expected [N, {', '.join(map(str, shape))}]")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: expected floating point, in [-1, 1]")
    if known.dtype != torch.bool:
        raise ValueError(f"the mask is {known.dtype}: expected torch.bool, True where pixels are known")
    if known.dim() != 4 or known.shape[0] not in (1, len(images)) or known.shape[1:] != (1, *shape[1:]):
        sizes = ", ".join(map(str, (1, *shape[1:])))
        raise ValueError(f"the mask has shape {list(known.shape)}: expected [1 or {len(images)}, {sizes}]")
    masks.check(known)
    for name, value in (("steps", steps), ("restarts", restarts)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
