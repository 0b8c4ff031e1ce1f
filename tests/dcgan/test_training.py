"""Runs: resumed ones to the same bits, stopped ones, diverging ones, and what they write."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdcgan.dcgan import (
    CheckpointError,
    Diverged,
    Images,
    Labelled,
    StepMetrics,
    TrainConfig,
    Trainer,
    checkpoint,
    load_generator,
    load_trained,
    sample,
)
from fastdcgan.dcgan.metrics import Watch, read_metrics


def with_out(config: TrainConfig, out: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, out=str(out), **changes)


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits: weights, moments, random states, counters."""
    x, y = checkpoint.load(a), checkpoint.load(b)
    assert x.tensors.keys() == y.tensors.keys()
    for key, value in x.tensors.items():
        assert torch.equal(value, y.tensors[key]), key
    ignored = {"config", "run"}  # the folders differ
    assert {k: v for k, v in x.state.items() if k not in ignored} == {
        k: v for k, v in y.state.items() if k not in ignored
    }


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (7, {}),  # in the middle of the second epoch
        (10, {"projection": "linear"}),  # between epochs
        (3, {"precision": "bf16", "gradient_penalty": 1.0, "image_size": 32}),
        (4, {"precision": "fp16"}),
    ],
    ids=["mid-epoch", "epoch", "bf16-penalty", "fp16"],
)
def test_resumed_is_uninterrupted(
    stop: int, changes: dict, config: TrainConfig, images: Images, tmp_path: Path
) -> None:
    if "image_size" in changes:
        images = Images(images.array.repeat(2, axis=1).repeat(2, axis=2)[:, :32, :32])
    config = dataclasses.replace(config, log_every=4)
    whole = Trainer(with_out(config, tmp_path / "whole", **changes), images)
    assert whole.run().step == 15

    first = Trainer(with_out(config, tmp_path / "parts", max_steps=stop, **changes), images)
    assert first.run().step == stop
    torch.rand(3)  # other work in between
    second = Trainer.resume(tmp_path / "parts", images, max_steps=0)
    assert second.step == stop
    assert second.run().step == 15
    assert_same(checkpoint.find(tmp_path / "whole"), checkpoint.find(tmp_path / "parts"))
    last = "samples/step-00000015.png"
    assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "parts" / last).read_bytes()
    # The lines of the log too, but for the speed.
    logs = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "parts")]
    for row in (*logs[0], *logs[1]):
        del row["images_per_second"]
    assert logs[0] == logs[1]


