"""Whole networks as people write them in plain PyTorch.

`MODELS` maps a name to its `Model`; `SMALL` maps it to (a function that builds a small one, the shape of its input).
Most call `nn.Sequential`s; others keep each module as an attribute and call it in their forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from tests.models import (
    autoencoders,
    classifiers,
    conditional,
    dcgan,
    discriminators,
    image_to_image,
    progressive,
    super_resolution,
    unets,
    upsampling,
)
from tests.models.model import Model, Shape

BATCH = 3  # of the small ones: with 2, BatchNorm makes +1 and -1 of any two numbers

MODELS: dict[str, Model] = {
    **dcgan.MODELS,
    **discriminators.MODELS,
    **upsampling.MODELS,
    **conditional.MODELS,
    **progressive.MODELS,
    **image_to_image.MODELS,
    **super_resolution.MODELS,
    **autoencoders.MODELS,
    **unets.MODELS,
    **classifiers.MODELS,
}
SMALL: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    name: (partial(model.make, model.small[0]), (BATCH, *model.small[1])) for name, model in MODELS.items()
}
