"""Settings that make no sense."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastdcgan.dcgan import TrainConfig
from fastdcgan.dcgan.config import PRESETS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 48}, "image_size is 48: expected one of 28, 32, 64, 128, 256"),
        ({"kernel": 3}, "kernel is 3: expected one of 4, 5"),
        ({"channels": 2}, "channels is 2: expected one of 1, 3"),
        ({"precision": "fp8"}, "precision is 'fp8': expected one of fp32, bf16, fp16"),
        ({"penalty_kind": "r2"}, "penalty_kind is 'r2'"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"lr_g": 0.0}, "lr_g is 0.0: expected more than 0"),
        ({"lr_d": float("nan")}, "lr_d is nan: expected more than 0"),
        ({"holdout": 1}, "holdout is 1: expected 0 for none, or at least 2"),
        ({"beta1": 1.0}, "beta1 is 1.0: expected at least 0 and below 1"),
        ({"real_label": 0.5}, "real_label is 0.5: expected more than 0.5 and at most 1"),
        ({"gradient_penalty": -1.0}, "gradient_penalty is -1.0: expected at least 0"),
        ({"gradient_penalty": float("nan")}, "gradient_penalty is nan: expected at least 0"),
        ({"max_minutes": float("inf")}, "max_minutes is inf: expected at least 0 and at most 1e"),
        ({"lr_g": float("inf")}, "lr_g is inf: expected more than 0"),
        ({"beta2": -0.1}, "beta2 is -0.1: expected at least 0 and below 1"),
        ({"holdout": 10**21}, f"holdout is {10**21}: expected at least 0 and at most 2147483647"),
        ({"epochs": 10**400}, "expected at least 1 and at most 2147483647"),
        ({"seed": -1}, "seed is -1: expected at least 0 and at most 4294967295"),
        ({"ngf": 10**6}, "ngf is 1000000: expected at least 1 and at most 16384"),
        ({"samples": 10_001}, "samples is 10001: expected at least 1 and at most 10000"),
        ({"sync_bn": True, "gradient_penalty": 1.0}, "sync_bn and gradient_penalty don't go together"),
    ],
)
def test_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngf": "4"}, "ngf is '4': expected a whole number"),
        ({"epochs": 2.5}, "epochs is 2.5: expected a whole number"),
        ({"keep": True}, "keep is True: expected a whole number"),
        ({"lr_g": None}, "lr_g is None: expected a number"),
        ({"out": 3}, "out is 3: expected str"),
        ({"flips": "no"}, "flips is 'no': expected bool | None"),
        ({"channels": [1]}, r"channels is \[1\]: expected int"),
    ],
)
def test_types_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TrainConfig(**changes)


def test_every_number_has_a_range() -> None:
    """Or choices: no setting is taken as it comes."""
    for field in dataclasses.fields(TrainConfig):
        if field.type in ("int", "float"):
            assert "range" in field.metadata or "choices" in field.metadata, field.name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(name: str) -> None:
    """And none of them says where a run reads or writes, or what it runs on."""
    config = TrainConfig(**PRESETS[name])
    assert all(getattr(config, key) == value for key, value in PRESETS[name].items())
    assert not PRESETS[name].keys() & {"data", "out", "cache", "device", "workers", "seed"}


def test_settings_that_depend_on_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits = TrainConfig(data="mnist").resolved()
    assert (digits.image_size, digits.channels, digits.flips, digits.out) == (32, 1, False, "runs/mnist-32")
    Path("runs/mnist-32").mkdir(parents=True)
    assert TrainConfig(data="mnist").resolved().out == "runs/mnist-32-2"
    photos = TrainConfig(data=str(tmp_path / "photos")).resolved()
    assert (photos.image_size, photos.channels, photos.flips, photos.out) == (64, 3, True, "runs/photos-64")
    crops = TrainConfig(data="photo-crops").resolved()
    assert (crops.image_size, crops.channels, crops.flips, crops.out) == (64, 3, True, "runs/photo-crops-64")
    people = TrainConfig(data="emoji-people:font.ttf").resolved()
    assert (people.image_size, people.channels, people.flips, people.out) == (64, 3, True, "runs/emoji-people-64")
    assert people.data == f"emoji-people:{tmp_path / 'font.ttf'}"
    long = TrainConfig(data=str(tmp_path / ("x" * 255))).resolved()
    assert long.out == f"runs/{'x' * 200}-64"
    assert TrainConfig(data="mnist", flips=True, image_size=28).resolved().flips is True
    with pytest.raises(ValueError, match="no data given"):
        TrainConfig().resolved()
