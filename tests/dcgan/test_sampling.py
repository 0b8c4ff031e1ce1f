"""Samples in memory and in files: seeds, truncation, grids, arrays, folders."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.dcgan import Generator, console, sample, sampling
from fastdcgan.dcgan.images import grid, to_pixels


def stray(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", [None, 0.5])
def test_the_first_images_of_a_seed_are_the_same_however_many(truncation: float | None, generator: Generator) -> None:
    many = sampling.noise(8, 130, 3, truncation)
    assert many.shape == (130, 8)
    for count in (1, 64, 65):
        assert torch.equal(sampling.noise(8, count, 3, truncation), many[:count])
    assert not torch.equal(sampling.noise(8, 1, 4, truncation), many[:1])
    images = sample(generator, 70, 3, truncation)
    torch.testing.assert_close(images[64:], generator(many[64:70]).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("truncation", [0.3, 1.0, 2.5])
def test_truncated_noise_is_truncated_normal(truncation: float) -> None:
    z, whole = sampling.noise(500, 60, 0, truncation), sampling.noise(500, 60, 0)
    assert z.abs().max() <= truncation
    t = torch.tensor(truncation, dtype=torch.float64)
    density = torch.exp(-t * t / 2) / (2 * torch.pi) ** 0.5
    variance = 1 - 2 * t * density / (2 * torch.special.ndtr(t) - 1)
    assert z.var().item() == pytest.approx(variance.item(), rel=0.03)  # of 30,000 draws
    assert abs(z.mean().item()) < 4 * variance.item() ** 0.5 / 30_000**0.5
    redrawn = z[whole.abs() > truncation]
    assert len(redrawn.unique()) > 0.9 * len(redrawn)  # drawn, not clamped


def test_noise_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="count is 0: expected at least 1"):
        sampling.noise(8, 0)
    for truncation in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"truncation is {truncation}: expected more than 0"):
            sampling.noise(8, 1, 0, truncation)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays(suffix: str, generator: Generator, tmp_path: Path) -> None:
    path = tmp_path / f"all{suffix}"
    sampling.write_array(generator, 131, path, 2)
    loaded = np.load(path, allow_pickle=False)
    pixels = loaded if suffix == ".npy" else loaded["images"]
    assert np.array_equal(pixels, to_pixels(sample(generator, 131, 2)))
    if suffix == ".npz":
        assert zipfile.ZipFile(path).testzip() is None
        assert loaded.files == ["images"]


def test_grid_and_files_show_the_same(generator: Generator, tmp_path: Path) -> None:
    sampling.write_grid(generator, 70, tmp_path / "grid.png", 1)
    sampling.write_files(generator, 70, tmp_path / "files", 1)
    images = sample(generator, 70, 1)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(grid(images)))
    files = sorted((tmp_path / "files").iterdir())
    assert [path.name for path in files] == [f"{i:02}.png" for i in range(70)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), to_pixels(images)[..., 0])


def test_a_grid_has_an_end(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a grid of 10001 images: expected at most 10000"):
        sampling.write_grid(generator, 10_001, tmp_path / "grid.png")
    assert stray(tmp_path) == []


def test_memory_does_not_grow_with_the_count(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is written before the next one is made."""
    written: list[int] = []

    class Watched(io.FileIO):
        def write(self, data) -> int:  # type: ignore[override]
            written.append(len(data))
            return super().write(data)

    def watched(path: Path, mode: str, buffering: int = -1) -> io.FileIO:
        return Watched(path, "w") if mode == "wb" else io.FileIO(path, "r")

    monkeypatch.setattr(Path, "open", watched)
    at_batch = []

    def counted(*args: object) -> object:
        for images in list_of_batches:
            at_batch.append(sum(written))
            yield images

    list_of_batches = list(sampling.batches(generator, 256))
    monkeypatch.setattr(sampling, "batches", counted)
    sampling.write_array(generator, 256, tmp_path / "all.npy")
    size = 64 * 28 * 28
    header = sum(written) - 4 * size
    assert at_batch == [header + i * size for i in range(4)]


@pytest.mark.parametrize(
    ("write", "name"),
    [(sampling.write_grid, "out.png"), (sampling.write_array, "out.npy"), (sampling.write_files, "out")],
)
def test_nothing_is_left_of_what_failed(
    write, name: str, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> object:
        yield from list_of_batches
        raise KeyboardInterrupt

    list_of_batches = list(sampling.batches(generator, 64))
    monkeypatch.setattr(sampling, "batches", fails)
    with pytest.raises(KeyboardInterrupt):
        write(generator, 128, tmp_path / name)
    assert stray(tmp_path) == []


def test_progress_of_many(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
    sampling.write_array(generator, 64, tmp_path / "a.npy")
    assert capsys.readouterr().out == ""
    sampling.write_array(generator, 130, tmp_path / "a.npy")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["sampling 64/130", "sampling 128/130", "sampling 130/130"]
