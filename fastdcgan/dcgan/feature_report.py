"""What the command `features` does: features of a data set to a file, a classifier on them, and a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdcgan.checks import printable
from fastdcgan.dcgan import classify
from fastdcgan.dcgan.config import TrainConfig
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.data import Images, Labelled, held_out, load_images, load_labelled
from fastdcgan.dcgan.features import GRID, FeatureExtractor, extract, raw_pixels
from fastdcgan.dcgan.files import replacing
from fastdcgan.dcgan.models import Discriminator, placed
from fastdcgan.dcgan.patches import PatchKMeans
from fastdcgan.dcgan.projection import InverseProjection
from fastdcgan.dcgan.sources import NoClasses
from fastdcgan.dcgan.trained import Trained, new_discriminator
from fastdcgan.images import normalize_images

_TEST_EVERY = 5  # images, where the run held none out
_CALIBRATION = 500  # images that a random network's BatchNorm sees
_GENERATOR = "generator."
TRAINED, RANDOM, PIXELS, KMEANS = "trained D", "random D", "raw pixels", "k-means of patches"


def extractor_of(
    trained: Trained, layers: Sequence[str] | None = None, pool: int | None = GRID, steps: int = 200
) -> Callable[[Tensor], Tensor]:
    """Images [N, C, H, W] -> features [N, F]: of the discriminator's `layers` (default: all but the logit); or of the
    generator's, named `generator.LAYER`, or `z`, after `steps` steps of search for each image's `z`.

    Raises ValueError for names that are no layers, or of both networks.
    """
    if layers == ["z"]:
        return InverseProjection(trained.generator, steps=steps)
    if layers and all(name.startswith(_GENERATOR) for name in layers):
        names = [name.removeprefix(_GENERATOR) for name in layers]
        return InverseProjection(trained.generator, names, pool=pool, steps=steps)
    if layers and any(name == "z" or name.startswith(_GENERATOR) for name in layers):
        raise ValueError(f"layers is {','.join(layers)}: expected layers of one network, or z alone")
    return FeatureExtractor(trained.discriminator, layers, pool).eval()


@dataclass(frozen=True)
class Split:
    """Labelled images, and which of them are for testing: bool [N]. If the run held images out, those are."""

    data: Labelled
    test: np.ndarray

    @property
    def train_pixels(self) -> np.ndarray:
        return self.data.images.array[~self.test]


def load_split(data: str, trained: Trained) -> Split:
    """A labelled set as the run's networks take it. Raises NoClasses for a set without classes, or with a class of
    less than two images for training, and what `load_images` raises."""
    found = load_labelled(data, trained.config.image_size, trained.config.channels)
    test = test_part(len(found), trained)
    for name, count in zip(found.classes, np.bincount(found.labels[~test], minlength=len(found.classes)), strict=True):
        if count < 2:
            raise NoClasses(f"the class {name} of {data} has {count} images to train on: expected at least 2")
    if not test.any():
        raise ValueError(f"{data} has {len(test)} images: expected at least {trained.config.holdout or _TEST_EVERY}")
    if trained.has_seen(data) and not trained.config.holdout:
        say("The networks have seen the test images too, without their labels: the run held none out (--holdout).")
    return Split(found, test)


def test_part(count: int, trained: Trained) -> np.ndarray:
    """Which of `count` images are for testing: bool [count]. Those that the run held out, or else every fifth."""
    return held_out(count, trained.config.holdout or _TEST_EVERY)


def export(
    extractor: Callable[[Tensor], Tensor], data: str, config: TrainConfig, device: torch.device, path: Path
) -> None:
    """Features of all images as an `.npz`: `features` float32 [N, F], and where there are classes `labels` int64 [N]
    and `classes`, the names."""
    size, channels = config.image_size, config.channels
    images: Images
    more: dict[str, np.ndarray] = {}
    try:
        found = load_labelled(data, size, channels)
        images, more = found.images, {"labels": found.labels, "classes": np.array(found.classes)}
    except NoClasses:
        images = load_images(data, size, channels)
    classify.save_npz(path, features=extract(extractor, images.array, device), **more)


def fit(
    extractor: Callable[[Tensor], Tensor], split: Split, device: torch.device, path: Path, seed: int = 0
) -> tuple[classify.LinearSVM, float]:
    """An SVM on all training images, written to `path` (an `.npz`, with the names of the classes); and its accuracy on
    the test images."""
    features, labels = extract(extractor, split.data.images.array, device), split.data.labels
    svm = classify.LinearSVM.fit(features[~split.test], labels[~split.test], seed)
    svm.save(path, names=np.array(split.data.classes))
    return svm, svm.accuracy(features[split.test], labels[split.test])


def random_discriminator(config: TrainConfig, pixels: np.ndarray, device: torch.device, seed: int = 0) -> Discriminator:
    """A discriminator as a run begins with it, but that its BatchNorm knows the statistics of some of `pixels`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = placed(new_discriminator(config), device)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    some = np.random.RandomState(seed).permutation(len(pixels))[:_CALIBRATION]
    with torch.no_grad():
        net(normalize_images(torch.from_numpy(pixels[some]).to(device)))
    return net.eval()


def compare(
    extractor: Callable[[Tensor], Tensor],
    trained: Trained,
    split: Split,
    device: torch.device,
    *,
    layers: Sequence[str] | None = None,
    pool: int | None = GRID,
    counts: Sequence[int] = (10, 100, 1000),
    draws: int = 5,
    seed: int = 0,
) -> list[classify.Score]:
    """SVMs on the features asked for against those on the same layers of a random discriminator, on raw pixels and on
    k-means features of patches."""
    pixels = split.data.images.array
    theirs = layers if isinstance(extractor, FeatureExtractor) else None
    random = FeatureExtractor(random_discriminator(trained.config, split.train_pixels, device, seed), theirs, pool)
    name = TRAINED if isinstance(extractor, FeatureExtractor) else ", ".join(layers or [])
    patches = PatchKMeans.fit(split.train_pixels, seed=seed)
    features = {}
    extractors: dict[str, Callable[[Tensor], Tensor]]
    extractors = {name: extractor, RANDOM: random, PIXELS: raw_pixels, KMEANS: patches}
    for title, each in extractors.items():
        say(f"{title}:")
        features[title] = extract(each, pixels, device)
    return classify.compare(features, split.data.labels, split.test, counts, draws, seed)


def write_comparison(scores: Sequence[classify.Score], trained: Trained, data: str, split: Split, out: Path) -> str:
    """accuracy.md and accuracy.json in the folder `out`; returns the table."""
    few = max(len(score.accuracies) for score in scores)
    name = printable(Path(data).name)
    table = (
        f"Accuracy in % of a linear SVM on {int(split.test.sum())} test images of {name}, networks of step "
        f"{trained.step}; mean ± standard deviation over {few} draws of the labels.\n\n{classify.to_markdown(scores)}"
    )
    result = {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "data": data,
        "test_images": int(split.test.sum()),
        "held_out_of_training": bool(trained.config.holdout and trained.has_seen(data)),
        "scores": [{**asdict(score), "mean": score.mean, "spread": score.spread} for score in scores],
    }
    for name, text in (("accuracy.json", json.dumps(result, indent=1)), ("accuracy.md", table)):
        with replacing(out / name) as temporary:
            temporary.write_text(text + "\n")
    return table
