"""An experiment: does a classifier with few labels get better with what a DCGAN learned without labels?

The classifier is a small convolutional network (`judge.py`), which moves its images at random in all cases. It gets

- the labelled images alone;
- images of DCGANs, one for each class, trained on that class's few images alone;
- images of the run's generator, labelled by a linear SVM on the run's discriminator (which knows the same few labels):
  the half that it is surest of;
- real images of the training part, labelled and chosen the same way: what perfect images would give.

Beside them stands that SVM itself, without any further classifier.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fastdcgan.dcgan import judge
from fastdcgan.dcgan.classify import LinearSVM, balanced
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.feature_report import Split
from fastdcgan.dcgan.features import FeatureExtractor, extract
from fastdcgan.dcgan.files import replacing
from fastdcgan.dcgan.images import to_pixels
from fastdcgan.dcgan.models import Discriminator, Generator, placed
from fastdcgan.dcgan.sampling import sample
from fastdcgan.dcgan.trained import Trained
from fastdcgan.gan_step import GANStep
from fastdcgan.images import normalize_images
from fastdcgan.optim import FusedAdam

ALONE, PER_CLASS, PSEUDO = "labels alone", "with a DCGAN per class", "with images of the run's G, labelled by its D"
REAL, SVM = "with real images, labelled by the run's D", "linear SVM on the run's D"
_WIDTH = 16  # ngf and ndf of the DCGANs that learn few images
_LR = 5e-4


@dataclass(frozen=True)
class Settings:
    """Labelled images per class, draws of them, generated images in all, and steps of the classifiers and of each
    class's DCGAN. Raises ValueError for values below 1, and for less than two labels."""

    per_class: int = 10
    draws: int = 3
    generated: int = 2000
    steps: int = 400
    gan_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("per_class", 2), ("draws", 1), ("generated", 1), ("steps", 1), ("gan_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {least}")


def experiment(trained: Trained, split: Split, settings: Settings, device: torch.device) -> dict[str, list[float]]:
    """What the classifier gets -> its accuracies on the test images, one for each draw of the labels.

    Raises ValueError if some class has less images for training than are to be labelled."""
    pixels, labels, test = split.data.images.array, split.data.labels, split.test
    train = np.flatnonzero(~test)
    classes = len(split.data.classes)
    least = np.bincount(labels[train], minlength=classes).min()
    if least < settings.per_class:
        raise ValueError(f"per_class is {settings.per_class}: the smallest class has {least} images for training")
    extractor = FeatureExtractor(trained.discriminator).eval()
    features = extract(extractor, pixels, device)
    made = to_pixels(sample(trained.generator, settings.generated, settings.seed))
    made_features = extract(extractor, made, device)
    accuracies: dict[str, list[float]] = {}

    for draw in range(settings.draws):
        seed = settings.seed + draw
        rows = train[balanced(labels[train], classes * settings.per_class, np.random.RandomState(seed))]
        svm = LinearSVM.fit(features[rows], labels[rows], seed)
        x, y = pixels[rows], labels[rows]
        rest = np.setdiff1d(train, rows)
        more = {
            ALONE: None,
            PER_CLASS: per_class_samples(x, y, settings, seed, device),
            PSEUDO: _surest(svm, made_features, made),
            REAL: _surest(svm, features[rest], pixels[rest]),
        }
        for name, further in more.items():
            images, targets = (x, y) if further is None else _with_as_many(x, y, *further)
            net = judge.train_classifier(
                images, targets, classes, steps=settings.steps, seed=seed, device=device, title=f"draw {draw}, {name}"
            )
            right = judge.accuracy(net, pixels[test], labels[test], device)
            accuracies.setdefault(name, []).append(right)
            say(f"draw {draw}, {name}: {100 * right:.1f}%")
        accuracies.setdefault(SVM, []).append(svm.accuracy(features[test], labels[test]))
    return accuracies


def per_class_samples(
    pixels: np.ndarray, labels: np.ndarray, settings: Settings, seed: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from small DCGANs, one for each class of the few images."""
    images, targets = [], []
    classes = np.unique(labels)
    for c in classes:
        generator = few_shot_generator(pixels[labels == c], settings.gan_steps, seed, device)
        images.append(to_pixels(sample(generator, -(-settings.generated // len(classes)), seed)))
        targets.append(np.full(len(images[-1]), c))
    return np.concatenate(images), np.concatenate(targets)


def few_shot_generator(pixels: np.ndarray, steps: int, seed: int, device: torch.device) -> Generator:
    """A narrow DCGAN trained on a handful of images, all of them in each step; in `eval`."""
    size, channels = pixels.shape[1], pixels.shape[3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = placed(Generator(size, channels, ngf=_WIDTH), device)
        discriminator = placed(Discriminator(size, channels, ndf=_WIDTH), device)
    adams = [
        FusedAdam(net.parameters(), rate, (0.5, 0.999), capturable=device.type == "cuda")
        for net, rate in ((generator, _LR), (discriminator, 2 * _LR))
    ]
    step = GANStep(generator, discriminator, *adams, real_label=0.9)
    real = normalize_images(torch.from_numpy(np.array(pixels)).to(device))
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        step(real, torch.randn(len(real), generator.nz, generator=random).to(device))
    return generator.eval()


def _surest(svm: LinearSVM, features: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The half of the images whose best class is farthest ahead of the next, and those classes."""
    decision = svm.decision(features)
    best = np.sort(decision, axis=1)
    chosen = np.argsort(best[:, -2] - best[:, -1], kind="stable")[: max(1, len(pixels) // 2)]
    return pixels[chosen], svm.classes[decision[chosen].argmax(1)]


def _with_as_many(
    pixels: np.ndarray, labels: np.ndarray, more: np.ndarray, more_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both together, the first repeated until they are about as many as the second."""
    times = max(1, round(len(more) / len(pixels)))
    return np.concatenate([*[pixels] * times, more]), np.concatenate([*[labels] * times, more_labels])


def to_markdown(accuracies: dict[str, list[float]], split: Split, settings: Settings) -> str:
    tested = int(split.test.sum())
    lines = [
        f"Accuracy in % on {tested} test images with {settings.per_class} labels per class; mean ± standard deviation.",
        "",
        "| classifier | accuracy |",
        "|---|---|",
    ]
    for name, values in accuracies.items():
        spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {100 * np.mean(values):.1f}{spread} |")
    return "\n".join(lines)


def write(accuracies: dict[str, list[float]], split: Split, settings: Settings, trained: Trained, out: Path) -> str:
    """augmentation.md and augmentation.json in the folder `out`; returns the table."""
    table = to_markdown(accuracies, split, settings)
    result = {"checkpoint": str(trained.path), "step": trained.step, **asdict(settings), "accuracies": accuracies}
    for name, text in (("augmentation.json", json.dumps(result, indent=1)), ("augmentation.md", table)):
        with replacing(out / name) as temporary:
            temporary.write_text(text + "\n")
    return table
