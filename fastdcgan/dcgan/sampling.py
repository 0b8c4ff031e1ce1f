"""Images out of a trained generator, in memory or, however many, into files.

generator = load_generator("runs/mine", ema=True)
images = sample(generator, 64, seed=1)
write_grid(generator, 64, Path("samples.png"))
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdcgan.dcgan.console import Bar
from fastdcgan.dcgan.files import check_suffix, new_folder, replacing, writing
from fastdcgan.dcgan.images import Sheet, encoded, save_numbered, to_pixels
from fastdcgan.dcgan.models import Generator

MOST_IN_A_GRID = 10_000  # beyond them the picture itself is what takes the memory
_BATCH = 64


def noise(nz: int, count: int, seed: int = 0, truncation: float | None = None) -> Tensor:
    """`count` inputs of a generator, float32 [count, nz] on the CPU: those that `sample` makes its images from.

    With `truncation` they are from a normal distribution truncated to [-truncation, truncation] (Brock, Donahue and
    Simonyan, 2019, section 3.1): values inside stay, those outside are drawn anew. Fewer odd images, less variety.
    Raises ValueError for less than one image, or a truncation that is not above 0.
    """
    return torch.cat(list(_noise(nz, count, seed, truncation)))


def _noise(nz: int, count: int, seed: int, truncation: float | None) -> Iterator[Tensor]:
    if count < 1:
        raise ValueError(f"count is {count}: expected at least 1")
    if truncation is not None and not truncation > 0:
        raise ValueError(f"truncation is {truncation}: expected more than 0")
    random = torch.Generator().manual_seed(seed)
    for start in range(0, count, _BATCH):
        # Row by row: the first images of a seed are the same, however many are made.
        yield torch.stack([_row(nz, random, truncation) for _ in range(min(_BATCH, count - start))])


def _row(nz: int, random: torch.Generator, truncation: float | None) -> Tensor:
    z = torch.randn(nz, generator=random)
    if truncation is None:
        return z
    # Drawing until it falls inside is one draw from the truncated distribution, which its inverse turns uniform
    # numbers into.
    inside = torch.special.ndtr(torch.tensor(truncation, dtype=torch.float64)).mul(2).sub(1)
    uniform = torch.rand(nz, generator=random, dtype=torch.float64)
    drawn = torch.special.ndtri(0.5 + (uniform - 0.5) * inside).float()
    return torch.where(z.abs() <= truncation, z, drawn.clamp(-truncation, truncation))


def mixed_labels(generator: Generator, count: int) -> Tensor | None:
    """For a generator of classes of which none is chosen all of them in turn, int64 [count]; else None."""
    if not generator.classes or generator.label is not None:
        return None
    return torch.arange(count) % generator.classes


@torch.inference_mode()
def batches(generator: Generator, count: int, seed: int = 0, truncation: float | None = None) -> Iterator[Tensor]:
    """`sample` in parts: images [at most 64, C, H, W]. Raises ValueError for values that are not finite, which would be
    black."""
    device = next(generator.parameters()).device
    done = 0
    for z in _noise(generator.nz, count, seed, truncation):
        labels = mixed_labels(generator, done + len(z))
        done += len(z)
        images = generator(z.to(device), None if labels is None else labels[-len(z) :].to(device)).float().cpu()
        if not images.isfinite().all():
            raise ValueError("the generator's images have values that are not finite: its weights are out of range")
        yield images


def sample(generator: Generator, count: int, seed: int = 0, truncation: float | None = None) -> Tensor:
    """`count` images [count, C, H, W] in [-1, 1] on the CPU, from `noise`; the same seed gives the same images, however
    many."""
    return torch.cat(list(batches(generator, count, seed, truncation)))


# --- into files ------------------------------------------------------------------------------------------------------
# Each writes as it goes, in bounded memory, and leaves nothing behind when it fails. Raises what `noise` raises, and
# OSError for a place that can't be written to.


def write_grid(generator: Generator, count: int, path: Path, seed: int = 0, truncation: float | None = None) -> None:
    """One PNG picture of all images, row by row. Raises ValueError for more than `MOST_IN_A_GRID`."""
    if count > MOST_IN_A_GRID:
        raise ValueError(f"a grid of {count} images: expected at most {MOST_IN_A_GRID}; folders and arrays take more")
    check_suffix(path, ".png")
    with replacing(path) as temporary:
        sheet = Sheet(count)
        for pixels in _pixels(generator, count, seed, truncation):
            sheet.add(pixels)
        temporary.write_bytes(encoded(sheet.image()))


def write_files(generator: Generator, count: int, folder: Path, seed: int = 0, truncation: float | None = None) -> None:
    """A PNG file of each image in a new folder: 000.png, 001.png, ... Raises FileExistsError for one that is not new,
    unless it is empty."""
    with new_folder(folder) as temporary:
        save_numbered(_pixels(generator, count, seed, truncation), count, temporary)


def write_classes(
    generators: dict[str, Generator], count: int, folder: Path, seed: int = 0, truncation: float | None = None
) -> None:
    """`count` images of each generator, in a folder of its name in a new folder: what torchvision's ImageFolder reads.

    Raises ValueError for names that are no names of folders, and for generators of different images.
    """
    kinds = {name: (g.image_size, g.channels) for name, g in generators.items()}
    first, expected = next(iter(kinds.items()))
    for name, kind in kinds.items():
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"the class {name!r} can't be a folder: expected a name without slashes")
        if kind != expected:
            size, channels = kind
            raise ValueError(
                f"the class {name} makes images of {size}x{size}x{channels}: "
                f"expected {expected[0]}x{expected[0]}x{expected[1]}, as {first} does"
            )
    with new_folder(folder) as temporary:
        for name, generator in generators.items():
            (temporary / name).mkdir()
            parts = _pixels(generator, count, seed, truncation, f"sampling {name}")
            save_numbered(parts, count, temporary / name)


def write_array(generator: Generator, count: int, path: Path, seed: int = 0, truncation: float | None = None) -> None:
    """All images as numpy's uint8 [count, H, W, C]: a `.npy` file, or a compressed `.npz` with the key "images"."""
    check_suffix(path, ".npy", ".npz")
    header = {"descr": "|u1", "fortran_order": False}
    size, channels = generator.image_size, generator.channels
    with writing(path) as file:
        compressed = path.suffix.lower() == ".npz"
        archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) if compressed else None
        target = archive.open("images.npy", "w", force_zip64=True) if archive else file
        try:
            np.lib.format.write_array_header_1_0(target, {**header, "shape": (count, size, size, channels)})
            for pixels in _pixels(generator, count, seed, truncation):
                target.write(pixels.tobytes())
        finally:
            if archive:
                target.close()
                archive.close()


def _pixels(
    generator: Generator, count: int, seed: int, truncation: float | None, title: str = "sampling"
) -> Iterator[np.ndarray]:
    """Images as uint8 [at most 64, H, W, C], with a bar where they are more than one batch."""
    parts = map(to_pixels, batches(generator, count, seed, truncation))
    if count <= _BATCH:
        yield from parts
        return
    with Bar(title, count) as bar:
        done = 0
        for pixels in parts:
            yield pixels
            done += len(pixels)
            bar.update(done)
