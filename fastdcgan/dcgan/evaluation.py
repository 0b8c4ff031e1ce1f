"""How good a generator is, over the checkpoints of a run: Fréchet distance, precision and recall.

Both are measured among the features of a small classifier that learns the labelled training images (`judge.py`), so
that nothing has to be downloaded; the values compare runs on the same data, not with published ones. Inception's FID
comes from torch-fidelity, where that and its weights are installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastdcgan.dcgan import checkpoint, images, judge, plots
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.distances import Moments, frechet_distance, moments, precision_recall
from fastdcgan.dcgan.feature_report import Split
from fastdcgan.dcgan.features import extract
from fastdcgan.dcgan.files import replacing
from fastdcgan.dcgan.sampling import sample
from fastdcgan.dcgan.trained import load_generator

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # the file that torch-fidelity puts into torch's hub folder


@dataclass(frozen=True)
class Evaluation:
    """Generated images of one checkpoint, or real ones (`step` None), against the images that were held out."""

    step: int | None
    frechet: float
    precision: float
    recall: float
    fid: float | None = None


@dataclass(frozen=True)
class Yardstick:
    """What a generator is measured with: a classifier, and the held-out images and their features."""

    classifier: judge.Classifier
    accuracy: float  # the classifier's, on the held-out images
    pixels: np.ndarray
    features: np.ndarray
    moments: Moments
    device: torch.device

    @classmethod
    def make(cls, split: Split, cache: Path, device: torch.device) -> Yardstick:
        """Measure with a classifier of the training images, taken from the folder `cache` or put there."""
        labels, test = split.data.labels, split.test
        net = judge.cached_classifier(
            cache / "classifier.safetensors", split.train_pixels, labels[~test], len(split.data.classes), device=device
        )
        pixels = split.data.images.array[test]
        features = extract(net.features, pixels, device)
        return cls(net, judge.accuracy(net, pixels, labels[test], device), pixels, features, moments(features), device)

    def measure(self, pixels: np.ndarray, step: int | None = None, *, fid: bool = False) -> Evaluation:
        """uint8 images [N, H, W, C] against the held-out ones."""
        features = extract(self.classifier.features, pixels, self.device)
        distance = frechet_distance(self.moments, moments(features))
        shares = precision_recall(self.features, features)
        score = inception_fid(self.pixels, pixels, self.device) if fid else None
        return Evaluation(step, distance, *shares, score)


def evaluate(
    paths: Iterable[Path],
    yardstick: Yardstick,
    *,
    count: int = 1000,
    seed: int = 0,
    ema: bool = False,
    fid: bool = False,
) -> list[Evaluation]:
    """`count` images of each checkpoint's generator (with `ema` of its moving average), from the same `z`s."""
    result = []
    for path in paths:
        generator = load_generator(path, yardstick.device, ema)
        step = checkpoint.load(path, "generator").state["step"]
        found = yardstick.measure(images.to_pixels(sample(generator, count, seed)), step, fid=fid)
        say(
            f"step {step}: Fréchet distance {found.frechet:.3f}, precision {found.precision:.3f}, "
            f"recall {found.recall:.3f}"
        )
        result.append(found)
    return result


def real_images(split: Split, yardstick: Yardstick, count: int, seed: int = 0, *, fid: bool = False) -> Evaluation:
    """What `count` real training images get: as good as it can be."""
    pixels = split.train_pixels
    chosen = np.random.RandomState(seed).permutation(len(pixels))[:count]
    return yardstick.measure(pixels[chosen], fid=fid)


class _Rgb(Dataset):
    """uint8 images [N, H, W, C] one by one as torch-fidelity takes them: uint8 [3, H, W]."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.pixels[index])).permute(2, 0, 1).expand(3, -1, -1).contiguous()


def check_fid() -> Path:
    """The file of Inception's weights. Raises ModuleNotFoundError without torch-fidelity, FileNotFoundError without
    that file."""
    import torch_fidelity  # noqa: F401

    weights = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION
    if not weights.is_file():
        raise FileNotFoundError(f"Inception's FIDs need torch-fidelity's weights, {weights}")
    return weights


def inception_fid(real: np.ndarray, generated: np.ndarray, device: torch.device | str = "cpu") -> float:
    """FID of uint8 images [N, H, W, C] as torch-fidelity computes it. Raises as `check_fid` does."""
    weights = check_fid()
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=_Rgb(generated),
        input2=_Rgb(real),
        fid=True,
        cuda=torch.device(device).type == "cuda",
        feature_extractor_weights_path=str(weights),
        verbose=False,
    )
    return float(found["frechet_inception_distance"])


def to_markdown(evaluations: Sequence[Evaluation], real: Evaluation) -> str:
    """A row for each checkpoint, and one for the training images."""
    fid = any(e.fid is not None for e in evaluations)
    lines = [
        "| step | Fréchet distance | precision | recall |" + (" Inception's FID |" if fid else ""),
        "|---|---|---|---|" + ("---|" if fid else ""),
    ]
    for e in (*evaluations, real):
        name = "training images" if e.step is None else e.step
        row = f"| {name} | {e.frechet:.3f} | {e.precision:.3f} | {e.recall:.3f} |"
        lines.append(row + (f" {e.fid:.2f} |" if e.fid is not None else ""))
    return "\n".join(lines)


def write(evaluations: Sequence[Evaluation], real: Evaluation, yardstick: Yardstick, out: Path, **about: Any) -> None:
    """evaluation.json and evaluation.png in the folder `out`; `about` goes into the first."""
    result = {
        **about,
        "held_out_images": len(yardstick.pixels),
        "classifier_accuracy": yardstick.accuracy,
        "training_images": asdict(real),
        "checkpoints": [asdict(e) for e in evaluations],
    }
    with replacing(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    plot(evaluations, real, out / "evaluation.png")


def plot(evaluations: Sequence[Evaluation], real: Evaluation, path: Path) -> None:
    """Fréchet distance, precision and recall over the steps, and of real images as lines across -> PNG."""
    steps = [e.step for e in evaluations]
    figure, (distances, shares) = plots.two_rows()
    distances.plot(steps, [e.frechet for e in evaluations], marker="o", markersize=3, label="generated")
    distances.axhline(real.frechet, color="gray", linestyle="--", label="training images")
    distances.set_yscale("log")
    distances.set_ylabel("Fréchet distance")
    for key, color in (("precision", "C0"), ("recall", "C1")):
        shares.plot(steps, [getattr(e, key) for e in evaluations], marker="o", markersize=3, color=color, label=key)
        shares.axhline(getattr(real, key), color=color, linestyle="--", linewidth=1)
    shares.set_ylabel("share (dashed: training images)")
    shares.set_ylim(0, 1)
    shares.set_xlabel("step")
    plots.save(figure, path)
