"""`fastdcgan train`: small runs from end to end, resumed and interrupted ones."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.cli import main
from fastdcgan.dcgan import checkpoint, judge, trained
from tests.dcgan.conftest import TINY_OPTIONS

SMALL = [*TINY_OPTIONS, "--batch-size", "16", "--samples", "9"]


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
    assert main(["train", "--out", run, "--resume", "--epochs", "5"]) == 0
    assert "steps 4 to 5" in capsys.readouterr().out
    assert main(["train", str(photos), "--resume"]) == 2
    assert capsys.readouterr().err == "error: --resume names no run: expected --resume RUN, or --out RUN --resume\n"
    assert main(["train", "--resume", run, "--nz", "9"]) == 2
    assert "nz is 9: the checkpoint's is 8" in capsys.readouterr().err


def test_a_preset(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its settings, where no option says otherwise; they stay with the run."""
    run = tmp_path / "run"
    arguments = [*SMALL, "--max-steps", "1", "--out", str(run), "--cache", str(tmp_path / "cache")]
    assert main(["train", str(photos), *arguments, "--preset", "paper", "--lr-d", "1e-4"]) == 0
    config = trained.load_trained(run).config
    assert (config.kernel, config.projection, config.flips, config.real_label) == (5, "linear", False, 1.0)
    assert (config.lr_g, config.lr_d, config.batch_size, config.image_size) == (2e-4, 1e-4, 16, 28)
    assert main(["train", "--resume", str(run), "--max-steps", "2"]) == 0
    assert trained.load_trained(run).step == 2
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--preset", "paper"]) == 2
    assert capsys.readouterr().err.startswith("error: --preset is of a new run: ")
    assert main(["train", "--resume", str(run), "--kernel", "4"]) == 2
    assert "kernel is 4: the checkpoint's is 5, and stays" in capsys.readouterr().err


def endless(run: Path, code: str = "", *options: str) -> list[str]:
    """The command of a run without an end, which runs `code` first."""
    program = f"{code}\nimport sys\nfrom fastdcgan.cli import main\nsys.exit(main(sys.argv[1:]))"
    often = ["--epochs", "1000000", "--sample-every", "1000000", "--checkpoint-every", "1000000", "--log-every", "1"]
    return [sys.executable, "-c", program, "train", "digits", *SMALL, *often, "--out", str(run), *options]


