"""The settings of a training run: one dataclass that Python, the command line and checkpoints share."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdcgan.checks import AMOUNT, SEED, Range
from fastdcgan.dcgan.files import short_name
from fastdcgan.dcgan.models import IMAGE_SIZES, KERNELS, PROJECTIONS
from fastdcgan.train_step import PENALTIES

PRECISIONS = ("fp32", "bf16", "fp16")
# Image size, channels and flips of the sets that installed packages ship, and of a folder, unless given.
BUILTIN_DATA = {
    "mnist": (32, 1, False),
    "digits": (32, 1, False),
    "photo-crops": (64, 3, True),
    "emoji": (64, 3, False),  # flags, letters and clocks have a side
    "emoji-people": (64, 3, True),
}
WITH_FILE = ("emoji", "emoji-people")  # sets that are made of a file, which may be named: "emoji:FONT.ttf"
FOLDER_DATA = (64, 3, True)

# What a resumed run can't change: the shapes of its weights, which images they have not seen, what was drawn at its
# start, and the size of the pictures that make its animation.
KEPT = (
    "image_size", "channels", "nz", "ngf", "ndf", "projection", "kernel", "conditional", "holdout", "seed", "samples",
)  # fmt: skip

# Settings that go together: TrainConfig(**{**PRESETS["paper"], "data": "photos"}), or `train photos --preset paper`.
PRESETS: dict[str, dict[str, Any]] = {
    # Radford et al. (2015), section 4 and figure 1; widths, kernels, epochs and the linear projection as in their code
    "paper": {
        "image_size": 64,
        "flips": False,
        "nz": 100,
        "ngf": 128,
        "ndf": 128,
        "projection": "linear",
        "kernel": 5,
        "batch_size": 128,
        "epochs": 25,
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "beta1": 0.5,
        "real_label": 1.0,
    },
    # For `emoji` and `emoji-people`: those of the gallery's run, which was still getting better at its end. Without the
    # penalty D, which soon knows so few images by heart, has won after 5,000 steps.
    "emoji64": {
        "image_size": 64,
        "channels": 3,
        "ngf": 32,
        "ndf": 32,
        "batch_size": 64,
        "epochs": 250,
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "gradient_penalty": 1.0,
        "penalty_kind": "r1",
    },
}

_WIDTH = Range(1, 2**14)
_RATE = Range(None, 1e38, above=0, whole=False)
_DECAY = Range(0, None, below=1, whole=False)


def builtin_set(data: str) -> tuple[str, str]:
    """The built-in set that `data` names, and the file to make it of if one is named; "", "" for a folder."""
    name, colon, file = data.partition(":")
    known = name in (WITH_FILE if colon else BUILTIN_DATA)
    return (name, file) if known else ("", "")


def is_shards(data: str) -> bool:
    """Whether `data` names WebDataset shards, by a pattern such as "shards-{000..099}.tar", and no folder."""
    return data.endswith(".tar") and not Path(data).is_dir()


def _option(default: Any, help: str, **extra: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run does. `help` texts are the documentation of the fields."""

    data: str = _option(
        "",
        "a folder of images (searched recursively), WebDataset shards ('shards-{000..099}.tar'), or a built-in set: "
        f"{', '.join(BUILTIN_DATA)}; of emoji as emoji:FONT too, to draw them from that file",
    )
    out: str = _option("", "folder of the run [default: runs/DATA-SIZE, with a number where that exists]")
    cache: str = _option("", "folder of decoded images [default: fastdcgan in the user's cache folder]")

    image_size: int = _option(0, "side of the images [default: 32 for mnist and digits, else 64]", choices=IMAGE_SIZES)
    channels: int = _option(0, "1 (grey) or 3 (colour) [default: 1 for mnist and digits, else 3]", choices=(1, 3))
    flips: bool | None = _option(
        None, "mirror half of the images, chosen at random [default: not of mnist, digits and emoji]"
    )
    holdout: int = _option(0, "leave every Nth image out of training, to judge by [default: none]", range=Range(0))
    workers: int = _option(0, "processes that decode images [default: one per core]", range=Range(0, 1024))

    nz: int = _option(100, "size of the generator's input", range=_WIDTH)
    ngf: int = _option(64, "channels of the generator's last feature map", range=_WIDTH)
    ndf: int = _option(64, "channels of the discriminator's first feature map", range=_WIDTH)
    projection: str = _option("conv", "the generator's first block", choices=PROJECTIONS)
    kernel: int = _option(4, "side of the kernels that halve and double the maps", choices=KERNELS)

    conditional: bool = _option(
        False, "learn the classes too, each a sub-folder or a label of a built-in set: `sample --class` asks for one"
    )

    batch_size: int = _option(64, "images per step, over all processes", range=Range(1))
    epochs: int = _option(25, "passes over the data", range=Range(1))
    max_steps: int = _option(0, "stop after this many steps [default: no limit]", range=Range(0))
    max_minutes: float = _option(
        0.0, "stop after this much time, counted from this start [default: no limit]", range=AMOUNT
    )
    # Two time scales (Heusel et al., 2017): a D that learns faster keeps up with G in one step each. G's rate is the
    # paper's (section 4), D's is twice that.
    lr_g: float = _option(2e-4, "learning rate of the generator, below the discriminator's", range=_RATE)
    lr_d: float = _option(4e-4, "learning rate of the discriminator", range=_RATE)
    beta1: float = _option(0.5, "Adam's first momentum", range=_DECAY)
    beta2: float = _option(0.999, "Adam's second momentum", range=_DECAY)
    real_label: float = _option(
        0.9, "label of real images: below 1 is one-sided label smoothing", range=Range(None, 1, above=0.5, whole=False)
    )
    gradient_penalty: float = _option(
        0.0, "weight of a gradient penalty on the discriminator, 0 for none", range=AMOUNT
    )
    accumulate: int = _option(
        1, "parts that a batch is computed in, one after the other, to save memory", range=Range(1)
    )
    ema: float = _option(0.0, "decay of a moving average of the generator's weights, 0 for none", range=_DECAY)
    penalty_kind: str = _option("wgan-gp", "on mixtures, towards norm 1, or R1 on real images", choices=PENALTIES)

    precision: str = _option("fp32", "arithmetic of the networks; bf16 and fp16 by autocast", choices=PRECISIONS)
    device: str = _option("auto", "auto, cpu, cuda or cuda:N; auto is a GPU where there is one")
    sync_bn: bool = _option(False, "share BatchNorm statistics between processes")
    seed: int = _option(0, "of the weights, the order of the data, flips and noise", range=SEED)

    sample_every: int = _option(0, "steps between sample grids [default: once an epoch]", range=Range(0))
    samples: int = _option(64, "images in a sample grid", range=Range(1, 10_000))
    checkpoint_every: int = _option(0, "steps between checkpoints [default: once an epoch]", range=Range(0))
    keep: int = _option(3, "checkpoints to keep, the newest ones", range=Range(1))
    log_every: int = _option(10, "steps that one line of metrics.csv averages over", range=Range(1))
    tensorboard: bool = _option(False, "write TensorBoard events too (needs the package tensorboard)")

    def __post_init__(self) -> None:
        types = typing.get_type_hints(TrainConfig)
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if "range" in f.metadata:
                f.metadata["range"].check(f.name, value)
            elif not isinstance(value, types[f.name]):
                raise TypeError(f"{f.name} is {value!r}: expected {f.type}")
            elif choices and value not in choices and value != f.default:
                raise ValueError(f"{f.name} is {value!r}: expected one of {', '.join(map(str, choices))}")
        if self.holdout == 1:
            raise ValueError(f"holdout is {self.holdout}: expected 0 for none, or at least 2")
        if self.sync_bn and self.gradient_penalty:
            raise ValueError(
                "sync_bn and gradient_penalty don't go together: PyTorch can't differentiate SyncBatchNorm twice"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}: expected a divisor of the batch size, {self.batch_size}"
            )

    def resolved(self) -> TrainConfig:
        """The settings with every value that depends on the data filled in. Raises ValueError without `data`."""
        if not self.data:
            raise ValueError(f"no data given: expected a folder of images, or one of {', '.join(BUILTIN_DATA)}")
        name, file = builtin_set(self.data)
        size, channels, flips = BUILTIN_DATA.get(name, FOLDER_DATA)
        size = self.image_size or size
        # A run may go on from another folder.
        if file:
            data = f"{name}:{Path(file).resolve()}"
        else:
            data = name or str(Path(self.data).resolve())
        name = name or short_name(Path(re.split(r"[{*?\[]", data)[0].rstrip("-_.") if is_shards(data) else data))
        return dataclasses.replace(
            self,
            data=data,
            image_size=size,
            channels=self.channels or channels,
            flips=flips if self.flips is None else self.flips,
            out=self.out or str(_unused(Path("runs") / f"{name}-{size}")),
        )


def _unused(folder: Path) -> Path:
    """`folder`, or the first of `folder`-2, `folder`-3, ... that does not exist."""
    candidate, n = folder, 1
    while candidate.exists():
        n += 1
        candidate = folder.with_name(f"{folder.name}-{n}")
    return candidate
