"""Features out of networks and patches, and the classifiers on them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastdcgan
from fastdcgan.dcgan import Discriminator, Generator
from fastdcgan.dcgan.classify import LinearSVM, Score, balanced, compare, to_markdown
from fastdcgan.dcgan.features import FeatureExtractor, extract, raw_pixels
from fastdcgan.dcgan.patches import PatchKMeans


@pytest.fixture
def discriminator() -> Discriminator:
    """One whose BatchNorm has seen something."""
    torch.manual_seed(0)
    net = Discriminator(32, 1, ndf=4)
    net(torch.randn(16, 1, 32, 32))
    return net.eval()


def by_hand(net: Discriminator, x: torch.Tensor) -> dict[str, torch.Tensor]:
    plain, found = fastdcgan.unfuse(copy.deepcopy(net)), {}
    for name, block in plain.stages():
        found[name] = x = block(x)
    return found


# --- the extractor ---------------------------------------------------------------------------------------------------


def test_features_are_the_papers(discriminator: Discriminator) -> None:
    """Every layer but the logit, max-pooled to 4x4 by PyTorch's own modules."""
    x = torch.randn(3, 1, 32, 32)
    maps = by_hand(discriminator, x)
    expected = [F.max_pool2d(maps[name], maps[name].shape[2] // 4).flatten(1) for name in ("image", "down1", "down2")]
    found = FeatureExtractor(discriminator)(x)
    assert found.shape == (3, 16 * (4 + 8 + 16))
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_layers_by_name(discriminator: Discriminator, fused: bool) -> None:
    """In the network's order; blocks between them run without being kept."""
    x = torch.randn(2, 1, 32, 32)
    expected = by_hand(discriminator, x)
    net = discriminator if fused else fastdcgan.unfuse(discriminator)
    extractor = FeatureExtractor(net, ["down2", "image"], pool=None)
    maps = extractor.maps(x)
    assert list(maps) == ["image", "down2"]
    for name, values in maps.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5)
    assert extractor(x).shape == (2, 4 * 16**2 + 16 * 4**2)
    assert not any("logit" in key for key in extractor.state_dict())


def test_gradients_reach_images_and_weights(discriminator: Discriminator) -> None:
    extractor = FeatureExtractor(discriminator)
    x = torch.randn(2, 1, 32, 32, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    extractor(x).square().sum().backward()
    weight = discriminator.blocks.image.conv.weight
    assert weight.grad is not None
    maps = by_hand(discriminator, reference)
    sum(
        F.max_pool2d(maps[name], maps[name].shape[2] // 4).square().sum() for name in ("image", "down1", "down2")
    ).backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert not extractor(x).requires_grad


def test_eval_and_train_are_the_networks_own(discriminator: Discriminator) -> None:
    x = torch.randn(4, 1, 32, 32)
    extractor = FeatureExtractor(discriminator).eval()
    torch.testing.assert_close(extractor(x)[:1], extractor(x[:1]))
    extractor.train()
    assert not torch.allclose(extractor(x)[:1], extractor(x[:2])[:1])


def test_images_of_any_size(discriminator: Discriminator) -> None:
    x = torch.randn(1, 1, 50, 70)
    assert FeatureExtractor(discriminator)(x).shape == (1, 16 * (4 + 8 + 16))
    assert FeatureExtractor(discriminator, ["down1"], pool=None).maps(x)["down1"].shape == (1, 8, 12, 17)
    # Maps of the 4x4 grid or smaller are left alone.
    assert FeatureExtractor(discriminator, ["down2"])(torch.randn(1, 1, 16, 24)).shape == (1, 16 * 2 * 3)


def test_layers_of_a_generator() -> None:
    net = Generator(32, 1, nz=6, ngf=4).eval()
    z = torch.randn(3, 6)
    maps = FeatureExtractor(net, ["up1", "image"]).maps(z)
    assert maps["up1"].shape == (3, 8, 8, 8)
    torch.testing.assert_close(maps["image"], net(z))
    assert FeatureExtractor(net).layers == ["project", "up1", "up2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["down9"]}, "there is no layer 'down9': expected some of image, down1, down2, logit"),
        ({"layers": []}, "expected at least one, and none twice"),
        ({"layers": ["image", "image"]}, "expected at least one, and none twice"),
        ({"pool": 0}, "pool is 0: expected at least 1"),
    ],
)
def test_layers_that_are_none(arguments: dict, message: str, discriminator: Discriminator) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(discriminator, **arguments)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 32, 32), (2, 1)])
def test_images_that_do_not_fit(shape: tuple[int, ...], discriminator: Discriminator) -> None:
    with pytest.raises(ValueError, match=r"expected \[N, 1, H, W\]"):
        FeatureExtractor(discriminator)(torch.zeros(shape))