def test_resume_from_an_older_checkpoint_replaces_later_ones(
    config: TrainConfig, images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer(dataclasses.replace(config, checkpoint_every=4), images).run()
    again = Trainer.resume(checkpoint.path_at(run.out, 8), images, max_steps=9)
    assert "takes the place of step-00000012, step-00000015" in capsys.readouterr().out
    assert checkpoint.find(run.out) == checkpoint.path_at(run.out, 15)  # nothing is lost before it is replaced
    again.run()
    assert checkpoint.all_of(run.out) == [checkpoint.path_at(run.out, step) for step in (8, 9)]
    assert [path.name for path in sorted((run.out / "samples").iterdir())][-2:] == [
        "step-00000005.png",
        "step-00000009.png",
    ]
    assert [row["step"] for row in read_metrics(run.out / "metrics.csv")] == list(range(1, 10))


def test_resume_takes_changed_settings(
    config: TrainConfig, images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(dataclasses.replace(config, max_steps=2), images).run()
    trainer = Trainer.resume(config.out, images, lr_g=0.5, beta1=0.7)
    assert "Changed from here on: lr_g is 0.5 (was 0.0002), beta1 is 0.7 (was 0.5)\n" in capsys.readouterr().out
    assert trainer.optimizer_g.param_groups[0]["lr"] == 0.5
    assert trainer.optimizer_d.param_groups[0]["lr"] == config.lr_d
    assert trainer.optimizer_d.param_groups[0]["betas"] == (0.7, config.beta2)
    with pytest.raises(ValueError, match="ngf is 5: the checkpoint's is 4"):
        Trainer.resume(config.out, images, ngf=5)
    for name, value in (("holdout", 5), ("seed", 1), ("samples", 9)):
        before = getattr(config, name)
        with pytest.raises(ValueError, match=f"{name} is {value}: the checkpoint's is {before}, and stays"):
            Trainer.resume(config.out, images, **{name: value})
    with pytest.raises(CheckpointError, match=r"was trained on 45 images: .*squares has 44 now"):
        Trainer.resume(config.out, Images(images.array[:44]))
    moved = tmp_path / "moved"
    Path(config.out).rename(moved)
    assert Trainer.resume(moved, images).out == moved


def test_resume_with_another_batch_size(config: TrainConfig, images: Images) -> None:
    """What is left of the epoch is trained on, in batches of the new size; epochs stay passes over the data."""
    Trainer(dataclasses.replace(config, max_steps=3), images).run()
    trainer = Trainer.resume(config.out, images, batch_size=20, max_steps=0)
    assert trainer.batches.position == 24
    assert trainer.total_steps == 3 + 1 + 2 * 2
    assert trainer.run().step == 8
    assert trainer.batches.epoch == 3


def test_resume_of_a_finished_run(config: TrainConfig, images: Images, capsys: pytest.CaptureFixture[str]) -> None:
    run = Trainer(dataclasses.replace(config, max_steps=3, log_every=2), images).run()
    before = {path: path.read_bytes() for path in run.out.rglob("*") if path.suffix in (".csv", ".safetensors")}
    for changes in ({"epochs": 9}, {"max_steps": 2}, {"max_steps": 0, "epochs": 1, "batch_size": 23}):
        with pytest.raises(
            ValueError, match=rf"is finished at step 3: epochs is {changes.get('epochs', 3)}, max_steps"
        ):
            Trainer.resume(run.out, images, **changes)
    assert Trainer.resume(run.out, images).run() == run
    assert "is finished at step 3: epochs is 3, max_steps is 3. Nothing is left to do." in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}
    assert Trainer.resume(run.out, images, max_steps=4).run().step == 4


class Killed(Trainer):
    """Ends without a word after the given step."""

    after = 7

    def train_step(self, real: Tensor) -> StepMetrics:
        if self.step == self.after:
            raise KeyboardInterrupt
        return super().train_step(real)


@pytest.mark.parametrize("after", [0, 2, 7])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    after: int, config: TrainConfig, images: Images, tmp_path: Path
) -> None:
    """Also before its first checkpoint but that of the start; the log's lines average over the same steps."""
    settings = {"checkpoint_every": 3, "log_every": 4, "epochs": 2}
    Trainer(with_out(config, tmp_path / "whole", **settings), images).run()
    killed = Killed(with_out(config, tmp_path / "killed", **settings), images)
    killed.after = after
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    with pytest.raises(ValueError, match="holds a run already: expected a new folder, or that run to be resumed"):
        Trainer(killed.config, images)
    resumed = Trainer.resume(killed.out, images)
    assert resumed.step == after // 3 * 3
    resumed.run()
    assert_same(checkpoint.find(tmp_path / "whole"), checkpoint.find(killed.out))
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "killed")]
    for row in (*rows[0], *rows[1]):
        del row["images_per_second"]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [4, 8, 10]
    assert checkpoint.all_of(killed.out) == [checkpoint.path_at(killed.out, step) for step in (6, 9, 10)]


def test_a_folder_without_checkpoints_is_begun_anew(config: TrainConfig, images: Images) -> None:
    out = Path(config.out)
    (out / "checkpoints").mkdir(parents=True)
    (out / "metrics.csv").write_text("step,epoch\n1,")
    assert Trainer(dataclasses.replace(config, max_steps=1), images).run().step == 1
    assert [row["step"] for row in read_metrics(out / "metrics.csv")] == [1]


