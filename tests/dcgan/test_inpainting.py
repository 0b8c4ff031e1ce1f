"""Filling in what is missing: masks, the loss, blending, the search, the command."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan.cli import main
from fastdcgan.dcgan import Discriminator, Trained, blending, inpainting, load_trained, masks
from fastdcgan.dcgan.inpainting import context_weights, inpaint, psnr


@pytest.fixture
def trained(trained_run: Path) -> Trained:
    return load_trained(trained_run)


@pytest.fixture
def targets(trained: Trained) -> torch.Tensor:
    """Images that the generator can make."""
    return trained.generator(F.normalize(torch.randn(3, 8)) * 8**0.5).detach()


# --- masks -----------------------------------------------------------------------------------------------------------


def test_centre() -> None:
    known = masks.make("centre", 32)
    assert known.shape == (1, 1, 32, 32)
    hole = ~known[0, 0]
    assert hole[8:24, 8:24].all()
    assert hole.sum() == 256
    assert (~masks.make("centre", 28, share=0.5)).sum() == 20**2  # the nearest square to half of 784


def test_scattered() -> None:
    known = masks.make("random", 32, 3, seed=1)
    assert known.shape == (3, 1, 32, 32)
    assert (~known).flatten(1).sum(1).tolist() == [round(0.8 * 1024)] * 3
    assert not torch.equal(known[0], known[1])
    assert torch.equal(masks.make("random", 32, 3, seed=1), known)
    assert not torch.equal(masks.make("random", 32, 3, seed=2), known)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("top", slice(0, 7), slice(None)),
        ("bottom", slice(21, 28), slice(None)),
        ("left", slice(None), slice(0, 7)),
        ("right", slice(None), slice(21, 28)),
    ],
)
def test_sides(name: str, rows: slice, columns: slice) -> None:
    hole = ~masks.make(name, 28, share=0.25)[0, 0]
    assert hole[rows, columns].all()
    assert hole.sum() == 7 * 28
    assert (~masks.make(name, 28)).sum() == 14 * 28


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("name", masks.MASKS)
def test_masks_leave_something_to_do_and_to_go_by(name: str, share: float) -> None:
    masks.check(masks.make(name, 28, 2, share=share))


def test_mask_of_a_file(tmp_path: Path) -> None:
    """White is missing."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[3:5, 7] = [127, 128]
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert (~masks.make(str(tmp_path / "mask.png"), 28)).nonzero().tolist() == [[0, 0, 4, 7]]


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


# --- blending --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", masks.MASKS)
def test_blending_keeps_gradients_and_meets_the_border(name: str) -> None:
    """The least squares solution over all pairs of neighbours, found densely."""
    images, source = torch.rand(2, 2, 8, 8).sub(0.5), torch.rand(2, 2, 8, 8).sub(0.5)
    known = masks.make(name, 8, 2)
    result = blending.poisson(images, source, known)
    pixel = torch.arange(64).view(8, 8)
    pairs = torch.cat(
        [torch.stack([a, b], 1) for rows in (pixel, pixel.T) for a, b in pairwise(rows)]  # below, beside
    )
    differences = torch.zeros(len(pairs), 64, dtype=torch.float64)
    differences[torch.arange(len(pairs)), pairs[:, 0]] = 1
    differences[torch.arange(len(pairs)), pairs[:, 1]] = -1
    for n in range(2):
        here = known[n % len(known), 0].flatten()
        for channel in range(2):
            fixed, wanted = images[n, channel].flatten().double(), source[n, channel].flatten().double()
            right = differences @ wanted - differences[:, here] @ fixed[here]
            inside = torch.linalg.lstsq(differences[:, ~here], right[:, None], driver="gelsd").solution[:, 0]
            found = result[n, channel].flatten().double()
            assert torch.equal(found[here], fixed[here])
            torch.testing.assert_close(found[~here], inside.clamp(-1, 1), rtol=0, atol=1e-6)


def test_blending_undoes_a_shift() -> None:
    images = torch.rand(1, 3, 16, 16).sub(0.5)
    found = blending.poisson(images, images + 0.4, masks.make("centre", 16))
    torch.testing.assert_close(found, images)


def test_blending_without_a_border() -> None:
    images, source = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
    nothing = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    torch.testing.assert_close(blending.poisson(images, source, nothing), source)
    torch.testing.assert_close(blending.poisson(images, source, ~nothing), images)


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


@pytest.mark.parametrize("mask", ["centre", "random", "top"])
def test_command(mask: str, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, files = tmp_path / "filled.png", tmp_path / "files"
    options = ["--mask", mask, "--count", "5", "--steps", "3", "--device", "cpu", "--separate", str(files)]
    assert main(["inpaint", str(trained_run), *options, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(out)
    assert f"PSNR over the missing pixels of 5 images of 28x28, mask {mask}:" in said
    figures = [float(line.split()[-2]) for line in said if line.endswith(" dB")]
    assert len(figures) == 3
    assert all(np.isfinite(figures))
    assert "The run was trained on all of digits: these are images that it has seen." in said
    with Image.open(out) as picture:
        assert picture.size == (5 * 30 + 2, 3 * 30 + 2)
    assert sorted(path.name for path in files.iterdir()) == [f"{i}.png" for i in range(5)]


def test_command_on_a_folder_and_a_mask_of_a_file(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (50 * i, 90, 10)).save(folder / f"{i}.png")
    (folder / "broken.png").write_text("no picture")
    mask = np.zeros((28, 28), np.uint8)
    mask[10:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--mask", str(tmp_path / "mask.png"), "--steps", "2", "--device", "cpu"]
    out = tmp_path / "filled.png"
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["inpaint", str(trained_run), str(folder), *options, *cache, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 of 4 files could not be read" in said
    assert "of 3 images of 28x28" in said
    assert "trained on" not in said
