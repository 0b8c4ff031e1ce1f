"""What GANStep refuses, before anything is changed."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fastdcgan import GANStep
from fastdcgan.train_step import LEAST_SQUARES
from tests.test_gan_step import adams, assert_equal, batches, networks, state_of


def test_parts_must_divide_the_batch() -> None:
    nets = networks()
    step = GANStep(*nets, *adams(nets), accumulate=3, graph=False)
    before = state_of(nets, [])
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch, got 8 images"):
        step(*batches(1)[0])
    assert_equal(state_of(nets, []), before)


def test_swapped_and_foreign_optimizers_are_refused() -> None:
    nets = networks()
    of_g, of_d = adams(nets)
    with pytest.raises(ValueError, match=r"optimizer_g .* the generator's .*, but of the discriminator's: .* swapped"):
        GANStep(*nets, of_d, of_g, graph=False)
    foreign = torch.optim.Adam(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match=r"optimizer_d updates none of the discriminator's parameters$"):
        GANStep(*nets, of_g, foreign, graph=False)
    with pytest.raises(TypeError, match=r"optimizer_g must be a torch\.optim\.Optimizer, got list"):
        GANStep(*nets, [of_g], of_d, graph=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"loss": "hinge"}, TypeError, "loss must be a GANLoss or None, got 'hinge'"),
        ({"penalty": 3}, TypeError, "penalty must be a GradientPenalty or None, got 3"),
        ({"scaler": 3}, TypeError, "scaler must be a torch.amp.GradScaler or None, got 3"),
        ({"rng": 3}, TypeError, "rng must be a torch.Generator or None, got 3"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a torch.dtype or None, got 'bf16'"),
        ({"real_label": float("nan")}, ValueError, "real_label must be a finite number, got nan"),
    ],
    ids=str,
)
def test_settings_are_checked_where_they_enter(setting: dict[str, Any], error: type[Exception], message: str) -> None:
    nets = networks()
    with pytest.raises(error, match=re.escape(message)):
        GANStep(*nets, *adams(nets), graph=False, **setting)


def test_a_discriminator_that_ends_in_a_sigmoid_gets_a_warning() -> None:
    generator, discriminator = networks()
    nets = generator, nn.Sequential(discriminator, nn.Sigmoid())
    with pytest.warns(UserWarning, match="the discriminator ends in a Sigmoid"):
        GANStep(*nets, *adams(nets), graph=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GANStep(*nets, *adams(nets), graph=False, loss=LEAST_SQUARES)


@pytest.mark.parametrize(("images", "noise"), [(8, 6), (6, 8), (0, 0)])
def test_there_are_as_many_z_as_images(images: int, noise: int) -> None:
    nets = networks()
    step = GANStep(*nets, *adams(nets), graph=False)
    before = state_of(nets, [])
    ((real, z),) = batches(1)
    with pytest.raises(ValueError, match=f"as many z as images, at least one, got {noise} z and {images} images"):
        step(real[:images], z[:noise])
    assert_equal(state_of(nets, []), before)
