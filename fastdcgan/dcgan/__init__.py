"""DCGAN: the networks, training on real images, checkpoints and samples, on top of the fused layers.

A name is imported when it is first used: the networks need torch alone, the rest the packages of `fastdcgan[dcgan]`.
"""

import importlib
import itertools
from typing import Any

# Module -> the names that it has
_HOMES = {
    "fastdcgan.dcgan.checkpoint": ("CheckpointError",),
    "fastdcgan.dcgan.classify": ("LinearSVM",),
    "fastdcgan.dcgan.config": ("TrainConfig",),
    "fastdcgan.dcgan.convert": ("convert_projection", "example_state_dict", "load_example_state_dict"),
    "fastdcgan.dcgan.data": ("Batches", "Images", "Labelled", "load_images", "load_labelled"),
    "fastdcgan.dcgan.features": ("FeatureExtractor",),
    "fastdcgan.dcgan.metrics": ("Diverged",),
    "fastdcgan.dcgan.models": ("Discriminator", "Generator", "IMAGE_SIZES"),
    "fastdcgan.dcgan.projection": ("encode",),
    "fastdcgan.dcgan.sampling": ("sample",),
    "fastdcgan.dcgan.trained": ("Trained", "load_generator", "load_trained"),
    "fastdcgan.dcgan.training": ("Outcome", "Trainer"),
    "fastdcgan.train_step": ("GradientPenalty", "StepMetrics", "train_step"),
}
__all__ = sorted(itertools.chain.from_iterable(_HOMES.values()))


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
