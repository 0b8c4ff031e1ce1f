"""What is in a checkpoint, checked before it is used: the networks of a trained run, and all that it goes on with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdcgan.checks import Range
from fastdcgan.dcgan import checkpoint, tensor_files
from fastdcgan.dcgan.checkpoint import Checkpoint, CheckpointError, Record
from fastdcgan.dcgan.config import BUILTIN_DATA, TrainConfig
from fastdcgan.dcgan.models import Discriminator, Generator, placed

_COUNT = Range(0)
_NAMED_IN_FULL = 10
_SCALE = Range(None, 2.0**127, above=0, whole=False)  # of a GradScaler


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose settings, step and networks can be what they say; `record` if it is in its run's folder.

    `config` names no folders to write to, whatever the file says of them.
    """

    path: Path
    checkpoint: Checkpoint
    config: TrainConfig
    classes: tuple[str, ...]  # their names, of a run with `conditional`
    record: Record | None

    @property
    def data(self) -> str:
        """What the run was trained on, if its folder says so or that is a built-in set; else ""."""
        if self.record is not None:
            return self.record.data
        return self.config.data if self.config.data in BUILTIN_DATA else ""


@dataclass(frozen=True)
class Trained:
    """Both networks of a checkpoint in `eval`, in channels_last on one device, and the run's settings; of its data what
    is known from more than the checkpoint, which may be anybody's: a built-in set, or what the run's folder says."""

    generator: Generator
    discriminator: Discriminator
    config: TrainConfig
    step: int
    path: Path
    data: str = ""
    classes: tuple[str, ...] = ()

    def images(self, named: str | None) -> str:
        """The data that a user names, or else the run's. Raises CheckpointError where neither is known."""
        if not (named or self.data):
            raise CheckpointError(
                f"{self.path} is not in its run's folder, so its word on where images are is not taken: name them"
            )
        return named or self.data

    def has_seen(self, data: str) -> bool:
        """Whether the run was trained on `data`, but for what it held out."""
        return self.config.data in (data, str(Path(data).resolve()))


def load_trained(
    place: str | Path, device: torch.device | str = "cpu", ema: bool = False, label: str | None = None
) -> Trained:
    """The networks of a checkpoint file, or of the newest checkpoint in a run's folder. With `ema` the generator is the
    run's moving average. `label`, the name of a class or its number, is what networks of classes then stand for where
    they are given no labels.

    Raises CheckpointError for a file that is none, and with `ema` for a run that kept no average; ValueError for a
    `label` that is none of the run's classes.
    """
    part = "ema" if ema else "generator"
    saved = read(place, part, "discriminator")
    number = None if label is None else _number_of(label, saved)
    nets = _net(saved, part, device, number), _net(saved, "discriminator", device, number)
    return Trained(*nets, saved.config, saved.checkpoint.state["step"], saved.path, saved.data, saved.classes)


def load_generator(
    place: str | Path, device: torch.device | str = "cpu", ema: bool = False, label: str | None = None
) -> Generator:
    """The generator alone, otherwise as `load_trained`."""
    part = "ema" if ema else "generator"
    saved = read(place, part)
    return _net(saved, part, device, None if label is None else _number_of(label, saved))


def _number_of(label: str, saved: Saved) -> int:
    """A class by its name, or else by its number, counted from 0."""
    if not saved.classes:
        raise ValueError(f"{saved.path} knows no classes, so not {label!r}: its run was trained without --conditional")
    if label in saved.classes:
        return saved.classes.index(label)
    if label.isdecimal() and int(label) < len(saved.classes):
        return int(label)
    shown = ", ".join(saved.classes[:_NAMED_IN_FULL])
    more = ", ..." if len(saved.classes) > _NAMED_IN_FULL else ""
    raise ValueError(f"{saved.path} has no class {label!r}: expected one of {len(saved.classes)}: {shown}{more}")


def read(place: str | Path, *parts: str) -> Saved:
    """A checkpoint file, or the newest in a run's folder that is not damaged, checked: settings, step, and of the
    networks "generator", "discriminator" and "ema" those among `parts`. Without parts, all that a run goes on with.

    Raises CheckpointError, before memory is asked for that the file itself doesn't have.
    """
    path, found = checkpoint.load_newest(place, *parts)
    saved = Saved(path, found, *_settings(found, path), checkpoint.record_of(path, found.state))
    nets = parts or ("generator", "discriminator", *(["ema"] if saved.config.ema else []))
    for part in nets:
        if part == "ema" and not found.part(part):
            raise CheckpointError(f"{path} has no moving average: its run was trained without --ema")
        checkpoint.check_weights(_empty(saved, part), found.part(part), path)
    if not parts:
        try:
            _check_to_go_on(saved)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} can't be gone on with: {error}") from error
    return saved


