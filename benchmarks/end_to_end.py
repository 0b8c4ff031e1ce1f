"""Training from a folder of JPEG files, images a second, loading included.

PyTorch's way is a `Dataset` that decodes with Pillow behind a `DataLoader` with workers, and the textbook step, eager
and channels_last; ours is what `fastdcgan train` does: decoded once (that is `prepare_s`), then `Batches` and
`GANStep`. Both see the same crops of the same files, in orders of their own; both steps are checked by "step".
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdcgan.benchmarks import harness
from fastdcgan.benchmarks.peers import DTYPES, PEERS
from fastdcgan.benchmarks.results import Case, Row
from fastdcgan.benchmarks.runners import StepRunner
from fastdcgan.benchmarks.shapes import NetShape
from fastdcgan.benchmarks.suites import device_settings
from fastdcgan.dcgan.data import Batches, load_images
from fastdcgan.dcgan.sources import FolderSource

PEER_NAMES = ("eager-nhwc", "train")
_WORKERS = 4  # at most: processes that decode for the DataLoader


def make_folder(folder: Path, count: int, side: int, seed: int = 0) -> None:
    """`count` JPEG files of random smooth pictures, `side` pixels wide."""
    random = np.random.default_rng(seed)
    for i in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05}.jpg", quality=90)


class _Folder(Dataset):
    """Decodes a file whenever it is asked for, into [C, H, W] in [-1, 1]."""

    def __init__(self, folder: Path, image_size: int) -> None:
        self.source, self.image_size = FolderSource(folder), image_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        pixels = torch.from_numpy(self.source.decode(index, self.image_size, 3).copy())
        return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _endless(loader: DataLoader) -> Iterator[Tensor]:
    while True:
        yield from loader


@contextlib.contextmanager
def trainers(
    shape: NetShape, batch: int, device: torch.device, dtype: str, count: int = 0
) -> Iterator[tuple[dict[str, Callable[[], None]], float]]:
    """Inside a `with`: by peer a call that takes a batch from the files and trains on it, and the seconds that ours
    took to decode them. `count` files (by default those of 16 batches)."""
    with tempfile.TemporaryDirectory(prefix="fastdcgan-images-") as name:
        folder = Path(name)
        (folder / "images").mkdir()
        make_folder(folder / "images", count or 16 * batch, shape.image_size * 3 // 2)
        loader = DataLoader(
            _Folder(folder / "images", shape.image_size), batch, shuffle=True, drop_last=True,
            num_workers=min(_WORKERS, torch.get_num_threads()), persistent_workers=True,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        begin = time.perf_counter()
        images = load_images(str(folder / "images"), shape.image_size, 3, cache_folder=folder / "cache")
        seconds = time.perf_counter() - begin
        with contextlib.closing(Batches(images, batch, device=device).stream()) as stream:
            nets, sources = shape.nets(), {"eager-nhwc": _endless(loader), "train": stream}
            calls = {peer: _trainer(peer, nets, sources[peer], shape, batch, device, dtype) for peer in PEER_NAMES}
            yield calls, seconds


def run_end_to_end(
    shape: NetShape, batch: int, device: torch.device, dtype: str, timing: harness.Timing, count: int = 0
) -> Case:
    """A case whose times are of one step and its batch."""
    torch.manual_seed(0)
    rows = {name: Row(name, PEERS[name].label, dtype) for name in PEER_NAMES}
    with device_settings(device), trainers(shape, batch, device, dtype, count) as (calls, seconds):
        rows["train"].prepare_s = seconds
        segments = {name: (call,) for name, call in calls.items()}
        samples = harness.interleave(segments, harness.timer_for(device, cold=False), timing)
    for name, row in rows.items():
        row.enter(samples[name][0], samples["train"][0])
    net = f"{shape.image_size}x{shape.image_size} from JPEG"
    return Case("step", net, "step", batch, dtype, "train", list(rows.values()))


def _trainer(
    name: str,
    nets: tuple[torch.nn.Module, torch.nn.Module],
    source: Iterator[Tensor],
    shape: NetShape,
    batch: int,
    device: torch.device,
    dtype: str,
) -> Callable[[], None]:
    """A call that takes the next batch and trains on it."""
    first = torch.zeros(batch, 3, shape.image_size, shape.image_size), torch.zeros(batch, shape.nz, 1, 1)
    runner = StepRunner(PEERS[name], nets, [first], device, DTYPES[dtype])

    def step() -> None:
        real = next(source).to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        runner.train_on(real, torch.randn(batch, shape.nz, 1, 1, device=device))

    return step
