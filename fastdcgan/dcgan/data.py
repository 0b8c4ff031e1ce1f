"""Images for training: decoded once into a cache, then shuffled, flipped and normalised batches."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdcgan.dcgan import cache
from fastdcgan.dcgan.config import BUILTIN_DATA, builtin_set
from fastdcgan.dcgan.console import say, track
from fastdcgan.dcgan.files import replacing, short_name
from fastdcgan.dcgan.sources import Source, open_source
from fastdcgan.images import normalize_images

_NAMED_IN_FULL = 10
_RESIDENT_SHARE = 0.25  # part of a GPU's free memory that images may take


@dataclass(frozen=True)
class Images:
    """Decoded images: uint8 [N, H, W, C], often memory-mapped, and the files that could not be read: their names with
    the reason, and their numbers in the source."""

    array: np.ndarray
    skipped: list[str] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.array)


@dataclass(frozen=True)
class Labelled:
    """Decoded images, the number of each one's class (int64 [N]), and the names of the classes."""

    images: Images
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)


def load_images(
    data: str, image_size: int, channels: int, *, cache_folder: str | Path | None = None, workers: int = 0
) -> Images:
    """The images of a folder or of a built-in set, decoded to `image_size` and `channels` and cached.

    A cache that is damaged, cut short, of another source or older than its source is made anew, with a message. Files
    that can't be read are named, counted and left out.
    Raises ValueError for a source without images, ModuleNotFoundError for a set whose package is not installed.
    """
    return _load(_open(data), data, image_size, channels, cache_folder, workers)


def load_labelled(
    data: str, image_size: int, channels: int, *, cache_folder: str | Path | None = None, workers: int = 0
) -> Labelled:
    """`load_images` with classes: of a built-in set, or of a folder with one sub-folder for each class.

    Raises NoClasses for a folder without classes, and what `load_images` raises.
    """
    source = _open(data)  # once: the folder may change before it is looked at again
    classes, labels = source.classes()
    images = _load(source, data, image_size, channels, cache_folder, workers)
    return Labelled(images, np.delete(labels, images.left_out), classes)


def _open(data: str) -> Source:
    source = open_source(data)
    for note in source.notes:
        say(note)
    return source


def _load(
    source: Source, data: str, image_size: int, channels: int, cache_folder: str | Path | None, workers: int
) -> Images:
    shape = (image_size, image_size, channels)
    fingerprint = source.fingerprint(image_size, channels)
    folder = Path(cache_folder) if cache_folder else cache.default_folder()
    path = folder / f"{_cache_name(data)}-{image_size}x{channels}.npy"
    if path.exists() or cache.header_path(path).exists():
        try:
            images = Images(*cache.read(path, fingerprint, shape))
        except cache.Untrusted as error:
            say(f"Decoding again: the cache {path} {error}")
        else:
            _report_skipped(images.skipped, len(images) + len(images.skipped))
            return images
    return _decode_all(source, path, fingerprint, shape, workers or os.cpu_count() or 1)


def _cache_name(data: str) -> str:
    if data in BUILTIN_DATA:
        return data
    name, file = builtin_set(data)
    if file:
        return f"{name}-{hashlib.sha256(os.fsencode(Path(file).resolve())).hexdigest()[:12]}"
    path = Path(data).resolve()
    return f"{short_name(path)}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def _decode_all(source: Source, path: Path, fingerprint: str, shape: cache.Shape, workers: int) -> Images:
    count, failed = len(source), dict[int, str]()

    def images() -> Iterator[tuple[int, np.ndarray]]:
        with contextlib.closing(source.decoded(shape[0], shape[2], workers)) as decoded:
            for number, result in track(decoded, f"decoding {source.title}", count):
                if isinstance(result, str):
                    failed[number] = result
                else:
                    yield number, result

    with replacing(path) as temporary:
        cache.write_array(temporary, count, shape, images())
        left_out = sorted(failed)
        skipped = [f"{source.name_of(i)} ({failed[i]})" for i in left_out]
        _report_skipped(skipped, count)
        if len(failed) == count:
            raise ValueError(f"none of the {source.title} could be read")
        described = cache.describe(temporary)
        array = np.load(temporary, mmap_mode="r", allow_pickle=False)
    cache.write_header(path, fingerprint, described, skipped, left_out)
    return Images(array, skipped, left_out)


def _report_skipped(skipped: list[str], total: int) -> None:
    if skipped:
        say(f"{len(skipped)} of {total} files could not be read and are left out:")
        for name in skipped[:_NAMED_IN_FULL]:
            say(f"  {name}")
        if len(skipped) > _NAMED_IN_FULL:
            say(f"  ... and {len(skipped) - _NAMED_IN_FULL} more (all of them in the cache's .json)")