def _settings(found: Checkpoint, path: Path) -> tuple[TrainConfig, tuple[str, ...]]:
    """The run's settings, and the names of its classes."""
    try:
        given = _dictionary(found.state, "config")
        unknown = given.keys() - {f.name for f in fields(TrainConfig)}
        if unknown:
            raise ValueError(f"there is no setting {min(unknown)!r}")
        config = TrainConfig(**{**given, "out": "", "cache": ""})
        if not config.channels:
            raise ValueError("channels is 0")
        _COUNT.check("step", found.state.get("step"))
        classes = found.state.get("classes", [])
        if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise TypeError(f"classes is {classes!r}: expected a list of names")
        if len({*classes}) < len(classes) or config.conditional != bool(classes):
            raise ValueError(f"classes is {classes!r}, conditional is {config.conditional}: expected names or none")
        # On "meta" a network has shapes and takes no memory.
        with torch.device("meta"):
            new_generator(config, len(classes)), new_discriminator(config, len(classes))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has settings that can't be: {error}") from error
    return config, tuple(classes)


def _check_to_go_on(saved: Saved) -> None:
    state, tensors = saved.checkpoint.state, saved.checkpoint
    Range(1).check("images", state.get("images"))
    stream = _dictionary(state, "data")
    _COUNT.check("epoch", stream.get("epoch"))
    Range(0, state["images"]).check("position", stream.get("position"))
    scaler = state.get("scaler")
    if scaler is not None:
        scaler = _dictionary(state, "scaler")
        _SCALE.check("scale", scaler.get("scale"))
        _COUNT.check("_growth_tracker", scaler.get("_growth_tracker"))
    for name, part in (("optimizer_g", "generator"), ("optimizer_d", "discriminator")):
        moments = tensors.part(name)
        # There are none before the first step, or where a GradScaler has skipped all of them.
        if moments or (state["step"] and not scaler):
            _check_part(name, moments, _moments(_empty(saved, part)))
    random = tensors.part("random")
    random.pop("cuda", None)  # the device looks at that
    _check_part("random", random, dict.fromkeys(("noise", "torch", "data"), torch.Generator().get_state()))
    for name, value in random.items():
        generator = torch.Generator()
        try:
            generator.set_state(value)
        except RuntimeError as error:
            raise ValueError(f"random/{name} is no state of a random generator: {error}") from error
        if len(torch.rand(100, generator=generator).unique()) < 2:
            raise ValueError(f"random/{name} is a state that always gives the same number")


def _check_part(name: str, given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    named = ({f"{name}/{key}": value for key, value in tensors.items()} for tensors in (given, expected))
    tensor_files.check(*named)


def _moments(net: Generator | Discriminator) -> dict[str, Tensor]:
    """What Adam keeps of a network."""
    expected: dict[str, Tensor] = {}
    for i, parameter in enumerate(net.parameters()):
        expected |= {f"{i}/step": torch.zeros(()), f"{i}/exp_avg": parameter, f"{i}/exp_avg_sq": parameter}
    return expected


def _dictionary(state: dict[str, Any], name: str) -> dict[str, Any]:
    value = state.get(name)
    if not isinstance(value, dict):
        raise TypeError(f"{name} is of type {type(value).__name__}: expected names with values")
    return value


def new_generator(config: TrainConfig, classes: int = 0) -> Generator:
    """The generator that training begins with, of so many classes."""
    c = config
    return Generator(c.image_size, c.channels, c.nz, c.ngf, c.projection, c.kernel, classes)


def new_discriminator(config: TrainConfig, classes: int = 0) -> Discriminator:
    """The discriminator that training begins with, of so many classes."""
    return Discriminator(config.image_size, config.channels, config.ndf, config.kernel, classes)


def _empty(saved: Saved, part: str) -> Generator | Discriminator:
    with torch.device("meta"):
        new = new_discriminator if part == "discriminator" else new_generator
        return new(saved.config, len(saved.classes))


def _net(saved: Saved, part: str, device: torch.device | str, label: int | None = None) -> Any:
    net = _empty(saved, part).to_empty(device="cpu")
    net.label = label
    net.load_state_dict(saved.checkpoint.part(part))
    return placed(net, device).eval()
