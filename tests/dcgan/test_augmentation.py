"""Generators of few images."""

from __future__ import annotations

import numpy as np
import torch

from fastdcgan.dcgan import augmentation


def test_few_shot_generators_learn_their_images() -> None:
    bright, dark = (np.full((6, 28, 28, 1), level, np.uint8) for level in (250, 5))
    settings = augmentation.Settings(generated=8, gan_steps=30)
    labels = np.repeat([3, 5], 6)
    pixels, found = augmentation.per_class_samples(
        np.concatenate([bright, dark]), labels, settings, 0, torch.device("cpu")
    )
    assert found.tolist() == [3] * 4 + [5] * 4
    assert pixels[:4].mean() > pixels[4:].mean() + 8
