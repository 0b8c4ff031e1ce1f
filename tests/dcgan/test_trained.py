"""The networks of a trained run, out of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdcgan.dcgan import CheckpointError, checkpoint, load_generator, load_trained


def test_load_trained(trained_run: Path) -> None:
    trained = load_trained(trained_run)
    saved = checkpoint.load(checkpoint.path_at(trained_run, 8))
    assert (trained.step, trained.path) == (8, checkpoint.path_at(trained_run, 8))
    assert (trained.config.nz, trained.config.image_size, trained.config.channels) == (8, 28, 1)
    for net, part in ((trained.generator, "generator"), (trained.discriminator, "discriminator")):
        assert not net.training
        torch.testing.assert_close(net.state_dict(), saved.part(part), rtol=0, atol=0)
    earlier = load_trained(checkpoint.path_at(trained_run, 4))
    assert earlier.step == 4


def test_the_moving_average(trained_run: Path) -> None:
    average = checkpoint.load(checkpoint.find(trained_run)).part("ema")
    for net in (load_trained(trained_run, ema=True).generator, load_generator(trained_run, ema=True)):
        torch.testing.assert_close(net.state_dict(), average, rtol=0, atol=0)
    assert not torch.equal(
        load_generator(trained_run).blocks.image.conv.weight,
        load_generator(trained_run, ema=True).blocks.image.conv.weight,
    )


def test_a_run_without_a_moving_average(trained_run: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(checkpoint.find(trained_run), "generator", "discriminator")
    checkpoint.save(tmp_path / "plain.safetensors", saved)
    load_trained(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="no moving average"):
        load_trained(tmp_path / "plain.safetensors", ema=True)
    with pytest.raises(CheckpointError, match="no moving average"):
        load_generator(tmp_path / "plain.safetensors", ema=True)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_trained(tmp_path / "nowhere")
    (tmp_path / "other.safetensors").write_text("something else")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is damaged"):
        load_trained(tmp_path / "other.safetensors")
