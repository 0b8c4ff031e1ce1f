"""Checkpoints: one safetensors file with all tensors of a run, and everything else as JSON in its header.

Nothing in it is pickled, so loading one runs no code of whoever wrote it. It appears whole or not at all, and has a
checksum.

    generator/KEY, discriminator/KEY           the networks' state_dicts
    ema/KEY                                    the average of the generator's, where a run keeps one
    optimizer_g/INDEX/KEY, optimizer_d/...     Adam's moments
    random/NAME                                states of the random generators
    metrics/NAME                               what the next line of metrics.csv has so far

Whoever made a checkpoint doesn't decide where anything is read or written: a run's folder is known by its record, a
file beside the checkpoints that has the run's number, which its checkpoints have too, and what it is trained on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdcgan.dcgan import tensor_files
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.files import read_text, write
from fastdcgan.dcgan.tensor_files import CHECKSUM, Damaged

FORMAT = "fastdcgan-checkpoint"
VERSION = 2  # 1 had no checksum, and counted the position in an epoch in batches
_RECORD = "run.json"
_NAME = re.compile(r"step-(\d{1,12})\.safetensors")


class CheckpointError(RuntimeError):
    """A file that is no checkpoint, is damaged, or can't be used; the message names it."""


class DamagedCheckpoint(CheckpointError):
    """A file that can't be read as it was written."""


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

    def load_optimizer(self, name: str, optimizer: Optimizer) -> None:
        """Load the moments. Everything else is as `optimizer` was made: a checkpoint doesn't decide on it."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.part(name).items():
            index, entry = key.split("/", 1)
            state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
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
    metadata = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(checkpoint.state)}
    tensor_files.write(path, checkpoint.tensors, metadata)


def load(path: str | Path, *parts: str) -> Checkpoint:
    """Read a checkpoint, or only the tensors below the given prefixes. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        tensors, metadata = tensor_files.read(path, *(f"{part}/" for part in parts))
    except Damaged as error:
        raise DamagedCheckpoint(f"{path} is damaged, or no checkpoint: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of fastdcgan")
    version = metadata.get("version")
    if version not in ("1", str(VERSION)):
        raise CheckpointError(f"{path} has the version {version}: expected {VERSION}")
    if version != "1" and CHECKSUM not in metadata:
        raise DamagedCheckpoint(f"{path} is damaged: it has no checksum")
    state = _state(metadata)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} has no state of a run")
    if version == "1":
        _count_in_images(state)
    return Checkpoint(tensors, state)


def _state(metadata: dict[str, str]) -> Any:
    try:
        return json.loads(metadata.get("state", ""))
    except (ValueError, RecursionError):
        return None


def _count_in_images(state: dict[str, Any]) -> None:
    """Take what version 1 says for what this one says."""
    data, config = state.get("data"), state.get("config")
    if isinstance(data, dict) and isinstance(config, dict):
        batches, size = data.get("position"), config.get("batch_size")
        if isinstance(batches, int) and isinstance(size, int):
            data["position"] = batches * size


def load_newest(place: str | Path, *parts: str) -> tuple[Path, Checkpoint]:
    """`load` a checkpoint file, or the newest in a run's folder that is not damaged. Raises CheckpointError."""
    newest = find(place)
    paths = [newest] if Path(place).is_file() else all_of(place)[::-1]
    damaged: list[DamagedCheckpoint] = []
    for path in paths:
        try:
            found = load(path, *parts)
        except DamagedCheckpoint as error:
            damaged.append(error)
        else:
            for reason in damaged:
                say(f"Passed over: {reason}")
            return path, found
    raise damaged[0]


def load_weights(net: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a network's part. Raises CheckpointError, before anything of `net` is changed, for one that doesn't fit."""
    check_weights(net, state, path)
    net.load_state_dict(state)


def check_weights(net: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Raise CheckpointError unless `state` is right for `net`, which may be on "meta"."""
    try:
        tensor_files.check(state, net.state_dict())
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit this network: {error}") from error


# --- a run's folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What a run's folder says of itself: the run's number, and the images that it is trained on."""

    run: str | None
    data: str


def write_record(run: Path, record: Record) -> None:
    write(run / _RECORD, json.dumps({"run": record.run, "data": record.data}))


def record_of(path: Path, state: dict[str, Any]) -> Record | None:
    """The record of the folder that the checkpoint `path` is in, if that is the folder of its own run; else None.

    Runs of version 1 have no record and no number: then it is what the checkpoint says.
    """
    run = run_of(path)
    if run is None:
        return None
    try:
        found = json.loads(read_text(run / _RECORD))
        record = Record(str(found["run"]), str(found["data"]))
    except FileNotFoundError:
        config = state.get("config")
        data = config.get("data") if isinstance(config, dict) else None
        record = Record(None, data if isinstance(data, str) else "")
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        say(f"{run / _RECORD} can't be read: so it is not known whose run {run} has")
        return None
    return record if record.run == state.get("run") else None


def run_of(path: str | Path) -> Path | None:
    """The folder that has `path` among its checkpoints, if it has. Links are not followed: it is the one named."""
    path = Path(os.path.abspath(path))
    return path.parent.parent if path.parent.name == folder("").name and _NAME.fullmatch(path.name) else None


def check_own(paths: Sequence[Path], run: str | None) -> None:
    """Raise CheckpointError if one of the checkpoints is of another run."""
    for path in paths:
        state = _state(tensor_files.read_metadata(path))
        other = state.get("run") if isinstance(state, dict) else None
        if other not in (None, run):
            raise CheckpointError(f"{path} is of another run than what is to go on beside it: expected another out")


def folder(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def path_at(run: str | Path, step: int) -> Path:
    return folder(run) / f"step-{step:08}.safetensors"


def all_of(run: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (path for path in folder(run).glob("step-*.safetensors") if _NAME.fullmatch(path.name))
    return sorted(filter(Path.is_file, found), key=step_of)


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
