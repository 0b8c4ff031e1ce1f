"""Checkpoints: one safetensors file with all tensors of a run, and everything else as JSON in its header.

Nothing in it is pickled, so loading one runs no code of whoever wrote it. It appears whole or not at all.

    generator/KEY, discriminator/KEY           the networks' state_dicts
    ema/KEY                                    the average of the generator's, where a run keeps one
    optimizer_g/INDEX/KEY, optimizer_d/...     Adam's moments
    random/NAME                                states of the random generators
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdcgan.dcgan.files import replacing

FORMAT = "fastdcgan-checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d+)\.safetensors")


class CheckpointError(RuntimeError):
    """A file that is no checkpoint, or is damaged; the message names it."""


@dataclass
class Checkpoint:
    """Tensors by their full names, and `state`: what JSON can hold, among it the run's `config` and `step`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def add(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        self.tensors |= {f"{prefix}/{key}": value for key, value in tensors.items()}

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix`, under their own names."""
        start = f"{prefix}/"
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}

    def add_optimizer(self, name: str, optimizer: Optimizer) -> None:
        saved = optimizer.state_dict()
        tensors = {f"{index}/{key}": value for index, s in saved["state"].items() for key, value in s.items()}
        self.add(name, tensors)
        # A learning rate is a tensor where a CUDA graph reads it.
        self.state[name] = [
            {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in saved["param_groups"]
        ]

    def load_optimizer(self, name: str, optimizer: Optimizer) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.part(name).items():
            index, entry = key.split("/", 1)
            state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({"state": state, "param_groups": self.state[name]})
        # Files hold no memory format: moments lie as their parameters do, as they did when Adam made them.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for entry, value in optimizer.state[parameter].items():
                    if value.shape == parameter.shape:
                        optimizer.state[parameter][entry] = (
                            torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()
                        )


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, atomically."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(checkpoint.state)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: str | Path, *parts: str) -> Checkpoint:
    """Read a checkpoint, or only the tensors below the given prefixes. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is no checkpoint of fastdcgan")
            if metadata.get("version") != str(VERSION):
                raise CheckpointError(f"{path} has the version {metadata.get('version')}: expected {VERSION}")
            prefixes = tuple(f"{part}/" for part in parts) or ""
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
            return Checkpoint(tensors, json.loads(metadata["state"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint: {error}") from error


def load_weights(net: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a network's part, with an error that names the file."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this network: {' '.join(str(error).split())}") from error


def folder(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def path_at(run: str | Path, step: int) -> Path:
    return folder(run) / f"step-{step:08}.safetensors"


def all_of(run: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (path for path in folder(run).glob("step-*.safetensors") if _NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def find(place: str | Path) -> Path:
    """A checkpoint file as it is, or the newest checkpoint of a run's folder. Raises CheckpointError."""
    place = Path(place)
    if place.is_file():
        return place
    if not place.exists():
        raise CheckpointError(f"there is no checkpoint and no run's folder {place}")
    checkpoints = all_of(place)
    if not checkpoints:
        raise CheckpointError(f"{place} has no checkpoints")
    return checkpoints[-1]


def keep_newest(run: str | Path, step: int, keep: int) -> None:
    """Delete the checkpoints of a run that come after `step`, and of the others all but the newest `keep`; that of the
    start goes with the first one after it."""
    paths = all_of(run)
    past = [path for path in paths if min(step, 1) <= step_of(path) <= step]
    for path in {*paths} - {*past[-keep:]}:
        path.unlink(missing_ok=True)
