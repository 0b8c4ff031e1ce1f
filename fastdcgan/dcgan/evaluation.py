"""How good a generator is, over the checkpoints of a run: Fréchet distance, precision and recall.

Both are measured among features, of which none have to be downloaded. Where the images have labels they are those of a
small classifier that learns them (`judge.py`), and the values compare runs on the same data; else those of the run's
own discriminator, and the values compare checkpoints of that run. Neither compares with published ones: Inception's FID
comes from torch-fidelity, where that and its weights are installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdcgan.dcgan import images, judge, plots
from fastdcgan.dcgan.checkpoint import DamagedCheckpoint
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.data import load_images
from fastdcgan.dcgan.distances import NEIGHBOUR, Moments, frechet_distance, moments, precision_recall
from fastdcgan.dcgan.feature_report import Split, load_split, test_part
from fastdcgan.dcgan.features import FeatureExtractor, extract
from fastdcgan.dcgan.files import replacing
from fastdcgan.dcgan.sampling import sample
from fastdcgan.dcgan.sources import NoClasses
from fastdcgan.dcgan.trained import Trained, load_trained

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
    """What a generator is measured with: a space of features, the held-out images and theirs, and the training images,
    to show how good it can get."""

    space: str  # in words
    extractor: Callable[[Tensor], Tensor]
    accuracy: float | None  # of the classifier whose features they are, on the held-out images
    train_pixels: np.ndarray
    pixels: np.ndarray
    features: np.ndarray
    moments: Moments
    device: torch.device

    @classmethod
    def make(cls, split: Split, cache: Path, device: torch.device) -> Yardstick:
        """Measure with a classifier of the training images, taken from the folder `cache` or put there."""
        labels, test, pixels = split.data.labels, split.test, split.data.images.array
        _check_count(test)
        net = judge.cached_classifier(
            cache / "classifier.safetensors", pixels[~test], labels[~test], len(split.data.classes), device=device
        )
        accuracy = judge.accuracy(net, pixels[test], labels[test], device)
        space = f"a classifier that gets {100 * accuracy:.1f}% of these right"
        return cls._measured(space, net.features, accuracy, pixels, test, device)

    @classmethod
    def without_labels(cls, pixels: np.ndarray, test: np.ndarray, trained: Trained, device: torch.device) -> Yardstick:
        """Measure with a discriminator, by the means over its last map, among uint8 images [N, H, W, C] of which `test`
        [N] are held out. It was trained against the generator: so this compares the checkpoints of one run."""
        _check_count(test)
        last = trained.discriminator.stages()[-2][0]
        maps = FeatureExtractor(trained.discriminator, [last]).maps
        space = f"the discriminator of step {trained.step}, by the means over its last map"
        return cls._measured(space, lambda x: maps(x)[last].mean((2, 3)), None, pixels, test, device)

    @classmethod
    def _measured(
        cls,
        space: str,
        extractor: Callable[[Tensor], Tensor],
        accuracy: float | None,
        pixels: np.ndarray,
        test: np.ndarray,
        device: torch.device,
    ) -> Yardstick:
        features = extract(extractor, pixels[test], device)
        return cls(space, extractor, accuracy, pixels[~test], pixels[test], features, moments(features), device)

    def measure(self, pixels: np.ndarray, step: int | None = None, *, fid: bool = False) -> Evaluation:
        """uint8 images [N, H, W, C] against the held-out ones."""
        features = extract(self.extractor, pixels, self.device)
        distance = frechet_distance(self.moments, moments(features))
        shares = precision_recall(self.features, features)
        score = inception_fid(self.pixels, pixels, self.device) if fid else None
        return Evaluation(step, distance, *shares, score)


def _check_count(test: np.ndarray) -> None:
    if test.sum() <= NEIGHBOUR:
        raise ValueError(f"{test.sum()} of {len(test)} images are held out: expected at least {NEIGHBOUR + 1}")


def load_yardstick(data: str, trained: Trained, cache: Path, device: torch.device) -> Yardstick:
    """With a classifier where the images have labels, else with the run's discriminator. Raises as `load_images` does,
    and ValueError for too few images."""
    try:
        return Yardstick.make(load_split(data, trained), cache, device)
    except NoClasses as error:
        say(f"{error}. So this measures with the run's discriminator, which needs no labels.")
    pixels = load_images(data, trained.config.image_size, trained.config.channels).array
    return Yardstick.without_labels(pixels, test_part(len(pixels), trained), trained, device)


def evaluate(
    paths: Sequence[Path],
    yardstick: Yardstick,
    *,
    count: int = 1000,
    seed: int = 0,
    ema: bool = False,
    fid: bool = False,
) -> list[Evaluation]:
    """`count` images of each checkpoint's generator (with `ema` of its moving average), from the same `z`s. Of several
    checkpoints a damaged one is passed over. Raises CheckpointError as `load_trained` does."""
    result = []
    for path in paths:
        try:
            trained = load_trained(path, yardstick.device, ema)
        except DamagedCheckpoint as error:
            if len(paths) == 1:
                raise
            say(f"Passed over: {error}")
            continue
        pixels = images.to_pixels(sample(trained.generator, count, seed))
        found = yardstick.measure(pixels, trained.step, fid=fid)
        say(
            f"step {trained.step}: Fréchet distance {found.frechet:.3f}, precision {found.precision:.3f}, "
            f"recall {found.recall:.3f}"
        )
        result.append(found)
    return result


def real_images(yardstick: Yardstick, count: int, seed: int = 0, *, fid: bool = False) -> Evaluation:
    """What `count` real training images get: as good as it can be."""
    pixels = yardstick.train_pixels
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
        "features": yardstick.space,
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
