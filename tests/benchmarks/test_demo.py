"""The demo: everything that it makes, and that it ends in time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fastdcgan.benchmarks import demo as whole
from fastdcgan.cli import main
from fastdcgan.dcgan import demo
from tests.machine import needs_mnist


def test_demo_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "files that are not of a demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@needs_mnist
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything of the demo, with few steps and narrow networks; and a second one over the first."""
    monkeypatch.setattr(demo, "WIDTH", 4)
    monkeypatch.setattr(demo, "MOST_STEPS", 6)
    monkeypatch.setattr(whole, "_COMPARE_SHARE", 0.02)
    out = tmp_path / "demo"
    for _ in range(2):
        assert main(["demo", "--out", str(out), "--minutes", "0.5", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    lines = said.strip().splitlines()
    assert lines[-1] == str(out)
    for start in ("|---|", "| fp32 |", "| bf16 |"):  # a table each time
        assert sum(line.startswith(start) for line in lines) == 2
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
    monkeypatch.setattr(whole, "_COMPARE_SHARE", 0.02)
    monkeypatch.setattr(demo, "_CLOSING_SECONDS", 25.0)  # of 30: hardly any left to train in
    began = time.monotonic()
    outcome = whole.run(demo.DemoSettings(tmp_path / "demo", 0.5, "cpu"))
    assert time.monotonic() - began < 30
    assert 1 <= outcome.step < demo.MOST_STEPS
    assert "training steps fit into 0.5 minutes here" in capsys.readouterr().out
