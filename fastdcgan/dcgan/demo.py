"""The demo: MNIST digits out of noise in a few minutes, and the same training steps timed against plain PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastdcgan
from fastdcgan.benchmarks import steps
from fastdcgan.benchmarks.harness import Summary, Timing, interleave, is_noisy, ratio, summarise, timer_for
from fastdcgan.benchmarks.results import environment
from fastdcgan.dcgan import distributed
from fastdcgan.dcgan.checkpoint import folder as checkpoint_folder
from fastdcgan.dcgan.config import TrainConfig
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.data import load_images
from fastdcgan.dcgan.files import replacing
from fastdcgan.dcgan.models import Discriminator, Generator, placed
from fastdcgan.dcgan.training import DTYPES, Outcome, Trainer
from fastdcgan.gan_step import GANStep
from fastdcgan.optim import FusedAdam

# Wide enough for digits, narrow enough for many steps in the time that there is.
IMAGE_SIZE, CHANNELS, WIDTH, BATCH = 32, 1, 32, 32
# Higher than a long run would want: there are few steps, and the digits come sooner.
LR_G, LR_D = 5e-4, 1e-3
HOLDOUT = 10  # every tenth digit stays unseen: there to fill in, to classify, to measure distances to
MOST_STEPS = 4000  # beyond these the digits hardly get better
FRAMES = 40
_LEAST_BETWEEN = 25  # steps between frames, however few are likely
_COMPARE_SHARE = 0.15  # of the time
_CLOSING_SECONDS = 8.0  # pictures, plots and whatever else comes after the last step
_RESULT = "comparison.json"


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
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / _RESULT).exists():
            raise ValueError(f"{self.out} has files that are not of a demo: expected a new or empty folder")


@dataclass(frozen=True)
class Timed:
    """One training step at one precision: seconds, plain PyTorch and fused, and how many times faster fused is."""

    precision: str
    vanilla: Summary
    fused: Summary
    speedup: Summary


def run(settings: DemoSettings) -> Outcome:
    """Compare, train, and write grid, GIF, loss plot and table into `settings.out`, within `settings.minutes`.

    A slower machine trains fewer steps, and the demo says so.
    """
    began = time.monotonic()
    seconds = 60 * settings.minutes
    device = distributed.choose_device(settings.device)
    _clear(settings.out)
    images = load_images("mnist", IMAGE_SIZE, CHANNELS)

    say(f"Timing the training step on {describe(device)}: fused and plain PyTorch in turns ...")
    timed = compare(device, _COMPARE_SHARE * seconds, settings.seed)
    table = to_markdown(timed, device)
    say(table)
    write_results(timed, table, device, settings)

    best = min(timed, key=lambda t: t.fused.median)
    left = max(1.0, seconds - (time.monotonic() - began) - _CLOSING_SECONDS)
    likely = max(1, min(MOST_STEPS, int(0.95 * left / best.fused.median)))
    if likely < MOST_STEPS:
        say(f"About {likely} training steps fit into {settings.minutes:g} minutes here, of {MOST_STEPS} at most.")
    trainer = Trainer(_config(settings, best.precision, likely, left / 60, len(images)), images)
    outcome = trainer.run()
    if outcome.reason == "time":
        say(f"The time was over at step {outcome.step} of {MOST_STEPS}.")
    shutil.copyfile(settings.out / "samples" / f"step-{outcome.step:08}.png", settings.out / "samples.png")
    say(f"{outcome.step} steps, {time.monotonic() - began:.0f} seconds in all")
    return outcome


def _config(settings: DemoSettings, precision: str, likely: int, minutes: float, images: int) -> TrainConfig:
    """For as many steps as the time allows: `likely` is a guess from a short timing, which a busy machine misleads."""
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


def _clear(out: Path) -> None:
    """Remove what an earlier demo left."""
    for name in ("samples.png", "samples.gif", "losses.png", "metrics.csv", "comparison.md", _RESULT):
        (out / name).unlink(missing_ok=True)
    for folder in (out / "samples", checkpoint_folder(out)):
        if folder.exists():
            shutil.rmtree(folder)
    out.mkdir(parents=True, exist_ok=True)


# --- fused against plain PyTorch -------------------------------------------------------------------------------------


def compare(device: torch.device, seconds: float, seed: int = 0) -> list[Timed]:
    """Time a training step of ours and of plain PyTorch with the same weights, in turns, at fp32 and bf16."""
    torch.manual_seed(seed)
    nets = _networks(device)
    real = torch.rand(BATCH, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, device=device).mul_(2).sub_(1)
    real = real.contiguous(memory_format=torch.channels_last)
    z = torch.randn(BATCH, nets[0].nz, device=device)
    candidates = {
        (name, precision): [stepper(copy.deepcopy(nets), real, z, DTYPES[precision])]
        for precision in ("fp32", "bf16")
        for name, stepper in (("vanilla", _vanilla), ("fused", _fused))
    }
    times = interleave(
        {"/".join(key): segments for key, segments in candidates.items()},
        timer_for(device, cold=False),
        Timing(rounds=200, seconds_per_round=0.05, budget_s=seconds),
    )
    result = []
    for precision in ("fp32", "bf16"):
        vanilla, fused = times[f"vanilla/{precision}"][0], times[f"fused/{precision}"][0]
        result.append(Timed(precision, summarise(vanilla), summarise(fused), ratio(vanilla, fused)))
    return result


def _networks(device: torch.device) -> tuple[Generator, Discriminator]:
    generator = Generator(IMAGE_SIZE, CHANNELS, ngf=WIDTH)
    discriminator = Discriminator(IMAGE_SIZE, CHANNELS, ndf=WIDTH)
    return placed(generator, device), placed(discriminator, device)


def _vanilla(
    nets: tuple[Generator, Discriminator], real: torch.Tensor, z: torch.Tensor, dtype: torch.dtype | None
) -> Callable[[], object]:
    """What anyone would write: a plain nn.Sequential of PyTorch's own modules, the textbook loop, PyTorch's Adam."""
    generator, discriminator = fastdcgan.unfuse(nets[0]), fastdcgan.unfuse(nets[1]).blocks
    adam_g, adam_d = (steps.adam(net, real.device) for net in (generator, discriminator))
    return lambda: steps.gan_step(generator, discriminator, adam_g, adam_d, real, z, dtype)


def _fused(
    nets: tuple[Generator, Discriminator], real: torch.Tensor, z: torch.Tensor, dtype: torch.dtype | None
) -> Callable[[], object]:
    """What a training run does."""
    betas, capturable = (TrainConfig.beta1, TrainConfig.beta2), real.device.type == "cuda"
    optimizers = [
        FusedAdam(net.parameters(), rate, betas, capturable=capturable)
        for net, rate in zip(nets, (LR_G, LR_D), strict=True)
    ]
    step = GANStep(*nets, *optimizers, dtype=dtype)
    return lambda: step(real, z)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def to_markdown(timed: list[Timed], device: torch.device) -> str:
    """The comparison as a table."""
    lines = [
        (
            f"One training step (D on real, D on generated, G, both Adams), MNIST 32x32, batch {BATCH}, ngf = ndf = "
            f"{WIDTH}, channels_last, torch {torch.__version__}, {describe(device)}."
        ),
        "Medians of rounds in turns; in brackets the quartiles.",
        "",
        "| precision | plain PyTorch, ms | fused, ms | times faster |",
        "|---|---|---|---|",
    ]
    for t in timed:
        v, f, s = t.vanilla, t.fused, t.speedup
        lines.append(
            f"| {t.precision} | {1e3 * v.median:.1f} ({1e3 * v.q1:.1f} to {1e3 * v.q3:.1f}) "
            f"| {1e3 * f.median:.1f} ({1e3 * f.q1:.1f} to {1e3 * f.q3:.1f}) "
            f"| {s.median:.2f} ({s.q1:.2f} to {s.q3:.2f}){', within noise' if is_noisy(s) else ''} |"
        )
    return "\n".join(lines)


def write_results(timed: list[Timed], table: str, device: torch.device, settings: DemoSettings) -> None:
    """comparison.md and comparison.json."""
    result = {
        "environment": environment(device),
        "unit": "seconds",
        "batch_size": BATCH,
        "image_size": IMAGE_SIZE,
        "channels": CHANNELS,
        "ngf": WIDTH,
        "ndf": WIDTH,
        "steps": [dataclasses.asdict(t) for t in timed],
    }
    for name, text in ((_RESULT, json.dumps(result, indent=1)), ("comparison.md", table)):
        with replacing(settings.out / name) as temporary:
            temporary.write_text(text + "\n")
