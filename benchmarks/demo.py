"""The demo: the training step on MNIST timed against plain PyTorch, then digits out of noise (`dcgan/demo.py`)."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdcgan.benchmarks import steps
from fastdcgan.benchmarks.harness import Summary, Timing, interleave, is_noisy, ratio, summarise, timer_for
from fastdcgan.benchmarks.results import environment
from fastdcgan.dcgan import demo, distributed
from fastdcgan.dcgan.config import TrainConfig
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.files import replacing
from fastdcgan.dcgan.models import Discriminator, Generator, placed
from fastdcgan.dcgan.trained import new_discriminator, new_generator
from fastdcgan.dcgan.training import DTYPES, Outcome
from fastdcgan.dispatch import autotune
from fastdcgan.fuse import unfuse
from fastdcgan.gan_step import GANStep
from fastdcgan.optim import FusedAdam

_COMPARE_SHARE = 0.15  # part of the time that the comparison gets


@dataclass(frozen=True)
class Timed:
    """One training step at one precision: seconds, plain PyTorch and fused, and how many times faster fused is."""

    precision: str
    vanilla: Summary
    fused: Summary
    speedup: Summary


def run(settings: demo.DemoSettings) -> Outcome:
    """Compare, train, and write table, grid, GIF and loss plot into `settings.out`, within `settings.minutes`."""
    began = time.monotonic()
    seconds = 60 * settings.minutes
    device = distributed.choose_device(settings.device)
    demo.clear(settings.out)
    images = demo.load_digits()

    say(f"Timing the training step on {describe(device)}: fused and plain PyTorch in turn ...")
    config = TrainConfig(
        image_size=demo.IMAGE_SIZE, channels=demo.CHANNELS, ngf=demo.WIDTH, ndf=demo.WIDTH, batch_size=demo.BATCH,
        lr_g=demo.LR_G, lr_d=demo.LR_D, seed=settings.seed,
    )  # fmt: skip
    timed = compare(config, ("fp32", "bf16"), device, _COMPARE_SHARE * seconds)
    table = to_markdown(timed, device)
    for line in table.splitlines():
        say(line)
    write_results(timed, table, device, settings)

    best = min(timed, key=lambda t: t.fused.median)
    left = seconds - (time.monotonic() - began)
    outcome = demo.train(settings, images, best.precision, best.fused.median, left)
    say(f"{outcome.step} steps, {time.monotonic() - began:.0f} seconds in all")
    return outcome


def compare(
    config: TrainConfig, precisions: Sequence[str], device: torch.device, seconds: float, classes: int = 0
) -> list[Timed]:
    """Time a training step of ours and of plain PyTorch with the same weights, in the same rounds, at each of the
    precisions. `config` says their shapes, the batch and the rates; they are of so many `classes`, all in turn."""
    c = config
    torch.manual_seed(c.seed)
    nets = placed(new_generator(c, classes), device), placed(new_discriminator(c, classes), device)
    real = torch.rand(c.batch_size, c.channels, c.image_size, c.image_size, device=device).mul_(2).sub_(1)
    real = real.contiguous(memory_format=torch.channels_last)
    z = torch.randn(c.batch_size, c.nz, device=device)
    labels = torch.arange(c.batch_size, device=device) % classes if classes else None
    candidates = {
        (name, precision): [stepper(copy.deepcopy(nets), c, real, z, labels, DTYPES[precision])]
        for precision in precisions
        for name, stepper in (("vanilla", _vanilla), ("fused", _fused))
    }
    with autotune.at_once():
        times = interleave(
            {"/".join(key): segments for key, segments in candidates.items()},
            timer_for(device, cold=False),
            Timing(rounds=200, seconds_per_round=0.05, budget_s=seconds),
        )
    result = []
    for precision in precisions:
        vanilla, fused = times[f"vanilla/{precision}"][0], times[f"fused/{precision}"][0]
        result.append(Timed(precision, summarise(vanilla), summarise(fused), ratio(vanilla, fused)))
    return result


class _OfLabels(nn.Module):
    """A network of classes that is always called with the same labels."""

    def __init__(self, net: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.net, self.labels = net, labels

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, self.labels)


def _vanilla(
    nets: tuple[Generator, Discriminator],
    config: TrainConfig,
    real: Tensor,
    z: Tensor,
    labels: Tensor | None,
    dtype: torch.dtype | None,
) -> Callable[[], object]:
    """What anyone would write: a plain nn.Sequential of PyTorch's own modules, the textbook loop, PyTorch's Adam."""
    plain: list[nn.Module] = [unfuse(nets[0]), unfuse(nets[1]).blocks]
    if labels is not None:
        plain = [_OfLabels(net, labels) for net in nets]
    generator, discriminator = plain
    adam_g, adam_d = (steps.adam(net, real.device) for net in plain)
    return lambda: steps.gan_step(generator, discriminator, adam_g, adam_d, real, z, dtype)


def _fused(
    nets: tuple[Generator, Discriminator],
    config: TrainConfig,
    real: Tensor,
    z: Tensor,
    labels: Tensor | None,
    dtype: torch.dtype | None,
) -> Callable[[], object]:
    """What a training run does."""
    betas, capturable = (config.beta1, config.beta2), real.device.type == "cuda"
    optimizers = [
        FusedAdam(net.parameters(), rate, betas, capturable=capturable)
        for net, rate in zip(nets, (config.lr_g, config.lr_d), strict=True)
    ]
    step = GANStep(*nets, *optimizers, dtype=dtype)
    return lambda: step(real, z, labels)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def to_markdown(timed: list[Timed], device: torch.device) -> str:
    """The comparison as a table."""
    lines = [
        (
            f"One training step (D on real, D on generated, G, both Adams), MNIST 32x32, batch {demo.BATCH}, "
            f"ngf = ndf = {demo.WIDTH}, channels_last, torch {torch.__version__}, {describe(device)}."
        ),
        "Medians of interleaved rounds; in brackets the quartiles.",
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


def write_results(timed: list[Timed], table: str, device: torch.device, settings: demo.DemoSettings) -> None:
    """comparison.md and comparison.json."""
    result = {
        "environment": environment(device),
        "unit": "seconds",
        "batch_size": demo.BATCH,
        "image_size": demo.IMAGE_SIZE,
        "channels": demo.CHANNELS,
        "ngf": demo.WIDTH,
        "ndf": demo.WIDTH,
        "steps": [dataclasses.asdict(t) for t in timed],
    }
    for name, text in ((demo.RESULT, json.dumps(result, indent=1)), ("comparison.md", table)):
        with replacing(settings.out / name) as temporary:
            temporary.write_text(text + "\n")
