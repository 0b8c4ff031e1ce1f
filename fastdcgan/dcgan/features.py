"""The activations of a trained network as features of images.

    discriminator = load_trained("runs/mnist", "cpu").discriminator
    features = extract(FeatureExtractor(discriminator), load_images("mnist", 32, 1).array)     # [N, F]

Radford et al. (2015), section 5.1: the discriminator's convolutional features of all layers, each max-pooled to a 4x4
grid, flattened and concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan.dcgan.console import track
from fastdcgan.dcgan.models import Discriminator, Generator
from fastdcgan.images import normalize_images

GRID = 4  # the paper's
_BATCH = 128


class FeatureExtractor(nn.Module):
    """Layers of a `Discriminator` (of images) or of a `Generator` (of `z`) as one vector: -> [N, features].

    It runs the network's own blocks, fused, up to the last layer asked for, and shares their modules: gradients reach
    the network's parameters, and whether BatchNorm takes its running statistics is decided by `eval()` as ever. A
    discriminator's layers take images of any size. One of classes sees all images as of its `label`.

    Args:
        net: the network.
        layers: names of `net.stages()`, in any order; default: all but the last, which is the logit or the image.
        pool: the side of the grid that each map larger than it is max-pooled to; None leaves all maps as they are.

    Raises ValueError for a network of classes without a `label`, a name that is no layer, none or one twice, and for
    `pool` below 1; from `forward` for input of another number of dimensions or channels.
    """

    def __init__(
        self, net: Discriminator | Generator, layers: Sequence[str] | None = None, pool: int | None = GRID
    ) -> None:
        super().__init__()
        if net.classes and net.label is None:
            raise ValueError(
                f"the {type(net).__name__.lower()} takes a class beside its input, which features have none of: "
                "expected a network that was trained without --conditional"
            )
        names = [name for name, _ in net.stages()]
        layers = names[:-1] if layers is None else list(layers)
        for name in layers:
            if name not in names:
                raise ValueError(f"there is no layer {name!r}: expected some of {', '.join(names)}")
        if not layers or len({*layers}) < len(layers):
            raise ValueError(f"layers is {layers}: expected at least one, and none twice")
        if pool is not None and pool < 1:
            raise ValueError(f"pool is {pool}: expected at least 1")
        ends = [i + 1 for i, name in enumerate(names) if name in layers]
        self.layers, self.pool = [names[end - 1] for end in ends], pool
        self._with_class = net.with_class
        self.takes_z = isinstance(net, Generator)
        self.channels = net.nz if isinstance(net, Generator) else net.channels
        # Between two layers that are asked for, the blocks run as one chain.
        self.parts = nn.ModuleList(net.blocks[start:end] for start, end in pairwise([0, *ends]))

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Each layer's activations [N, C, H, W], in the network's order."""
        if self.takes_z and x.dim() == 2:
            x = x[:, :, None, None]
        if x.dim() != 4 or x.shape[1] != self.channels:
            expected = f"[N, {self.channels}]" if self.takes_z else f"[N, {self.channels}, H, W]"
            raise ValueError(f"the input has shape {list(x.shape)}: expected {expected}")
        x, found = self._with_class(x, None), {}
        for name, part in zip(self.layers, self.parts, strict=True):
            found[name] = x = part(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1], or `z`, -> features [N, F], layer after layer."""
        return torch.cat([self._pooled(values).flatten(1) for values in self.maps(x).values()], 1)

    def _pooled(self, values: Tensor) -> Tensor:
        if self.pool is None:
            return values
        return F.adaptive_max_pool2d(values, [min(self.pool, side) for side in values.shape[2:]])


@torch.inference_mode()
def extract(
    extractor: Callable[[Tensor], Tensor], pixels: np.ndarray, device: torch.device | str = "cpu", batch: int = _BATCH
) -> np.ndarray:
    """Features of uint8 images [N, H, W, C], a batch at a time: float32 [N, F].

    `extractor` takes images [B, C, H, W] in [-1, 1] on `device`; a module has to be in `eval` for features that don't
    depend on the other images of the batch.
    """
    parts = []
    starts = range(0, len(pixels), batch)
    for start in track(starts, "features", len(starts)):
        x = normalize_images(torch.from_numpy(np.array(pixels[start : start + batch])).to(device))
        parts.append(extractor(x).flatten(1).float().cpu().numpy())
    return np.concatenate(parts)


def raw_pixels(x: Tensor) -> Tensor:
    """The images themselves as features: [N, C, H, W] -> [N, C*H*W]."""
    return x.flatten(1)
