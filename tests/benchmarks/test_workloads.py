"""Workloads beside the DCGAN's step: pix2pix in plain PyTorch, generation, and the step as GANStep runs it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fastdcgan
from fastdcgan.benchmarks import peers, suites
from fastdcgan.benchmarks.end_to_end import _Folder, make_folder, run_end_to_end
from fastdcgan.benchmarks.harness import Timing
from fastdcgan.benchmarks.pix2pix import Pix2PixShape
from fastdcgan.benchmarks.shapes import NetShape
from fastdcgan.dcgan import Batches, load_images
from fastdcgan.layers import FusedSequential
from tests.benchmarks.broken_peers import change_fused, scale_a_weight

CPU = torch.device("cpu")
TINY, IMAGES = NetShape(16, ngf=8, ndf=8), Pix2PixShape(16, width=4)
TIMING = Timing(2, 1e-4)


def test_the_unet_is_pix2pixs() -> None:
    generator, discriminator = Pix2PixShape(64, width=8).nets()
    x = torch.randn(2, 3, 64, 64)
    image = generator(x)
    assert image.shape == x.shape and float(image.detach().abs().max()) <= 1
    assert discriminator(x, image).shape == (2, 1, 14, 14)  # 64 -> 32 -> 16 -> 15 -> 14, patches of 34 pixels
    convs = [m for m in generator.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert [m.out_channels for m in convs] == [8, 16, 32, 64, 64, 64, 64, 64, 32, 16, 8, 3]
    assert [m.in_channels for m in convs[6:]] == [64, 128, 128, 64, 32, 16]
    # Each innermost pixel sees everything: changing one corner changes the other.
    generator.eval().double()
    x = x.double()
    other = x.clone()
    other[:, :, 0, 0] += 1
    assert not torch.equal(generator(other)[:, :, -1, -1], generator(x)[:, :, -1, -1])


def test_fuse_takes_it_as_it_is() -> None:
    generator, discriminator = (fastdcgan.fuse(net) for net in IMAGES.nets())
    assert all(isinstance(m, FusedSequential) for m in (*generator.down, *generator.up, discriminator.net))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pix2pix_peers_agree_and_are_timed(dtype: str) -> None:
    case = suites.run_pix2pix(suites.Contest(["eager", "eager-nhwc", "fused", "train"], CPU, dtype), IMAGES, 4, TIMING)
    assert (case.suite, case.name, case.part) == ("step", "pix2pix 16x16", "step")
    *able, whole = case.rows
    for row in able:
        assert row.status == "ok", row.detail
        assert len(row.samples_ms) == 2 and row.saved_bytes
    assert (whole.status, whole.detail) == ("unavailable", "GANStep is the DCGAN's step")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_generation_peers_agree_and_are_timed(dtype: str) -> None:
    case = suites.run_generate(
        suites.Contest(["eager-nhwc", "folded", "fused", "fused-folded"], CPU, dtype), TINY, 2, TIMING
    )
    assert (case.suite, case.name, case.part) == ("generate", "16x16", "eval")
    for row in case.rows:
        assert row.status == "ok", row.detail
        assert len(row.samples_ms) == 2


def test_wrong_images_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    change_fused(monkeypatch, scale_a_weight)
    plain, fused = suites.run_generate(suites.Contest(["eager-nhwc", "fused"], CPU, "fp32"), TINY, 2, TIMING).rows
    assert (plain.status, fused.status) == ("ok", "wrong")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_whole_step_is_the_plain_one(dtype: str) -> None:
    case = suites.run_step(suites.Contest(["eager-nhwc", "train"], CPU, dtype), TINY, 4, TIMING)
    assert case.reference == "train"
    for row in case.rows:
        assert row.status == "ok", row.detail
        assert len(row.samples_ms) == 2


def test_a_whole_step_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    change_fused(monkeypatch, scale_a_weight)
    plain, whole = suites.run_step(suites.Contest(["eager-nhwc", "train"], CPU, "fp32"), TINY, 4, TIMING).rows
    assert (plain.status, whole.status) == ("ok", "wrong")


def test_training_from_a_folder() -> None:
    case = run_end_to_end(TINY, 4, CPU, "fp32", TIMING, count=9)
    assert (case.suite, case.name, case.reference) == ("step", "16x16 from JPEG", "train")
    assert [row.peer for row in case.rows] == ["eager-nhwc", "train"]
    assert all(row.status == "ok" and len(row.samples_ms) == 2 and row.ms for row in case.rows)
    assert case.rows[1].prepare_s and case.rows[1].prepare_s > 0


def test_both_ways_see_the_same_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    make_folder(tmp_path / "images", 6, 24)
    theirs = torch.stack(list(map(_Folder(tmp_path / "images", 16).__getitem__, range(6))))
    images = load_images(str(tmp_path / "images"), 16, 3, cache_folder=tmp_path / "cache")
    ours = next(Batches(images, 6).stream())
    assert ours.shape == theirs.shape == (6, 3, 16, 16)
    assert -1 <= float(theirs.min()) < 0 < float(theirs.max()) <= 1
    # Each in an order of its own: as sets of pictures.
    torch.testing.assert_close(ours.flatten(1).sum(1).sort().values, theirs.flatten(1).sum(1).sort().values)


def test_inplace_abn_is_a_peer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of its interface, since it needs a GPU."""

    class InPlaceABN(nn.BatchNorm2d):
        def __init__(self, features, eps, momentum, affine, activation, activation_param) -> None:
            assert activation == "leaky_relu"
            super().__init__(features, eps, momentum, affine)
            self.slope = activation_param

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.leaky_relu(super().forward(x), self.slope)

    if importlib.util.find_spec("inplace_abn") is None:
        absent = suites.run_step(suites.Contest(["eager", "inplace-abn"], CPU, "fp32"), TINY, 4, TIMING).rows[1]
        assert (absent.status, absent.detail) == ("unavailable", "the package inplace_abn is not installed")
        assert "inplace-abn" not in peers.default_peers(CPU, "fp32")
    package = ModuleType("inplace_abn")
    package.InPlaceABN = InPlaceABN  # type: ignore[attr-defined]
    package.__spec__ = importlib.util.spec_from_loader("inplace_abn", None)
    monkeypatch.setitem(sys.modules, "inplace_abn", package)
    assert "inplace-abn" in peers.default_peers(CPU, "fp32")
    discriminator = peers.PEERS["inplace-abn"].transform(TINY.nets()[1], CPU, torch.float32)
    assert sum(isinstance(m, InPlaceABN) for m in discriminator) == 1
    row = suites.run_step(suites.Contest(["eager", "inplace-abn"], CPU, "fp32"), TINY, 4, TIMING).rows[1]
    assert row.status == "ok", row.detail