def start(run: Path, code: str = "", *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        endless(run, code, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(run: Path) -> None:
    deadline = time.monotonic() + 60
    while not ((run / "metrics.csv").exists() and (run / "metrics.csv").read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_for_steps(run)
    second = start(run, "", "--resume")
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (2, "")
    assert err.startswith(f"error: {run} is in use by process {process.pid} on ")
    assert err.count("\n") == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    found = re.search(r"Stopped at step (\d+)\. Go on with: fastdcgan train --resume (\S+)", out)
    assert found, out
    assert checkpoint.find(found[2]) == checkpoint.path_at(run, int(found[1]))


def test_a_closed_pipe_saves(tmp_path: Path) -> None:
    """As of `train | head -1`."""
    run = tmp_path / "run"
    process = start(run, "from fastdcgan.dcgan import console\nconsole._SECONDS_BETWEEN_LINES = 0.0")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 130
    assert process.stderr.read() == ""
    assert checkpoint.step_of(checkpoint.find(run)) > 0


def test_a_terminal_that_hangs_up_saves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, endless(run))
    wait_for_steps(run)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert checkpoint.step_of(checkpoint.find(run)) > 0


@pytest.mark.parametrize("full", ["checkpoint", "samples", "metrics"])
def test_a_full_disk(full: str, tmp_path: Path) -> None:
    """One line and exit code 2, and what was saved before goes on afterwards."""
    run = tmp_path / "run"
    # From its second step on the run can write no file, or add to none, that is larger than this.
    limit = {"checkpoint": 50_000, "samples": 1_000, "metrics": 60}[full]
    code = f"""if True:
        import resource
        from fastdcgan.dcgan.training import Trainer
        step = Trainer.train_step
        def limited(self, real):
            if self.step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
            return step(self, real)
        Trainer.train_step = limited"""
    often = {"checkpoint": "--checkpoint-every", "samples": "--sample-every", "metrics": "--log-every"}[full]
    rare = ["--log-every", "1000000"] if full != "metrics" else []
    process = start(run, code, *rare, often, "2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert re.fullmatch(rf"error: {run}/\S+ can't be written: .*File too large.*\n", err)
    before = sorted(path.name for path in run.rglob("*") if path.is_file())
    assert before == [
        ".fastdcgan",
        ".lock",
        "metrics.csv",
        "run.json",
        "step-00000000.png",
        "step-00000000.safetensors",
    ]
    assert (run / "metrics.csv").read_text().count("\n") == 1
    assert main(["train", "--resume", str(run), "--epochs", "1", "--max-steps", "3"]) == 0
    assert checkpoint.step_of(checkpoint.find(run)) == 3


def test_divergence_exits_with_1(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(photos), *SMALL, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--lr-g", "1e30", "--lr-d", "1e30", "--epochs", "30"]) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "lower --lr-g and --lr-d" in err


def test_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands on a conditional run ask for one of its classes, take all of them, or say that they can't."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("cat", "dog", "0")):
        for j in range(12):
            Path("photos", name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (28, 28), 80 * i + j).save(f"photos/{name}/{j}.png")
    small = [*SMALL, "--channels", "1", "--max-steps", "2", "--cache", "cache"]
    assert main(["train", "photos", "--conditional", *small, "--out", "run"]) == 0
    with Image.open("run/samples/step-00000002.png") as picture:
        assert picture.size == (92, 92)

    def pixels(*arguments: str) -> np.ndarray:
        assert main(["sample", "run", "--count", "7", "--device", "cpu", "--out", "out.npy", *arguments]) == 0
        return np.load("out.npy")

    in_turn, *single = pixels(), *(pixels("--class", name) for name in ("0", "cat", "dog"))  # as they are sorted
    for i, images in enumerate(single):
        assert np.array_equal(images[i::3], in_turn[i::3])
    assert not np.array_equal(single[1], single[2])
    capsys.readouterr()
    for line in (
        "interpolate run",
        "interpolate run --arithmetic 1-2",
        "inpaint run --steps 2 --count 2 --cache cache",
    ):
        assert main([*line.split(), "--device", "cpu", "--class", "dog"]) == 0
    monkeypatch.setattr(judge, "train_classifier", lambda pixels, labels, classes, **how: judge.Classifier(1, classes))
    assert main(["evaluate", "run", "--count", "12", "--device", "cpu"]) == 0
    capsys.readouterr()
    for line, message in (
        ("interpolate run", "the generator is of 3 classes: expected one to be chosen (labels, or its attribute"),
        ("inpaint run --steps 2 --cache cache", "the generator is of 3 classes: expected one to be chosen"),
        ("sample run --class cow", "has no class 'cow': expected one of 3: 0, cat, dog"),
        ("sample run --class 3", "has no class '3': expected one of 3: 0, cat, dog"),
        ("sample --per-class a=run --class cat", "--class is of one checkpoint: expected none with --per-class"),
        ("features run", "the discriminator takes a class beside its input, which features have none of"),
        ("style run photos/cat/0.png photos/dog/0.png", "the discriminator takes a class beside its input"),
        (
            "train photos/cat --conditional --out other --cache cache",
            "photos/cat has no classes: expected a folder for",
        ),
    ):
        assert main([*line.split(), "--device", "cpu"]) == 2, line
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error, error
    assert main(["train", "photos", *small, "--out", "plain"]) == 0
    assert main(["sample", "plain", "--class", "cat", "--device", "cpu"]) == 2
    assert "knows no classes, so not 'cat': its run was trained without --conditional" in capsys.readouterr().err