def held_out(count: int, every: int) -> np.ndarray:
    """Which of `count` images are left out of training when every Nth is: bool [count]. Sets often lie sorted by class,
    so this takes from each."""
    return np.arange(count) % every == every - 1 if every else np.zeros(count, bool)


class Batches:
    """An endless stream of batches, epoch after epoch, that can be stopped and continued anywhere.

    A batch is float32 [B, C, H, W] in [-1, 1], channels_last, on `device`. The order and the flips of an epoch are
    drawn at its start, from a generator of this object's own; images that don't fill a last batch sit that epoch out.
    With `labels`, int64 [N], a batch of them comes beside that of the images: int64 [B]. Every `holdout`th image is
    left out (`held_out`). With `world` processes each gets its own slice `rank` of every batch of `batch_size` images,
    so that together they see what one process would.

    Raises ValueError if fewer images than `batch_size` are left, or if it can't be split over the processes.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        labels: np.ndarray | None = None,
        flips: bool = False,
        holdout: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._kept = torch.from_numpy(np.flatnonzero(~held_out(len(images), holdout)))
        if len(self._kept) < batch_size:
            raise ValueError(f"there are {len(self._kept)} images: expected at least one batch of {batch_size}")
        if batch_size % world:
            raise ValueError(f"batch_size is {batch_size}: expected a multiple of the {world} processes")
        self.batch_size, self.flips, self.device = batch_size, flips, torch.device(device)
        share = batch_size // world
        self._slice = slice(rank * share, (rank + 1) * share)
        self._array = images.array
        self._labels = None if labels is None else torch.from_numpy(labels)
        self._resident = self._on_device()
        self._random = torch.Generator().manual_seed(seed)
        self.epoch = self.position = 0
        self._start_epoch()

    @property
    def images(self) -> int:
        """Images that take part: all but those that are left out."""
        return len(self._kept)

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self._kept) // self.batch_size

    def stream(self) -> Generator[Tensor]:
        """`batches`, of which only the images."""
        with contextlib.closing(self.batches()) as batches:
            for images, *_ in batches:
                yield images

    def batches(self) -> Generator[tuple[Tensor, ...]]:
        """Images, and the labels where there are any, from where the stream stands; `epoch` and `position` already
        count the batch that is handed out."""
        with ThreadPoolExecutor(1) as pool:
            coming = self._submit(pool)
            while True:
                pixels, flip, *labels = coming.result()
                self._advance(self.batch_size)
                coming = self._submit(pool)
                yield self._normalised(pixels, flip), *(send(part, self.device) for part in labels)

    def _submit(self, pool: ThreadPoolExecutor) -> Future:
        return pool.submit(self._gather, *self._chosen())

    def left(self, epochs: int) -> int:
        """Batches from where the stream stands to the end of so many epochs, counted from the first one."""
        return (epochs - self.epoch - 1) * self.per_epoch + self._left_in_epoch

    @property
    def _left_in_epoch(self) -> int:
        return (self.images - self.position) // self.batch_size

    def _advance(self, images: int) -> None:
        self.position += images
        if self._left_in_epoch < 1:
            self.epoch, self.position = self.epoch + 1, 0
            self._start_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in images of an epoch: the same arguments and this state give the same batches from
        here on, and with another batch size no image comes twice in an epoch."""
        return {"epoch": self.epoch, "position": self.position, "random": self._random_at_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not 0 <= state["position"] <= self.images:
            raise ValueError(f"the position in the data is {state['position']}: expected one of {self.images} images")
        self._random.set_state(state["random"])
        self._start_epoch()
        self.epoch, self.position = state["epoch"], state["position"]
        self._advance(0)

    def _start_epoch(self) -> None:
        self._random_at_start = self._random.get_state()
        self._order = self._kept[torch.randperm(len(self._kept), generator=self._random)]
        self._flipped = torch.rand(len(self._kept), generator=self._random) < (0.5 if self.flips else 0.0)

    def _chosen(self) -> tuple[Tensor, Tensor]:
        mine = slice(self.position + self._slice.start, self.position + self._slice.stop)
        return self._order[mine], self._flipped[mine]

    def _on_device(self) -> Tensor | None:
        """All images in a GPU's memory, where they take a small share of it."""
        if self.device.type != "cuda":
            return None
        if self._array.nbytes > _RESIDENT_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return None
        return torch.from_numpy(np.array(self._array)).to(self.device)

    def _gather(self, indices: Tensor, flip: Tensor) -> tuple[Tensor, ...]:
        labels = () if self._labels is None else (self._labels[indices],)
        if self._resident is not None:
            return self._resident[send(indices, self.device)], flip, *labels
        return torch.from_numpy(self._array[indices.numpy()]), flip, *labels

    def _normalised(self, pixels: Tensor, flip: Tensor) -> Tensor:
        return normalize_images(send(pixels, self.device), send(flip, self.device) if self.flips else None)


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, without waiting for what a GPU still has to do."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
