"""What GANStep refuses, before anything is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan import GANStep
from fastdcgan.train_step import LEAST_SQUARES
from tests.machine import DEVICE
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
        ({"dtype": "bf16"}, TypeError, "dtype must be a floating-point torch.dtype or None, got 'bf16'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating-point torch.dtype or None, got torch.int8"),
        ({"accumulate": 2.0}, TypeError, "accumulate is 2.0: expected a whole number"),
        ({"accumulate": 0}, ValueError, "accumulate is 0: expected at least 1"),
        ({"ema": "0.9"}, TypeError, "ema is '0.9': expected a number"),
        ({"ema": 1.0}, ValueError, "ema is 1.0: expected at least 0 and below 1"),
        ({"noise": 100}, TypeError, "noise is 100: expected the shape of one z, say (100,)"),
        ({"noise": (100, -1)}, ValueError, "noise, the shape of one z, is -1: expected at least 1"),
        ({"graph": "no"}, TypeError, "graph is 'no': expected True or False"),
        ({"compile": 1}, TypeError, "compile is 1: expected True or False"),
        ({"real_label": float("nan")}, ValueError, "real_label must be a finite number, got nan"),
    ],
    ids=str,
)
def test_settings_are_checked_where_they_enter(setting: dict[str, Any], error: type[Exception], message: str) -> None:
    nets = networks()
    with pytest.raises(error, match=re.escape(message)):
        GANStep(*nets, *adams(nets), **{"graph": False, **setting})


class Ending(nn.Module):
    """A discriminator whose logit goes through something else."""

    def __init__(self, discriminator: nn.Module, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.discriminator, self.end = discriminator, end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.discriminator(x))


ENDS = {
    "module": nn.Sigmoid(),
    "function": lambda x: torch.sigmoid(x.view(-1, 1)).squeeze(1),
    "and more": nn.Sequential(nn.Sigmoid(), nn.Flatten(0)),
    "fused": fastdcgan.fuse(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sigmoid(), nn.Flatten(0))).to(DEVICE),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_discriminator_that_ends_in_a_sigmoid_gets_a_warning(end: Callable[[Tensor], Tensor]) -> None:
    generator, discriminator = networks()
    nets = generator, Ending(discriminator, lambda x: end(x.view(-1, 1, 1, 1)))
    ((real, z),) = batches(1)
    with pytest.warns(UserWarning, match="the discriminator ends in a sigmoid"):
        GANStep(*nets, *adams(nets), graph=False)(real, z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GANStep(*nets, *adams(nets), graph=False, loss=LEAST_SQUARES)(real, z)
        nets = generator, Ending(discriminator, lambda x: torch.sigmoid(x) * 8 - 4)
        GANStep(*nets, *adams(nets), graph=False)(real, z)


def test_a_compiled_discriminator_that_ends_in_a_sigmoid_gets_a_warning() -> None:
    generator, discriminator = networks()
    nets = generator, nn.Sequential(discriminator, nn.Sigmoid())
    with pytest.warns(UserWarning, match="the discriminator ends in a sigmoid"):
        GANStep(*nets, *adams(nets), graph=False, compile=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda real, z: (real.numpy(force=True), z), TypeError, "real images as a floating-point tensor, got float32"),
        (lambda real, z: (real, [z]), TypeError, "expected z as a tensor, got <class 'list'>"),
        (lambda real, z: (real[0, 0, 0, 0], z), ValueError, "at least one, got 8 z and 0 images"),
        (lambda real, z: (real[..., :-4], z), ValueError, "expected real ones of that shape, got [1, 28, 24]"),
    ],
)
def test_batches_are_checked_where_they_enter(call: Any, error: type[Exception], message: str) -> None:
    nets = networks()
    step = GANStep(*nets, *adams(nets), graph=False)
    with pytest.raises(error, match=re.escape(message)):
        step(*call(*batches(1)[0]))


@pytest.mark.parametrize(("images", "noise"), [(8, 6), (6, 8), (0, 0)])
def test_there_are_as_many_z_as_images(images: int, noise: int) -> None:
    nets = networks()
    step = GANStep(*nets, *adams(nets), graph=False)
    before = state_of(nets, [])
    ((real, z),) = batches(1)
    with pytest.raises(ValueError, match=f"as many z as images, at least one, got {noise} z and {images} images"):
        step(real[:images], z[:noise])
    assert_equal(state_of(nets, []), before)
