"""README.md and the documents: what they show works as written, and what they name is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastdcgan
from fastdcgan import cli
from fastdcgan.dcgan import Discriminator, FeatureExtractor, Generator, LinearSVM, TrainConfig, Trained
from fastdcgan.optim import FusedAdam

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def commands() -> Iterator[str]:
    """The lines of all blocks of commands, without comments; a backslash goes on with the next line."""
    for path in DOCUMENTS:
        for block in blocks(path, ""):
            for line in block.replace("\\\n", " ").splitlines():
                yield re.sub(r"\s+#.*", "", line).strip()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings], link


@pytest.mark.parametrize("line", sorted({line for line in commands() if line.startswith("fastdcgan ")}))
def test_commands_take_their_options(line: str) -> None:
    arguments = shlex.split(line)[1:]
    assert cli._parser(arguments).parse_args(arguments).command


# What makes a command of the README quick, behind its own options.
QUICK = {
    "train FOLDER": (options := "--nz 8 --ngf 4 --ndf 4 --batch-size 8 --max-steps 2 --samples 4 --device cpu"),
    "train shards-{000..099}.tar": options,
    "train --resume": "--max-steps 3",
    "sample": "--device cpu",
    "bench": "--suite generate --rounds 1 --peers eager",
}


def test_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as they are written, with a folder of images and shards of one image each."""
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("FOLDER").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (9, 70, 80, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(f"FOLDER/{i}.png")
    for i in range(100):
        with tarfile.open(f"shards-{i:03}.tar", "w") as tar:
            tar.add(f"FOLDER/{i % 9}.png")
    shown = [line for block in blocks(ROOT / "README.md", "") for line in block.splitlines()]
    lines = [line for line in shown if line.startswith("fastdcgan ")]
    assert len(lines) >= len(QUICK)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        (more,) = (options for start, options in QUICK.items() if f"{' '.join(words)} ".startswith(f"{start} "))
        assert cli.main([*words, *more.split()]) == 0, line
    assert Path("samples.png").is_file()


def test_targets_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for path in DOCUMENTS for t in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE)}
    assert {"demo", "test", "install", "docs"} <= named
    assert named <= targets


def test_names_are_those_of_the_sources() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    folders = [ROOT / name for name in ("fastdcgan", "kernels", "csrc", "benchmarks", "tests")]
    files = [
        ROOT / "setup.py",
        *(f for folder in folders for f in folder.rglob("*.*") if f.suffix in (".py", ".h", ".cuh")),
    ]
    sources = "\n".join(f.read_text() for f in files if f != Path(__file__))
    assert {name for name in re.findall(r"FASTDCGAN_[A-Z_]+", text) if name not in sources} == set()
    modules = set(re.findall(r"python -m (fastdcgan\.[\w.]+)", text))
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module), module


def test_extras_are_declared() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {e for path in DOCUMENTS for e in re.findall(r"(?:\.|fastdcgan)\[(\w+)\]", path.read_text())}
    assert "dcgan" in named
    assert named <= set(extras)


EXAMPLES = [(path, i) for path in DOCUMENTS for i in range(len(blocks(path, "python")))]


@pytest.mark.parametrize(("path", "i"), EXAMPLES, ids=[f"{path.name}-{i}" for path, i in EXAMPLES])
def test_examples_run(path: Path, i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small networks, optimisers and images for the names that an example doesn't make itself."""
    torch.manual_seed(0)
    generator, discriminator = Generator(32, ngf=4).eval(), Discriminator(32, ndf=4).eval()
    trained = Trained(generator, discriminator, TrainConfig(), 0, tmp_path)
    monkeypatch.setattr("fastdcgan.dcgan.load_trained", lambda run: trained)
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    width = FeatureExtractor(discriminator)(images).shape[1]
    LinearSVM(np.zeros((2, width)), np.zeros(2), np.arange(2), 1.0).save(tmp_path / "features" / "classifier.npz")
    G, D = Generator(32, ngf=4), Discriminator(32, ndf=4)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    exec(
        blocks(path, "python")[i],
        {
            "fastdcgan": fastdcgan, "torch": torch, "G": G, "D": D,
            "opt_g": FusedAdam(G.parameters()), "opt_d": FusedAdam(D.parameters()),
            "model": model, "saved": torch.optim.Adam(model.parameters()).state_dict(),
            "x": images, "real": images, "batches": [images], "images": images, "logits": torch.randn(8),
            "weight": torch.randn(8, 3, 4, 4), "mean": torch.zeros(8), "var": torch.ones(8),
        },
    )  # fmt: skip