class Second(Trainer):
    """Somebody starts the run a second time while it is at its second step."""

    def train_step(self, real: Tensor) -> StepMetrics:
        if self.step == 1:
            message = f"is in use by process {os.getpid()} on"
            with pytest.raises(BlockingIOError, match=message):
                Trainer.resume(self.out, self.images)
            with pytest.raises(BlockingIOError, match=message):
                self.other.run()
        return super().train_step(real)


def test_a_folder_belongs_to_one_run_at_a_time(config: TrainConfig, images: Images) -> None:
    run = Second(config, images)
    run.other = Trainer(config, images)
    assert run.run().step == 15
    with pytest.raises(ValueError, match="holds another run since this one was set up: resume that one"):
        run.other.run()
    assert Trainer.resume(config.out, images).step == 15


def test_a_new_run_does_not_overwrite_another(config: TrainConfig, images: Images) -> None:
    Trainer(dataclasses.replace(config, max_steps=1), images).run()
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(config, images)
    other = dataclasses.replace(config, out=f"{config.out}-2", max_steps=1)
    Trainer(other, images).run()
    with pytest.raises(ValueError, match="run-2 holds a run already"):
        Trainer.resume(config.out, images, out=other.out)


def test_same_seed_same_bits(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        Trainer(with_out(config, tmp_path / name, seed=seed, max_steps=3), images).run()
    a, b, c = (checkpoint.find(tmp_path / name) for name in "abc")
    assert_same(a, b)
    assert not torch.equal(
        checkpoint.load(a).tensors["generator/blocks.image.conv.weight"],
        checkpoint.load(c).tensors["generator/blocks.image.conv.weight"],
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_the_test_device(precision: str, config: TrainConfig, images: Images, device: torch.device) -> None:
    """On a GPU, where there is one, as well: trains, saves, goes on."""
    settings = {"device": str(device), "precision": precision, "gradient_penalty": 1.0, "penalty_kind": "r1"}
    outcome = Trainer(dataclasses.replace(config, max_steps=7, **settings), images).run()
    again = Trainer.resume(outcome.out, images, max_steps=9)
    assert next(again.generator.parameters()).device.type == device.type
    assert again.run().step == 9
    assert again.sample(torch.zeros(2, 8)).isfinite().all()


# --- stopping --------------------------------------------------------------------------------------------------------


class Interrupting(Trainer):
    """Gets a signal during its third step."""

    number = signal.SIGINT
    times = 1

    def train_step(self, real: Tensor) -> StepMetrics:
        if self.step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().train_step(real)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves(
    number: signal.Signals, config: TrainConfig, images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    trainer = Interrupting(config, images)
    trainer.number = number
    outcome = trainer.run()
    assert (outcome.reason, outcome.step) == ("interrupted", 3)
    assert checkpoint.find(outcome.out) == checkpoint.path_at(outcome.out, 3)
    assert "Stopping after this step" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert Trainer.resume(outcome.out, images).run().step == 15


def test_what_nohup_ignores_stays_ignored(config: TrainConfig, images: Images) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = Interrupting(config, images)
        trainer.number = signal.SIGHUP
        assert trainer.run().reason == "finished"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_signal_stops_at_once(config: TrainConfig, images: Images) -> None:
    trainer = Interrupting(config, images)
    trainer.times = 2
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert checkpoint.all_of(config.out) == [checkpoint.path_at(config.out, 0)]  # from the start


def test_time_limit(config: TrainConfig, images: Images) -> None:
    outcome = Trainer(dataclasses.replace(config, max_minutes=1e-9), images).run()
    assert (outcome.reason, outcome.step) == ("time", 1)
    assert checkpoint.find(outcome.out) == checkpoint.path_at(outcome.out, 1)


# --- divergence ------------------------------------------------------------------------------------------------------


class Poisoned(Trainer):
    """One weight becomes NaN before the eighth step."""

    def train_step(self, real: Tensor) -> StepMetrics:
        if self.step == 7:
            with torch.no_grad():
                self.discriminator.blocks.image.conv.weight[0, 0, 0, 0] = float("nan")
        return super().train_step(real)


def test_nan_stops_and_keeps_the_last_good_checkpoint(config: TrainConfig, images: Images) -> None:
    # Logged every 10 steps, saved every 4: the NaN is found before a checkpoint is written, not with the log.
    trainer = Poisoned(dataclasses.replace(config, log_every=10, checkpoint_every=4), images)
    with pytest.raises(Diverged, match=r"at step 8\. .*lower --lr-g"):
        trainer.run()
    assert checkpoint.all_of(config.out) == [checkpoint.path_at(config.out, 4)]
    assert all(v.isfinite().all() for v in checkpoint.load(checkpoint.find(config.out)).tensors.values())


def test_a_loss_that_is_not_finite_stops(config: TrainConfig, images: Images) -> None:
    trainer = Poisoned(dataclasses.replace(config, checkpoint_every=100), images)
    with pytest.raises(Diverged, match="loss_d is nan at step 8"):
        trainer.run()
    assert [row["step"] for row in read_metrics(Path(config.out) / "metrics.csv")] == list(range(1, 9))


def test_d_winning_is_said_once(
    config: TrainConfig, images: Images, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A generator that hardly learns, against a discriminator that learns fast."""
    monkeypatch.setattr(Watch, "PATIENCE", 4)
    settings = {"lr_g": 1e-9, "lr_d": 5e-3, "epochs": 12}
    Trainer(dataclasses.replace(config, **settings), images).run()
    said = capsys.readouterr().out
    assert said.count("has been winning for 4 steps") == 1
    assert "--lr-d" in said


def test_watch_counts_consecutive_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "PATIENCE", 3)
    winning = {"loss_d": 0.3, "loss_g": 6.0, "d_real": 0.895, "d_fake": 0.005}
    even = winning | {"d_fake": 0.3}
    unsure = winning | {"d_real": 0.5}
    watch = Watch(0.9)
    steps = [winning, winning, even, winning, unsure, winning, winning, winning]
    said = [watch.look(values, step) for step, values in enumerate(steps)]
    assert said[:-1] == [None] * 7
    assert "at step 7" in str(said[-1])
    assert all(watch.look(winning, i) is None for i in range(10))
    for name, value in (("loss_d", float("inf")), ("loss_g", float("nan"))):
        with pytest.raises(Diverged, match=f"{name} is {value} at step 5"):
            watch.look(even | {name: value}, 5)


# --- what a run writes -----------------------------------------------------------------------------------------------


def test_files_of_a_run(config: TrainConfig, images: Images) -> None:
    run = Trainer(dataclasses.replace(config, keep=2, log_every=4, sample_every=5, tensorboard=True), images).run()
    assert (run.reason, run.step) == ("finished", 15)
    assert [path.name for path in checkpoint.all_of(run.out)] == [f"step-{n:08}.safetensors" for n in (10, 15)]
    pictures = sorted((run.out / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step-{n:08}.png" for n in (0, 5, 10, 15)]
    with Image.open(pictures[-1]) as picture:
        assert picture.size == (62, 62)
        assert picture.mode == "L"
    with Image.open(run.out / "samples.gif") as animation:
        assert animation.n_frames == 4
    with Image.open(run.out / "losses.png") as plot:
        assert plot.width > 500
    assert list((run.out / "tensorboard").glob("events.*"))
    text = (run.out / "metrics.csv").read_text().splitlines()
    assert text[0] == "step,epoch,loss_d,loss_g,d_real,d_fake,d_fake_after,penalty,images_per_second"
    rows = read_metrics(run.out / "metrics.csv")
    assert [(row["step"], row["epoch"]) for row in rows] == [(4, 0), (8, 1), (12, 2), (15, 3)]
    assert all(0 < row["d_real"] < 1 and row["images_per_second"] > 0 for row in rows)
    assert not [path for path in run.out.rglob("*") if path.name.endswith(".tmp")]


def test_samples_change_nothing(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    often = Trainer(with_out(config, tmp_path / "often", sample_every=1), images).run()
    rarely = Trainer(with_out(config, tmp_path / "rarely", sample_every=100), images).run()
    assert_same(checkpoint.find(often.out), checkpoint.find(rarely.out))


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:77"])
def test_devices_are_checked(device: str, config: TrainConfig, images: Images) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}'"):
        Trainer(dataclasses.replace(config, device=device), images)


# --- averages and parts ----------------------------------------------------------------------------------------------


def test_the_average_of_the_generator_is_kept_and_goes_on(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    whole = Trainer(with_out(config, tmp_path / "whole", ema=0.9, max_steps=6), images)
    whole.run()
    Trainer(with_out(config, tmp_path / "parts", ema=0.9, max_steps=3), images).run()
    Trainer.resume(tmp_path / "parts", images, max_steps=6).run()
    assert_same(checkpoint.find(tmp_path / "whole"), checkpoint.find(tmp_path / "parts"))
    saved = checkpoint.load(checkpoint.find(tmp_path / "whole"))
    average, weights = saved.part("ema"), saved.part("generator")
    assert average.keys() == weights.keys()
    assert any(not torch.equal(value, weights[key]) for key, value in average.items())


def test_an_average_that_begins_late_begins_with_the_weights(
    config: TrainConfig, images: Images, tmp_path: Path
) -> None:
    Trainer(with_out(config, tmp_path / "run", max_steps=2), images).run()
    resumed = Trainer.resume(tmp_path / "run", images, ema=0.99)
    average = resumed._gan_step.ema
    assert average is not None
    for (key, value), weight in zip(average.state_dict().items(), resumed.generator.state_dict().values(), strict=True):
        assert torch.equal(value, weight), key


def test_a_batch_in_parts(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accumulate is 3: expected a divisor of the batch size, \d"):
        dataclasses.replace(config, accumulate=3)
    trainer = Trainer(with_out(config, tmp_path / "run", accumulate=2, max_steps=2), images)
    assert trainer.run().reason == "finished"


# --- classes ---------------------------------------------------------------------------------------------------------


def test_a_conditional_run(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    """It goes on to the same bits, on the same classes alone, and its checkpoints have their names."""
    labelled = Labelled(images, np.arange(45) % 3, ["cat", "dog", "1"])
    config = dataclasses.replace(config, conditional=True, max_steps=5)
    Trainer(with_out(config, tmp_path / "whole"), labelled).run()
    Trainer(with_out(config, tmp_path / "parts", max_steps=3), labelled).run()
    Trainer.resume(tmp_path / "parts", labelled, max_steps=5).run()
    assert_same(checkpoint.find(tmp_path / "whole"), checkpoint.find(tmp_path / "parts"))
    assert load_trained(tmp_path / "whole").classes == ("cat", "dog", "1")

    other = dataclasses.replace(labelled, classes=["cat", "dog", "cow"])
    with pytest.raises(CheckpointError, match=r"was trained on other classes than those that .* has now"):
        Trainer.resume(tmp_path / "whole", other, max_steps=6)
    with pytest.raises(ValueError, match="conditional is False: the checkpoint's is True, and stays"):
        Trainer.resume(tmp_path / "whole", labelled, conditional=False)
    with pytest.raises(ValueError, match="conditional needs images with classes"):
        Trainer(with_out(config, tmp_path / "none"), images)


def test_a_class_is_learned(config: TrainConfig, tmp_path: Path) -> None:
    """Of white and black images the generator soon makes one when asked for one, and the other when asked for that."""
    array = np.repeat(np.array([0, 255], np.uint8), 16)[:, None, None, None] * np.ones((1, 28, 28, 1), np.uint8)
    labelled = Labelled(Images(array), np.repeat([0, 1], 16), ["black", "white"])
    config = with_out(config, tmp_path / "run", nz=2, conditional=True, max_steps=60, epochs=60, lr_g=2e-3, lr_d=2e-3)
    Trainer(config, labelled).run()
    black, white = (sample(load_generator(tmp_path / "run", label=name), 8).mean() for name in labelled.classes)
    assert white - black > 0.5
