"""The networks of a trained run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastdcgan.dcgan import checkpoint
from fastdcgan.dcgan.config import TrainConfig
from fastdcgan.dcgan.models import Discriminator, Generator, placed


@dataclass(frozen=True)
class Trained:
    """Both networks of a checkpoint in `eval`, in channels_last on one device, and the run's settings."""

    generator: Generator
    discriminator: Discriminator
    config: TrainConfig
    step: int
    path: Path


def load_trained(place: str | Path, device: torch.device | str = "cpu", ema: bool = False) -> Trained:
    """The networks of a checkpoint file, or of the newest checkpoint in a run's folder. With `ema` the generator is the
    run's moving average.

    Raises CheckpointError for a file that is none, and with `ema` for a run that kept no average.
    """
    path = checkpoint.find(place)
    saved = checkpoint.load(path, "generator", "discriminator", "ema")
    config = TrainConfig(**saved.state["config"])
    return Trained(
        _generator(saved, path, config, device, ema),
        _discriminator(saved, path, config, device),
        config,
        saved.state["step"],
        path,
    )


def load_generator(place: str | Path, device: torch.device | str = "cpu", ema: bool = False) -> Generator:
    """The generator alone, otherwise as `load_trained`."""
    path = checkpoint.find(place)
    saved = checkpoint.load(path, "ema" if ema else "generator")
    return _generator(saved, path, TrainConfig(**saved.state["config"]), device, ema)


def _generator(
    saved: checkpoint.Checkpoint, path: Path, config: TrainConfig, device: torch.device | str, ema: bool
) -> Generator:
    part = saved.part("ema" if ema else "generator")
    if ema and not part:
        raise checkpoint.CheckpointError(f"{path} has no moving average: its run was trained without --ema")
    net = Generator(config.image_size, config.channels, config.nz, config.ngf, config.projection)
    checkpoint.load_weights(net, part, path)
    return placed(net, device).eval()


def _discriminator(
    saved: checkpoint.Checkpoint, path: Path, config: TrainConfig, device: torch.device | str
) -> Discriminator:
    net = Discriminator(config.image_size, config.channels, config.ndf)
    checkpoint.load_weights(net, saved.part("discriminator"), path)
    return placed(net, device).eval()
