"""Small data and short runs for the tests of the DCGAN system."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from fastdcgan.dcgan import Generator, Images, TrainConfig, Trainer, load_generator

# Networks as small as they get, and the same as options of `fastdcgan train`
TINY = {"image_size": 28, "channels": 1, "nz": 8, "ngf": 4, "ndf": 4, "samples": 4, "device": "cpu"}
TINY_OPTIONS = ["--image-size", "28", "--nz", "8", "--ngf", "4", "--ndf", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give on networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone, and share what they decode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def images() -> Images:
    """45 grey images of 28x28, each with a bright square at a place of its own."""
    random = np.random.default_rng(0)
    array = random.integers(0, 60, (45, 28, 28, 1), dtype=np.uint8)
    for picture, (top, left) in zip(array, random.integers(0, 20, (45, 2)), strict=True):
        picture[top : top + 8, left : left + 8] += 190
    return Images(array)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Five steps an epoch on `images`, with narrow networks."""
    return TrainConfig(
        out=str(tmp_path / "run"),
        data="squares",
        **TINY,
        batch_size=8,
        epochs=3,
        log_every=1,
        flips=True,
    )


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps on "digits", 28x28, with checkpoints at steps 4 and 8 and a moving average."""
    run = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig(
        out=str(run),
        data="digits",
        **TINY,
        batch_size=16,
        max_steps=8,
        checkpoint_every=4,
        ema=0.9,
        cache=str(run.parent / "cache"),
    )
    Trainer(config).run()
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the folder `photos` beside it, with checkpoints at steps 1, 2 and 3; not to be changed."""
    place = tmp_path_factory.mktemp("finished")
    (place / "photos").mkdir()
    for i, pixels in enumerate(squares(18)[0]):
        Image.fromarray(pixels[:, :, 0]).save(place / "photos" / f"{i}.png")
    config = TrainConfig(
        data=str(place / "photos"),
        out=str(place / "run"),
        **TINY,
        batch_size=8,
        max_steps=3,
        checkpoint_every=1,
        sample_every=1,
        ema=0.5,
    )
    Trainer(config).run()
    return place / "run"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of `finished_run`, to do harm to."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def squares(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square in one of three corners, which is the class."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 60, (count, 28, 28, 1), dtype=np.uint8)
    labels = np.arange(count) % 3
    for picture, label in zip(pixels, labels, strict=True):
        top, left = ((2, 2), (2, 18), (18, 2))[label]
        picture[top : top + 8, left : left + 8] += 190
    return pixels, labels


def save(path: Path, level: int) -> None:
    """A grey image of 20x20 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 20), level).save(path)


def lively(generator: Generator) -> Generator:
    """In `eval`, with statistics that give images of some contrast."""
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    torch.nn.init.normal_(generator.blocks.image.conv.weight, std=0.2)
    with torch.no_grad():
        generator(torch.randn(64, generator.nz))
    return generator.eval()


def emoji_font(path: Path) -> Path:
    """A colour font of three emoji, each a square on the same place: a red grinning face, a thumb up in blue, and in
    green one with a light skin tone, which is two code points."""
    glyphs = {"face": 0x1F600, "thumb": 0x1F44D, "light": 0x1F3FB, "both": None}
    square, empty = TTGlyphPen(None), TTGlyphPen(None)
    square.moveTo((100, 0)), square.lineTo((100, 800)), square.lineTo((900, 800)), square.lineTo((900, 0))
    square.closePath()
    font = FontBuilder(1000)
    names = [".notdef", *glyphs, "square"]
    font.setupGlyphOrder(names)
    font.setupCharacterMap({number: name for name, number in glyphs.items() if number})
    shapes = dict.fromkeys(names, square.glyph())
    font.setupGlyf({**shapes, ".notdef": empty.glyph(), "light": empty.glyph()})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.setupCOLR({"face": [("square", 0)], "thumb": [("square", 1)], "both": [("square", 2)]})
    font.setupCPAL([[(1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 0.0, 1.0)]])
    addOpenTypeFeaturesFromString(font.font, "feature ccmp { sub thumb light by both; } ccmp;")
    font.save(path)
    return path


def clouds(count: int, dimensions: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = 3 * np.random.default_rng(9).normal(size=(classes, dimensions))
    return (centres[labels] + random.normal(size=(count, dimensions))).astype(np.float32) + 5, labels + 4


@pytest.fixture
def generator(trained_run: Path) -> Generator:
    return load_generator(trained_run)
