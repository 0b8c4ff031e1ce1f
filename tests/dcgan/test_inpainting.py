"""Filling in what is missing: the loss, the search, the sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan.dcgan import Discriminator, Trained, inpainting, load_trained, masks
from fastdcgan.dcgan.inpainting import context_weights, inpaint, psnr


@pytest.fixture
def trained(trained_run: Path) -> Trained:
    return load_trained(trained_run)


@pytest.fixture
def targets(trained: Trained) -> torch.Tensor:
    """Images that the generator can make."""
    return trained.generator(F.normalize(torch.randn(3, 8)) * 8**0.5).detach()


# --- the loss, and figures -------------------------------------------------------------------------------------------


def test_context_weights() -> None:
    """The share of missing ones among the pixels of a 7x7 window that are inside the image; 0 for missing ones."""
    known = masks.make("random", 28, 2, share=0.3)
    weights = context_weights(known)
    for n, row, column in ((0, 0, 0), (0, 2, 27), (1, 14, 14), (1, 27, 13), (0, 9, 20)):
        window = ~known[n, 0, max(0, row - 3) : row + 4, max(0, column - 3) : column + 4]
        expected = window.float().mean() if known[n, 0, row, column] else torch.tensor(0.0)
        torch.testing.assert_close(weights[n, 0, row, column], expected)
    assert not weights[~known].any()
    far = context_weights(masks.make("centre", 32))
    assert not far[0, 0, :5].any()  # more than 3 pixels from the hole, which begins in row 8
    assert far[0, 0, 5, 16] > 0


def test_psnr() -> None:
    truth = torch.zeros(2, 3, 4, 4)
    images = truth.clone()
    images[0] = 0.2
    images[1, :, 0] = 2.0
    missing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    missing[..., :2, :] = True
    # The range is 2: 10 log10(2^2 / mean square error).
    torch.testing.assert_close(psnr(images, truth), torch.tensor([20.0, 10 * np.log10(4)]), check_dtype=False)
    torch.testing.assert_close(psnr(images, truth, missing), torch.tensor([20.0, 10 * np.log10(2)]), check_dtype=False)


def test_means() -> None:
    images = torch.rand(2, 3, 8, 8)
    known = masks.make("left", 8)
    mean = inpainting.mean_of_known(images, known)
    torch.testing.assert_close(mean, images[..., 4:].mean((2, 3), keepdim=True))
    filled = inpainting.fill_with(images, known, mean)
    assert torch.equal(filled[..., 4:], images[..., 4:])
    torch.testing.assert_close(filled[..., :4], mean.expand(2, 3, 8, 4))


# --- the search ------------------------------------------------------------------------------------------------------


def search(trained: Trained, images: torch.Tensor, known: torch.Tensor, **options) -> inpainting.Inpainted:
    settings = {"steps": 40, "restarts": 2, **options}
    return inpaint(trained.generator, trained.discriminator, images, known, **settings)


def test_finds_what_the_generator_can_make(trained: Trained, targets: torch.Tensor) -> None:
    known = masks.make("random", 28, 3, share=0.5)
    result = search(trained, targets, known, steps=150, restarts=4, lr=0.1)
    mean = inpainting.fill_with(targets, known, inpainting.mean_of_known(targets, known))
    assert (psnr(result.images, targets, ~known) > psnr(mean, targets, ~known) + 3).all()
    assert (result.loss < 0.5 * search(trained, targets, known, steps=1, restarts=4).loss).all()


def test_the_known_stays_and_the_missing_is_not_looked_at(trained: Trained, targets: torch.Tensor) -> None:
    known = masks.make("centre", 28)
    result = search(trained, targets, known)
    assert torch.equal(torch.where(known, result.images, 0.0), torch.where(known, targets, 0.0))
    assert result.images.abs().max() <= 1
    torch.testing.assert_close(result.z.norm(dim=1), torch.full((3,), 8**0.5))
    torch.testing.assert_close(trained.generator(result.z).detach(), result.generated, rtol=0, atol=1e-5)
    spoilt = torch.where(known, targets, torch.rand_like(targets))
    again = search(trained, spoilt, known)
    for name in ("images", "z", "loss"):
        assert torch.equal(getattr(again, name), getattr(result, name)), name


def test_the_best_restart_is_kept(trained: Trained, targets: torch.Tensor) -> None:
    known = masks.make("centre", 28)
    one, many = (search(trained, targets[:1], known, restarts=n, steps=5) for n in (1, 6))
    # The first search of many begins where the only one did.
    assert many.loss.item() < one.loss.item()
    assert not torch.equal(many.z, one.z)


def test_the_prior_counts(trained: Trained, targets: torch.Tensor) -> None:
    known = masks.make("right", 28)
    weak, strong = (search(trained, targets, known, prior=prior) for prior in (0.0, 100.0))
    logits = [trained.discriminator(result.generated).mean() for result in (weak, strong)]
    assert logits[1] > logits[0]


class Watched(TorchDispatchMode):
    """The names of all operators that run, and whether one computed a weight's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_gradients = 0
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        self.calls += "conv" in name
        if "weight_grad" in name or ("convolution_backward" in name and args[-1][1]):
            self.weight_gradients += 1
        return func(*args, **(kwargs or {}))


