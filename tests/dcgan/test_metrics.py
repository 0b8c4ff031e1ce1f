"""metrics.csv: continued, damaged, and its speeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdcgan.dcgan import metrics
from fastdcgan.dcgan.distributed import Processes
from fastdcgan.dcgan.metrics import HEADER, MetricsLog, read_metrics
from fastdcgan.train_step import StepMetrics

ROWS = [f"{step},0,1,2,0.5,0.5,0.5,0,800\n" for step in (1, 2, 3)]


def values(x: float) -> StepMetrics:
    return StepMetrics(*torch.full((len(StepMetrics._fields),), x))


@pytest.mark.parametrize(
    ("content", "steps", "bad"),
    [
        (f"\ufeff{HEADER}\r\n{ROWS[0]}{ROWS[1]}", [1, 2], 0),
        (f"{HEADER}\n{ROWS[0]}{ROWS[1]}3,0,1,2,0.", [1, 2], 1),
        (f"{HEADER}\n{ROWS[0]}\0\0\0\0\n{ROWS[1]}{ROWS[2]}", [1, 2, 3], 1),
        (f"step,epo\n{ROWS[0]}step,epo,x\n\n{ROWS[1]}", [1, 2], 3),
        (f"{HEADER}\nnan{ROWS[0][1:]}1e999{ROWS[0][1:]}{ROWS[1].replace('800', 'nan')}", [2], 2),
        ("", [], 0),
        ("\x89PNG\udcff\n", [], 1),
    ],
    ids=["bom", "cut", "zeros", "header", "no steps", "empty", "binary"],
)
def test_a_log_never_stops_a_run(
    content: str, steps: list[int], bad: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    log = MetricsLog(tmp_path, 8, Processes())
    log.start(3)
    said = capsys.readouterr().out
    assert (f"{path}: {bad} lines can't be read and are left out" in said) == (bad > 0)
    assert [row["step"] for row in read_metrics(path)] == steps
    assert path.read_text().startswith(f"{HEADER}\n")
    log.add(values(1.5))
    log.flush(4, 0)
    assert [row["step"] for row in read_metrics(path)] == [*steps, 4]
    assert capsys.readouterr().out == ""


def test_pauses_are_not_in_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    now = 0.0
    log = MetricsLog(tmp_path, 8, Processes())
    log.start(0)
    for step in range(1, 5):
        now += 1.0
        log.add(values(step))
        with log.paused():  # samples, a checkpoint
            now += 50.0
    row, steps = log.flush(4, 0)
    assert row["images_per_second"] == 8.0
    assert (row["loss_d"], [step["loss_d"] for step in steps]) == (2.5, [1, 2, 3, 4])
    now += 4.0
    log.add(values(1))
    assert log.flush(5, 0)[0]["images_per_second"] == 2.0


def test_a_line_of_a_stopped_run_is_completed_later(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 8, Processes())
    log.start(0)
    for x in (1, 2, 6):
        log.add(values(x))
    log.flush(3, 0, complete=False)
    later = MetricsLog(tmp_path, 8, Processes())
    later.load_state_dict(log.state_dict())
    later.start(3)
    assert read_metrics(tmp_path / "metrics.csv") == []
    later.add(values(7))
    later.flush(4, 0)
    assert [(row["step"], row["loss_g"]) for row in read_metrics(tmp_path / "metrics.csv")] == [(4, 4)]
    whole = torch.zeros(1, len(StepMetrics._fields))
    for bad in (torch.zeros(3), torch.zeros(2, 3), whole * torch.nan, whole.to(torch.complex64)):
        fresh = MetricsLog(tmp_path, 8, Processes())
        fresh.load_state_dict({"values": bad})
        assert len(fresh.state_dict()["values"]) == 0
    fresh.load_state_dict({})
