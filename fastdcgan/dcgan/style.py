"""Style transfer with a trained discriminator as the network that sees.

Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks" (CVPR 2016), with the
discriminator's blocks in place of VGG's: an image is sought whose activations in one layer are those of the content
(section 2.1), and whose activations in all layers correlate as those of the style do (section 2.2).

    nets = load_trained("runs/photos")
    result = transfer(nets.discriminator, content, style)                   # [1, C, H, W] in [-1, 1], of any size
    save_image(grid(torch.cat([content, style, result.image])), Path("style.png"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.dcgan.features import FeatureExtractor
from fastdcgan.dcgan.models import Discriminator, Generator
from fastdcgan.folding import fold_batchnorm

LEAST_SIDE = 16  # pixels: of a smaller image the deeper layers see nothing but their padding
_LR = 0.05


@dataclass(frozen=True)
class Transferred:
    """The image [1, C, H, W] in [-1, 1], and the losses before the first step and after the last."""

    image: Tensor
    first_loss: float
    loss: float


@dataclass(frozen=True)
class Weights:
    """Weights of the content's loss, the style's, and the total variation (Mahendran and Vedaldi, 2015, section 3)."""

    content: float = 1.0
    style: float = 3.0
    variation: float = 0.2


def gram(activations: Tensor) -> Tensor:
    """How the channels correlate: [N, C, H, W] -> [N, C, C], means over the pixels (equation 3)."""
    flat = activations.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def total_variation(image: Tensor) -> Tensor:
    """The mean squared difference of neighbouring pixels."""
    down, across = image[:, :, 1:] - image[:, :, :-1], image[:, :, :, 1:] - image[:, :, :, :-1]
    return down.square().mean() + across.square().mean()


def transfer(
    discriminator: Discriminator,
    content: Tensor,
    style: Tensor,
    *,
    layers: Sequence[str] | None = None,
    content_layer: str | None = None,
    weights: Weights | None = None,
    steps: int = 300,
    generator: Generator | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Transferred:
    """The `content` in the manner of the `style`, images [1, C, H, W] in [-1, 1] of any two sizes.

    The image's pixels are optimised from the content on, by Adam; with a `generator`, its `z` is instead, from a
    random start, and the content has to be of the generator's size. Each layer's losses are divided by theirs for
    the content itself (style) or without contrast (content), so that weights mean the same for all networks. The
    networks run in eval mode with BatchNorm folded in, and stay as they are.

    Args:
        layers: whose Gram matrices make the style; default: all of the discriminator's but the logit.
        content_layer: default: the second, where things still have their places.

    Raises ValueError for images that don't fit the networks, names that are no layers, and weights below 0.
    """
    names = [name for name, _ in discriminator.stages()][:-1]
    layers = names if layers is None else list(layers)
    content_layer = content_layer or names[min(1, len(names) - 1)]
    weights = weights or Weights()
    _check(discriminator, generator, content, style, weights, steps)
    device = next(discriminator.parameters()).device
    content, style = (x.detach().to(device, torch.float32) for x in (content, style))
    eyes = fold_batchnorm(discriminator).eval().requires_grad_(False)
    extractor = FeatureExtractor(eyes, [*dict.fromkeys([*layers, content_layer])])

    with torch.no_grad():
        seen, wanted = extractor.maps(content), {k: gram(v) for k, v in extractor.maps(style).items() if k in layers}
        place = seen[content_layer]
        place_scale = (place - place.mean((2, 3), keepdim=True)).square().mean().clamp_min(1e-12)
        scales = {k: (gram(seen[k]) - target).square().mean().clamp_min(1e-12) for k, target in wanted.items()}

    def loss_of(image: Tensor, place: Tensor = place) -> Tensor:
        maps = extractor.maps(image)
        content_loss = F.mse_loss(maps[content_layer], place) / place_scale
        style_loss = torch.stack([F.mse_loss(gram(maps[k]), wanted[k]) / scales[k] for k in wanted]).mean()
        return weights.content * content_loss + weights.style * style_loss + weights.variation * total_variation(image)

    random = torch.Generator().manual_seed(seed)
    if generator is None:
        reach = 2 ** len(extractor.layers)

        def shifted_loss(image: Tensor) -> Tensor:
            # The layers see every second pixel of the one before: what only they see, a dotted pattern, is nowhere
            # good for a loss that looks from another place each time.
            down, right = torch.randint(reach, (2,), generator=random).tolist()
            with torch.no_grad():
                place = extractor.maps(content.roll((down, right), (2, 3)))[content_layer]
            return loss_of(image.roll((down, right), (2, 3)), place)

        u = content.mul(0.98).atanh()  # the image is tanh(u), so that no step leaves [-1, 1]
        paint, loss = torch.tanh, shifted_loss
    else:
        u = torch.randn(1, generator.nz, generator=random).to(device)
        paint, loss = fold_batchnorm(generator).eval().requires_grad_(False), loss_of
    first = paint(u)
    image = _optimize(lambda u: loss(paint(u)), paint, u, steps, progress)
    with torch.no_grad():
        return Transferred(image, float(loss_of(first)), float(loss_of(image)))


def _optimize(
    loss_of: Callable[[Tensor], Tensor],
    paint: Callable[[Tensor], Tensor],
    u: Tensor,
    steps: int,
    progress: Callable[[int], None] | None,
) -> Tensor:
    u.requires_grad_()
    optimizer = torch.optim.Adam([u], _LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        (u.grad,) = torch.autograd.grad(loss_of(u), u)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step)
    return paint(u).detach()


def _check(
    discriminator: Discriminator,
    generator: Generator | None,
    content: Tensor,
    style: Tensor,
    weights: Weights,
    steps: int,
) -> None:
    channels = discriminator.channels
    for name, x in (("content", content), ("style", style)):
        if x.dim() != 4 or x.shape[:2] != (1, channels) or min(x.shape[2:]) < LEAST_SIDE:
            expected = f"[1, {channels}, H, W] with sides of at least {LEAST_SIDE}"
            raise ValueError(f"the {name} has shape {list(x.shape)}: expected {expected}")
        if not x.is_floating_point():
            raise ValueError(f"the {name} is {x.dtype}: expected floating point, in [-1, 1]")
    if generator is not None:
        size = (generator.channels, generator.image_size, generator.image_size)
        if content.shape[1:] != size:
            raise ValueError(f"the content has shape {list(content.shape)}: expected {[1, *size]}, as it is generated")
    for name in ("content", "style", "variation"):
        if not getattr(weights, name) >= 0:
            raise ValueError(f"the {name}'s weight is {getattr(weights, name)}: expected at least 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1")