def test_no_gradients_but_those_of_z(trained: Trained, targets: torch.Tensor) -> None:
    nets = (trained.generator, trained.discriminator)
    before = [{key: value.clone() for key, value in net.state_dict().items()} for net in nets]
    with Watched() as watched:
        search(trained, targets, masks.make("centre", 28), steps=3)
    assert watched.calls > 0
    assert watched.weight_gradients == 0
    for net, state in zip(nets, before, strict=True):
        assert all(p.requires_grad and p.grad is None for p in net.parameters())
        torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    with Watched() as watched:  # and it would have been seen
        trained.discriminator(targets).sum().backward()
    assert watched.weight_gradients > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 3, 28, 28)}, r"images have shape \[3, 3, 28, 28\]: expected \[N, 1, 28, 28\]"),
        ({"images": torch.zeros(3, 1, 32, 32)}, r"images have shape \[3, 1, 32, 32\]: expected \[N, 1, 28, 28\]"),
        ({"images": torch.zeros(0, 1, 28, 28)}, r"images have shape \[0, 1, 28, 28\]"),
        ({"images": torch.zeros(3, 1, 28, 28, dtype=torch.uint8)}, "images are torch.uint8: expected floating point"),
        ({"known": masks.make("centre", 32)}, r"the mask has shape \[1, 1, 32, 32\]: expected \[1 or 3, 1, 28, 28\]"),
        (
            {"known": masks.make("random", 28, 2)},
            r"the mask has shape \[2, 1, 28, 28\]: expected \[1 or 3, 1, 28, 28\]",
        ),
        ({"known": masks.make("centre", 28).float()}, "the mask is torch.float32: expected torch.bool"),
        ({"known": torch.ones(1, 1, 28, 28, dtype=torch.bool)}, "leaves nothing to fill in"),
        ({"known": torch.zeros(1, 1, 28, 28, dtype=torch.bool)}, "leaves nothing known"),
        ({"steps": 0}, "steps is 0: expected at least 1"),
        ({"restarts": 0}, "restarts is 0: expected at least 1"),
        ({"discriminator": Discriminator(32, 1, 4)}, r"takes images \[1, 32, 32\]: the generator makes \[1, 28, 28\]"),
    ],
)
def test_what_does_not_fit(change: dict, message: str, trained: Trained) -> None:
    given = {
        "generator": trained.generator,
        "discriminator": trained.discriminator,
        "images": torch.zeros(3, 1, 28, 28),
        "known": masks.make("centre", 28),
    }
    with pytest.raises(ValueError, match=message):
        inpaint(**{**given, **change})


# --- pictures and the command ----------------------------------------------------------------------------------------


def test_sheet() -> None:
    images, filled = torch.full((5, 1, 8, 8), -0.5), torch.full((5, 1, 8, 8), 0.5)
    known = masks.make("left", 8)
    pixels = np.asarray(inpainting.sheet(images, known, filled, columns=3))
    assert pixels.shape == (6 * 10 + 2, 3 * 10 + 2)
    at = [
        [pixels[2 + 10 * row, [2 + 10 * column, 9 + 10 * column]].tolist() for column in range(3)] for row in range(6)
    ]
    rows = [[64, 64], [128, 64], [191, 191]]
    assert at[:3] == [[row] * 3 for row in rows]
    assert at[3:] == [[row, row, [0, 0]] for row in rows]
