"""Checkpoints: whole or not at all, nothing unpickled, damaged ones refused."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from fastdcgan.dcgan import CheckpointError, Images, TrainConfig, Trainer, checkpoint, tensor_files


def test_checkpoint_appears_whole_or_not_at_all(
    config: TrainConfig, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config, images)
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, trainer._checkpoint())
    before = path.read_bytes()

    def disk_full(tensors: dict, target: Path, metadata: dict) -> None:
        Path(target).write_bytes(before[:1000])
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, trainer._checkpoint())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_loading_unpickles_nothing(config: TrainConfig, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(dataclasses.replace(config, max_steps=1), images).run()

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert Trainer.resume(run.out, images).step == 1


@pytest.mark.parametrize("damage", ["cut", "header", "pickle", "foreign", "empty"])
def test_damaged_checkpoints(damage: str, config: TrainConfig, images: Images) -> None:
    run = Trainer(dataclasses.replace(config, max_steps=1), images).run()
    path = checkpoint.find(run.out)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "header":
        path.write_bytes(data[:8] + b"x" * 50 + data[58:])
    elif damage == "pickle":
        torch.save({"generator": torch.zeros(1)}, path)
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=path.name):
        Trainer.resume(path, images)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        Trainer.resume(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        Trainer.resume(tmp_path)
