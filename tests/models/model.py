"""What is known of a kind of network: how to build it, and at which sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A kind of network at its usual size and at a small one.

    Args:
        make: builds it in training mode, given its width: the channels of its narrowest layers.
        width, shape: the usual ones. `shape`, [C, H, W], is that of an input, without the batch.
        small: a width and a shape for tests, in which a pass takes milliseconds.
        input_grad: whether training asks for the input's gradient, as a GAN does of its discriminator.
    """

    make: Callable[[int], nn.Module]
    width: int
    shape: Shape
    small: tuple[int, Shape]
    input_grad: bool = False