def test_extract(discriminator: Discriminator) -> None:
    """In batches what it is at once; pixels are the images in [-1, 1]."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), dtype=np.uint8)
    extractor = FeatureExtractor(discriminator)
    found = extract(extractor, pixels, batch=2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, extract(extractor, pixels), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(extract(raw_pixels, pixels), pixels.reshape(5, -1) / 127.5 - 1, atol=1e-6)


# --- k-means ---------------------------------------------------------------------------------------------------------


def test_patches() -> None:
    """Whitened patches, triangle activations and quadrants, computed one patch at a time."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    features = PatchKMeans.fit(pixels, centres=7, side=5, seed=0)
    x = torch.from_numpy(pixels[:1]).permute(0, 3, 1, 2).float() / 127.5 - 1
    sums = torch.zeros(2, 2, 7)
    for top in range(8):
        for left in range(8):
            patch = x[0, :, top : top + 5, left : left + 5].flatten()
            patch = (patch - patch.mean()) / (patch.var() + 10 / 127.5**2).sqrt()
            distance = ((patch - features.mean) @ features.whitening - features.centres).norm(dim=1)
            sums[top // 4, left // 4] += (distance.mean() - distance).clamp_min(0) / 16
    expected = (sums.permute(2, 0, 1).flatten() - features.shift) / features.scale
    torch.testing.assert_close(features(x)[0], expected, rtol=1e-3, atol=1e-3)
    again = PatchKMeans.fit(pixels, centres=7, side=5, seed=0)
    assert torch.equal(again(x), features(x))


# --- the SVM ---------------------------------------------------------------------------------------------------------


def clouds(count: int, dimensions: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = 3 * np.random.default_rng(9).normal(size=(classes, dimensions))
    return (centres[labels] + random.normal(size=(count, dimensions))).astype(np.float32) + 5, labels + 4


@pytest.mark.parametrize("classes", [2, 3])
def test_svm(classes: int, tmp_path: Path) -> None:
    svm = LinearSVM.fit(*clouds(60, 5, classes))
    x, labels = clouds(300, 5, classes, seed=1)
    assert svm.accuracy(x, labels) > 0.95
    assert svm.accuracy(x, np.roll(labels, 1)) < 0.1
    svm.save(tmp_path / "svm.npz", note=np.arange(3))
    again = LinearSVM.load(tmp_path / "svm.npz")
    assert np.array_equal(again.predict(x), svm.predict(x))
    with pytest.raises(ValueError, match=r"expected \[N, 5\]"):
        svm.predict(x[:, :4])


def test_svm_of_fewer_points_than_dimensions_is_the_same() -> None:
    """Fitting in the space of the points against fitting with all dimensions."""
    from sklearn.svm import LinearSVC

    x, labels = clouds(12, 40)
    found = LinearSVM.fit(x, labels)
    centred = x - x.mean(0)
    scaled = centred / np.sqrt(np.square(centred).sum(1).mean())
    direct = LinearSVC(C=found.c, tol=1e-7, max_iter=100_000).fit(scaled, labels)
    np.testing.assert_allclose(found.decision(x), direct.decision_function(scaled), atol=2e-3)


def test_svm_chooses_its_regularisation() -> None:
    """Strong where the classes lie along the longest direction and the rest is noise, weak where they lie along a short
    one; with one label of each class there is nothing to choose by."""
    x = np.random.default_rng(0).normal(size=(200, 100))
    x[:, 0] *= 10
    assert LinearSVM.fit(x, x[:, 0] > 0).c == 0.1
    x[:, 0] *= 3
    assert LinearSVM.fit(x[:, :10], x[:, 1] > 0).c == 10.0
    assert LinearSVM.fit(*clouds(3, 5)).c == 1.0


def test_svm_of_one_class() -> None:
    with pytest.raises(ValueError, match="the labels are of 1 class: expected at least 2"):
        LinearSVM.fit(np.zeros((4, 2)), np.zeros(4, int))


def test_file_that_is_no_classifier(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    for name in ("other.npz", "text.npz", "none.npz"):
        with pytest.raises(ValueError, match=f"{name} is no classifier"):
            LinearSVM.load(tmp_path / name)


def test_balanced_draws() -> None:
    labels = np.array([0] * 50 + [1] * 50 + [2] * 3)
    chosen = balanced(labels, 30, np.random.RandomState(0))
    assert len({*chosen.tolist()}) == 30
    counts = np.bincount(labels[chosen])
    assert counts[2] == 3
    assert sorted(counts[:2].tolist()) == [13, 14]
    assert not np.array_equal(chosen, balanced(labels, 30, np.random.RandomState(1)))
    for count in (2, 104):
        with pytest.raises(ValueError, match=f"can't draw {count} labels"):
            balanced(labels, count, np.random.RandomState(0))


def test_comparison() -> None:
    """Features that tell the classes apart beat noise; all get the same draws; impossible counts are left out."""
    x, labels = clouds(200, 4)
    noise = np.random.default_rng(0).normal(size=x.shape)
    test = np.arange(200) % 4 == 3
    scores = compare({"good": x, "noise": noise, "good again": x}, labels, test, counts=(2, 6, 150), draws=3)
    assert [(s.features, s.labels) for s in scores] == [
        (name, count) for name in ("good", "noise", "good again") for count in (6, 150)
    ]
    good, all_good, bad, _, again, _ = scores
    assert good.mean > 0.9 > 0.6 > bad.mean
    assert good.accuracies == again.accuracies
    assert len(good.accuracies) == 3
    assert len(all_good.accuracies) == 1
    table = to_markdown(scores).splitlines()
    assert table[0] == "| features | dimensions | 6 labels | 150 labels |"
    assert table[2].startswith(f"| good | 4 | {100 * good.mean:.1f} ± ")


def test_spread() -> None:
    assert str(Score("x", 3, 10, [0.5, 0.7, 0.9])) == "70.0 ± 20.0"
    assert str(Score("x", 3, 10, [0.5])) == "50.0"
