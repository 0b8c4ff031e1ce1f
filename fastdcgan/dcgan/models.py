"""The two networks of DCGAN for images of 28 to 256 pixels.

Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks" (2015), figure 1 and section 3: no pooling, BatchNorm everywhere but in the generator's output and the
discriminator's input, ReLU and Tanh in the generator, LeakyReLU(0.2) in the discriminator, weights from N(0, 0.02).

Both networks are a ladder of feature maps. Its smallest map is 4x4 (7x7 for 28 pixels: 7, 14, 28), every step doubles
the side, and the map before the image has `ngf` or `ndf` channels; towards the small end channels double each time, up
to 16 times `ngf`:

    image size   small end          channels, in multiples of ngf or ndf
    28           7x7                2  1
    32           4x4                4  2  1
    64           4x4                8  4  2  1           (the 64-pixel networks of PyTorch's DCGAN example)
    128          4x4                16 8  4  2  1
    256          4x4                16 16 8  4  2  1

The kernels of the steps are 4x4, as in PyTorch's example, or 5x5, as in the paper's own code. With `ngf` 128 and 64
pixels the maps are those of the paper's figure 1: 4x4x1024, 8x8x512, 16x16x256, 32x32x128, 64x64x3.

Networks of classes (Mirza and Osindero, "Conditional Generative Adversarial Nets", 2014) have an embedding of them:
`nz` more numbers beside the generator's `z`, one more plane beside the discriminator's image. All after that is the
same.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdcgan.layers import (
    ConvAct2d,
    ConvBNLeakyReLU2d,
    ConvLeakyReLU2d,
    ConvTransposeBNReLU2d,
    ConvTransposeTanh2d,
    FusedSequential,
)

IMAGE_SIZES = (28, 32, 64, 128, 256)
PROJECTIONS = ("conv", "linear")
KERNELS = (4, 5)
_MAX_WIDTH = 16

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def ladder(image_size: int) -> tuple[int, tuple[int, ...]]:
    """Side of the smallest feature map, and the channel multiples of all maps from that one up to the last before the
    image. Raises ValueError for a size that is not in `IMAGE_SIZES`."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size is {image_size!r}: expected one of {', '.join(map(str, IMAGE_SIZES))}")
    base = 7 if image_size == 28 else 4
    doublings = (image_size // base).bit_length() - 1
    return base, tuple(min(2**i, _MAX_WIDTH) for i in reversed(range(doublings)))


def _halving(kernel: int) -> dict[str, Any]:
    """What makes a convolution halve the side of a map. Raises ValueError for an unknown kernel."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}: expected one of {', '.join(map(str, KERNELS))}")
    return {"kernel_size": kernel, "stride": 2, "padding": (kernel - 1) // 2, "bias": False}


def _doubling(kernel: int) -> dict[str, Any]:
    """What makes a transposed convolution double it: an odd kernel has to be asked for the last row and column."""
    return {**_halving(kernel), "output_padding": kernel % 2}


class LinearConvTranspose2d(nn.ConvTranspose2d):
    """A linear layer whose output is read as a feature map: `z` [N, nz, 1, 1] -> [N, channels, size, size].

    That is a transposed convolution of a 1x1 input, and it is one here, of a weight that is a view of `linear.weight`
    [channels*size*size, nz]. So it runs, and fuses, as any other.
    """

    def __init__(self, nz: int, channels: int, size: int) -> None:
        super().__init__(nz, channels, size, bias=False)
        del self._parameters["weight"]
        self.linear = nn.Linear(nz, channels * size * size, bias=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[nz, channels, size, size]."""
        return self.linear.weight.view(self.out_channels, *self.kernel_size, self.in_channels).permute(3, 0, 1, 2)


class _OfClasses(nn.Module):
    """A network that takes a class for each of its inputs, if it was made for some.

    Args:
        classes: how many; 0 for a network that takes none.
        width: the length of a class's row in `embed`, which begins as N(0, 1), the scale of the input it goes with.

    `label` is the class that stands for all inputs where `forward` is given no labels: then the network can be used as
    one of no classes.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.label: int | None = None
        if classes:
            self.embed = nn.Embedding(classes, width)

    def with_class(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """`x` [N, C, H, W], and as more of its channels the rows of `labels`, int64 [N], or of `label`.

        Raises ValueError for no labels where some are needed, for some where none are, and for another number of them.
        """
        if not self.classes:
            if labels is not None:
                raise ValueError("labels are given to a network that takes none: expected one made for classes")
            return x
        if labels is None:
            if self.label is None:
                raise ValueError(
                    f"the {type(self).__name__.lower()} is of {self.classes} classes: expected one to be chosen "
                    "(labels, or its attribute label; --class on the command line)"
                )
            labels = torch.full((len(x),), self.label, device=x.device)
        if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: expected torch.int64 [{len(x)}]")
        pixels = x.permute(0, 2, 3, 1)
        rows = self.embed(labels).view(*pixels.shape[:3], -1)
        # Pixel by pixel, so that the result is in channels_last: of a plane by itself no format can be told.
        return torch.cat([pixels, rows.to(x.dtype)], 3).permute(0, 3, 1, 2)


class Generator(_OfClasses):
    """`z` [N, nz] or [N, nz, 1, 1] -> images [N, channels, image_size, image_size] in [-1, 1]; with `classes` of those
    that int64 labels [N] name.

    `projection` is the first block: "conv", a transposed convolution of the 1x1 input as in PyTorch's example, or
    "linear", a linear layer as in the paper. They are the same function; `convert.convert_projection` turns the
    state_dict of one into the other's. `kernel` is the side of the other blocks' kernels, 4 or 5.

    Raises ValueError for an unknown `image_size`, `projection` or `kernel`, and from `forward` for a `z` of another
    size.
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        nz: int = 100,
        ngf: int = 64,
        projection: str = "conv",
        kernel: int = 4,
        classes: int = 0,
    ) -> None:
        super().__init__(classes, nz)
        if projection not in PROJECTIONS:
            raise ValueError(f"projection is {projection!r}: expected one of {', '.join(PROJECTIONS)}")
        base, multiples = ladder(image_size)
        self.image_size, self.channels, self.nz, self.ngf, self.projection = image_size, channels, nz, ngf, projection
        doubling = _doubling(kernel)
        widths = [ngf * m for m in multiples]
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = 2 * nz if classes else nz
        blocks["project"] = ConvTransposeBNReLU2d(inputs, widths[0], base, 1, 0, bias=False)
        if projection == "linear":
            blocks["project"].conv = LinearConvTranspose2d(inputs, widths[0], base)
        for i, (wide, narrow) in enumerate(pairwise(widths), start=1):
            blocks[f"up{i}"] = ConvTransposeBNReLU2d(wide, narrow, **doubling)
        blocks["image"] = ConvTransposeTanh2d(widths[-1], channels, **doubling)
        self.blocks: nn.Sequential = FusedSequential(blocks)
        init_weights(self)

    def stages(self) -> list[tuple[str, nn.Module]]:
        """All blocks with their names, from `z` to the image."""
        return list(self.blocks.named_children())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """`z` [N, nz] or [N, nz, 1, 1] -> images [N, channels, image_size, image_size] in [-1, 1]."""
        if z.dim() not in (2, 4) or z.shape[1] != self.nz or z.shape[2:].numel() != 1:
            raise ValueError(f"z has shape {list(z.shape)}: expected [N, {self.nz}] or [N, {self.nz}, 1, 1]")
        return self.blocks(self.with_class(z.view(z.shape[0], self.nz, 1, 1), labels))


