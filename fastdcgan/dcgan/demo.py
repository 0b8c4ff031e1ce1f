"""The demo's training: MNIST digits out of noise in a few minutes (`benchmarks/demo.py` times the step beforehand)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fastdcgan.dcgan.checkpoint import folder as checkpoint_folder
from fastdcgan.dcgan.config import TrainConfig
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.data import Images, load_images
from fastdcgan.dcgan.files import locked, own_folder, write
from fastdcgan.dcgan.training import Outcome, Trainer

# Wide enough for digits, narrow enough for many steps in the time that there is.
IMAGE_SIZE, CHANNELS, WIDTH, BATCH = 32, 1, 32, 32
# Higher than a long run would want: there are few steps, and the digits come sooner.
LR_G, LR_D = 5e-4, 1e-3
HOLDOUT = 10  # every tenth digit stays unseen: there to fill in, to classify, to measure distances to
MOST_STEPS = 4000  # beyond these the digits hardly get better
FRAMES = 40
_LEAST_BETWEEN = 25  # steps between frames, however few are likely
_CLOSING_SECONDS = 8.0  # pictures, plots and whatever else comes after the last step
RESULT = "comparison.json"


@dataclass(frozen=True)
class DemoSettings:
    """Where the demo writes, how long it may take in all, and on what. Raises ValueError for what can't be."""

    out: Path
    minutes: float = 3.0
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes >= 0.5:
            raise ValueError(f"minutes is {self.minutes}: expected at least 0.5")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is no folder")
        if self.out.is_dir() and any(self.out.glob("[!.]*")) and not (self.out / RESULT).exists():
            raise ValueError(f"{self.out} has files that are not of a demo: expected a new or empty folder")


def load_digits() -> Images:
    """The demo's images: MNIST at 32x32."""
    return load_images("mnist", IMAGE_SIZE, CHANNELS)


def train(settings: DemoSettings, images: Images, precision: str, step_s: float, left_s: float) -> Outcome:
    """Train on `images` for `left_s` seconds, pictures and plots after the last step included, and leave grid, GIF and
    loss plot in `settings.out`. `step_s` is how long a step is likely to take.

    A slower machine trains fewer steps, and the demo says so.
    """
    left = max(1.0, left_s - _CLOSING_SECONDS)
    likely = max(1, min(MOST_STEPS, int(0.95 * left / step_s)))
    if likely < MOST_STEPS:
        say(f"About {likely} training steps fit into {settings.minutes:g} minutes here, of {MOST_STEPS} at most.")
    outcome = Trainer(_config(settings, precision, likely, left / 60, len(images)), images).run()
    if outcome.reason == "time":
        say(f"The time was over at step {outcome.step} of {MOST_STEPS}.")
    write(settings.out / "samples.png", (settings.out / "samples" / f"step-{outcome.step:08}.png").read_bytes())
    return outcome


def _config(settings: DemoSettings, precision: str, likely: int, minutes: float, images: int) -> TrainConfig:
    """Settings for all the steps that the time allows: `likely` of them, by a short timing, which a busy machine
    misleads."""
    return TrainConfig(
        data="mnist",
        out=str(settings.out),
        image_size=IMAGE_SIZE,
        channels=CHANNELS,
        ngf=WIDTH,
        ndf=WIDTH,
        lr_g=LR_G,
        lr_d=LR_D,
        batch_size=BATCH,
        epochs=-(-MOST_STEPS // ((images - images // HOLDOUT) // BATCH)),
        max_steps=MOST_STEPS,
        max_minutes=minutes,
        precision=precision,
        device=settings.device,
        seed=settings.seed,
        holdout=HOLDOUT,
        sample_every=max(_LEAST_BETWEEN, likely // FRAMES),
        checkpoint_every=MOST_STEPS // 2,
        keep=1,
    )


def clear(out: Path) -> None:
    """Remove what an earlier demo left. Raises BlockingIOError while it runs."""
    with locked(out):
        for name in ("samples.png", "samples.gif", "losses.png", "metrics.csv", "comparison.md", RESULT):
            (out / name).unlink(missing_ok=True)
        for folder in (out / "samples", checkpoint_folder(out)):
            if folder.exists():
                shutil.rmtree(folder)
        own_folder(out, "samples", "samples.png", "samples.gif", "losses.png")
