"""Checkpoints: whole or not at all, nothing unpickled, damaged ones refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastdcgan.cli import main
from fastdcgan.dcgan import CheckpointError, Images, TrainConfig, Trainer, checkpoint, load_trained, tensor_files


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


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_is_found(run: Path) -> None:
    path = checkpoint.find(run)
    whole = path.read_bytes()
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    random = np.random.default_rng(0)
    bits = [*random.integers(0, header, 60), *random.integers(header, 8 * len(whole), 60), 8 * len(whole) - 1]
    for bit in bits:
        flip(path, int(bit))
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.load(path, "generator")
        path.write_bytes(whole)
    checkpoint.load(path)


def test_a_damaged_newest_checkpoint_is_passed_over(
    run: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 3):
        flip(checkpoint.path_at(run, step), 8 * 20_000)
    assert load_trained(run).step == 1
    said = capsys.readouterr().out
    assert said.count("Passed over: ") == 2
    assert "step-00000003.safetensors is damaged" in said
    resumed = Trainer.resume(run)
    assert resumed.step == 1
    resumed.run()
    again = [checkpoint.load(checkpoint.path_at(place, 3)).part("generator") for place in (run, finished_run)]
    torch.testing.assert_close(*again, rtol=0, atol=0)
    flip(checkpoint.path_at(run, 2), 8 * 20_000)
    with pytest.raises(CheckpointError, match="step-00000002"):  # but not if it is the one that was named
        load_trained(checkpoint.path_at(run, 2))


def test_all_checkpoints_damaged(run: Path) -> None:
    for path in checkpoint.all_of(run):
        flip(path, 8 * 20_000)
    with pytest.raises(CheckpointError, match=r"step-00000003\.safetensors is damaged"):
        Trainer.resume(run)


def rewrite_as_version_1(path: Path) -> None:
    """As it was before there were checksums, records and positions in images."""
    saved = checkpoint.load(path)
    state = {key: value for key, value in saved.state.items() if key != "run"}
    state["data"] = {**state["data"], "position": state["data"]["position"] // state["config"]["batch_size"]}
    save_file(saved.tensors, path, {"format": checkpoint.FORMAT, "version": "1", "state": json.dumps(state)})


def test_runs_without_checksums_go_on(run: Path, finished_run: Path) -> None:
    for path in checkpoint.all_of(run):
        rewrite_as_version_1(path)
    (run / "run.json").unlink()
    middle = checkpoint.path_at(run, 1)
    assert load_trained(middle).step == 1
    Trainer.resume(middle).run()
    again = [checkpoint.load(checkpoint.path_at(place, 3)).part("generator") for place in (run, finished_run)]
    torch.testing.assert_close(*again, rtol=0, atol=0)
    assert checkpoint.load(middle).state["data"]["position"] == 8


# --- whose folder ----------------------------------------------------------------------------------------------------


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_does_not_choose_where_to_write(
    run: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither one that was sent by somebody, which names another run's folder, nor one among a run's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    saved = checkpoint.load(checkpoint.find(run))
    saved.state["config"] |= {"out": str(run), "cache": str(tmp_path / "evil"), "data": str(tmp_path), "max_steps": 5}
    sent, photos = tmp_path / "sent.safetensors", str(finished_run.parent / "photos")
    checkpoint.save(sent, saved)
    checkpoint.save(checkpoint.find(run), saved)
    before = contents(run)
    for given, lacking in (({}, "expected an out"), ({"out": str(tmp_path / "mine")}, "expected data")):
        with pytest.raises(CheckpointError, match=rf"sent\.safetensors is not in its run's folder: {lacking}"):
            Trainer.resume(sent, **given)
    assert main(["evaluate", str(sent), "--count", "10", "--device", "cpu"]) == 2
    assert "sent.safetensors is not in its run's folder" in capsys.readouterr().err
    assert contents(run) == before
    assert Trainer.resume(sent, out=str(tmp_path / "mine"), data=photos).run().step == 5
    assert contents(run) == before
    assert checkpoint.find(tmp_path / "mine") == checkpoint.path_at(tmp_path / "mine", 5)

    own = Trainer.resume(run)  # on the data that the run's folder names
    assert own.config.data == photos
    assert own.run().out == run
    assert "used if it is named again" in capsys.readouterr().out
    assert not (tmp_path / "evil").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "sent.safetensors", "mine", "user"}


def test_a_run_that_was_moved(run: Path, finished_run: Path, tmp_path: Path) -> None:
    """It goes on where it is, on data that is where its user says."""
    run.rename(tmp_path / "elsewhere")
    shutil.copytree(finished_run.parent / "photos", tmp_path / "pictures")
    (tmp_path / "elsewhere" / "run.json").write_text(
        (tmp_path / "elsewhere" / "run.json").read_text().replace("photos", "gone")
    )
    with pytest.raises(ValueError, match="gone is no folder"):
        Trainer.resume(tmp_path / "elsewhere", max_steps=4)
    outcome = Trainer.resume(tmp_path / "elsewhere", max_steps=4, data=str(tmp_path / "pictures")).run()
    assert (outcome.out, outcome.step) == (tmp_path / "elsewhere", 4)
    assert Trainer.resume(outcome.out).config.data == str(tmp_path / "pictures")


def test_other_runs_checkpoints_are_left_alone(run: Path, finished_run: Path, tmp_path: Path) -> None:
    """A run goes on in the folder of another one neither by a file put there, nor by being told so."""
    photos = str(finished_run.parent / "photos")
    other = Trainer.resume(checkpoint.find(run), out=str(tmp_path / "other"), data=photos, max_steps=4).run()
    theirs = checkpoint.path_at(run, 0)
    shutil.copyfile(checkpoint.find(other.out), theirs)
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"step-00000000\.safetensors is not in its run's folder"):
        Trainer.resume(theirs, max_steps=9)
    for place in (theirs, checkpoint.path_at(run, 1)):
        with pytest.raises(CheckpointError, match="is of another run"):
            Trainer.resume(place, max_steps=9, out=str(run), data=photos)
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer.resume(checkpoint.find(other.out), max_steps=9, out=str(run), data=photos)
    assert contents(run) == before


def test_checkpoints_without_their_folder(run: Path, finished_run: Path, tmp_path: Path) -> None:
    """A folder that has nothing but checkpoints is their run's if its user says so."""
    (tmp_path / "copied").mkdir()
    (run / "checkpoints").rename(tmp_path / "copied" / "checkpoints")
    photos = str(finished_run.parent / "photos")
    with pytest.raises(CheckpointError, match="expected an out"):
        Trainer.resume(tmp_path / "copied")
    (tmp_path / "copied" / "run.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="expected an out"):
        Trainer.resume(tmp_path / "copied")
    outcome = Trainer.resume(tmp_path / "copied", out=str(tmp_path / "copied"), data=photos, max_steps=4).run()
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(outcome.out)] == [2, 3, 4]
    assert Trainer.resume(outcome.out).step == 4


def test_samples_of_others_are_left_alone(finished_run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "new" / "samples" / "step-00000100.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    place, photos = checkpoint.path_at(finished_run, 1), str(finished_run.parent / "photos")
    Trainer.resume(place, out=str(tmp_path / "new"), data=photos, max_steps=2).run()
    assert mine.read_bytes() == b"mine"