class Discriminator(_OfClasses):
    """Images [N, channels, image_size, image_size] -> logits [N] (the probability of "real" before the sigmoid); with
    `classes` of "real, and of the class that it is said to be of", by int64 labels [N].

    `kernel` is the side of all kernels but the logit's, 4 or 5.
    Raises ValueError for an unknown `image_size` or `kernel`, and from `forward` for images of another shape.
    """

    def __init__(
        self, image_size: int = 64, channels: int = 3, ndf: int = 64, kernel: int = 4, classes: int = 0
    ) -> None:
        super().__init__(classes, image_size**2)
        base, multiples = ladder(image_size)
        self.image_size, self.channels, self.ndf = image_size, channels, ndf
        halving = _halving(kernel)
        widths = [ndf * m for m in reversed(multiples)]
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        blocks["image"] = ConvLeakyReLU2d(channels + bool(classes), widths[0], **halving)
        for i, (narrow, wide) in enumerate(pairwise(widths), start=1):
            blocks[f"down{i}"] = ConvBNLeakyReLU2d(narrow, wide, **halving)
        blocks["logit"] = ConvAct2d(widths[-1], 1, base, 1, 0, bias=False, activation="identity")
        self.blocks: nn.Sequential = FusedSequential(blocks)
        init_weights(self)

    def stages(self) -> list[tuple[str, nn.Module]]:
        """All blocks with their names, from the image to the logit."""
        return list(self.blocks.named_children())

    def forward(self, x: Tensor, labels: Tensor | None = None, stat_groups: int = 1) -> Tensor:
        """With `stat_groups=g`, each of the `g` equal parts of the batch has BatchNorm statistics of its own, as if the
        parts were passed one after the other: the same logits, gradients and running statistics."""
        size = (self.channels, self.image_size, self.image_size)
        if x.dim() != 4 or x.shape[1:] != size:
            raise ValueError(f"x has shape {list(x.shape)}: expected [N, {', '.join(map(str, size))}]")
        x = self.with_class(x, labels)
        if stat_groups == 1:
            return self.blocks(x).flatten()
        if isinstance(self.blocks, FusedSequential):
            return self.blocks(x, stat_groups=stat_groups).flatten()
        if x.shape[0] % stat_groups:
            raise ValueError(f"a batch of {x.shape[0]} can't be split into stat_groups={stat_groups} equal parts")
        return torch.cat([self.blocks(part).flatten() for part in x.chunk(stat_groups)])


def init_weights(net: nn.Module) -> None:
    """The paper's initialisation (section 4): convolutions and linear layers from N(0, 0.02), BatchNorm's weight from
    N(1, 0.02) and its bias 0. Draws from torch's global generator."""
    for module in net.modules():
        if isinstance(module, LinearConvTranspose2d):
            continue  # its linear layer is a module of its own
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


def placed(net: ModuleT, device: torch.device | str) -> ModuleT:
    """`net`, moved to `device`, its convolutions' weights in channels_last."""
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
