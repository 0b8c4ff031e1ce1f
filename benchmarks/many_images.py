"""What a set of very many images costs: memory, and the time of each thing that `fastdcgan train` does with it.

    python -m fastdcgan.benchmarks.many_images --count 1000000
    python -m fastdcgan.benchmarks.many_images --count 100000 --shards

Made and removed on the spot: 1,000 different pictures of 32x32, half JPEG and half PNG, and hard links to them in
folders of 1,000, or copies in shards of 1,000. CPU seconds are of the process and its workers, and so is the memory
that belongs to no file (`Pss_Anon`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from fastdcgan.dcgan.data import Batches, load_images
from fastdcgan.dcgan.sources import open_source

_DIFFERENT, _SIDE, _BATCH, _BATCHES = 1000, 32, 128, 200
_SECONDS_BETWEEN_LOOKS = 0.1


def make_images(folder: Path, count: int, shards: bool) -> str:
    """Make so many in `folder`; what `fastdcgan train` is to be given for them."""
    pictures, random = folder / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    paths = [pictures / f"{i}.{('jpg', 'png')[i % 2]}" for i in range(min(count, _DIFFERENT))]
    for path in paths:
        small = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(path)
    for start in range(0, count, len(paths)):
        part = folder / "images" / f"{start // len(paths):04}{'.tar' * shards}"
        (part.parent if shards else part).mkdir(parents=True, exist_ok=True)
        names = {path: f"{start + i:08}{path.suffix}" for i, path in enumerate(paths[: count - start])}
        if shards:
            with tarfile.open(part, "w") as tar:
                for path, name in names.items():
                    tar.add(path, name)
        else:
            for path, name in names.items():
                os.link(path, part / name)
    return str(folder / "images" / "*.tar" if shards else folder / "images")


def memory() -> float:
    """MiB of this process and its workers that are no file's."""
    total = 0
    for process in ("self", *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
        with contextlib.suppress(OSError):  # a worker that has just ended
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
    return total / 1024


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Measure what is inside of the `with`, and print a line."""
    before, peak, done = memory(), 0.0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            peak = max(peak, memory())

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    clock, cpu = time.perf_counter(), sum(os.times()[:4])
    yield
    seconds, cpu = time.perf_counter() - clock, sum(os.times()[:4]) - cpu
    done.set()
    looking.join()
    more = max(peak, memory()) - before
    print(f"{name:<24} {cpu:8.2f} s of CPU time {seconds:8.2f} s {more:+7.0f} MiB at most", flush=True)


def measure(folder: Path, count: int, shards: bool, workers: int) -> None:
    data = make_images(folder, count, shards)
    with part("list"):
        assert len(open_source(data)) == count
    for name in ("first load", "load from the cache"):
        with part(name):
            images = load_images(data, _SIDE, 3, cache_folder=folder / "cache", workers=workers)
    with part("begin to shuffle"):
        batches = Batches(images, min(_BATCH, count), flips=True)
    with part(f"{_BATCHES} batches"), contextlib.closing(batches.stream()) as stream:
        for _ in islice(stream, _BATCHES):
            pass
    with part("go on, as a resumed run"):
        batches.load_state_dict(batches.state_dict())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a set of very many images costs.")
    parser.add_argument("--count", type=int, default=100_000, help="images [default: %(default)s]")
    parser.add_argument("--shards", action="store_true", help="in shards in place of a folder")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode [default: one per core]")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fastdcgan-images-") as folder:
        measure(Path(folder), args.count, args.shards, args.workers)


if __name__ == "__main__":
    main()
