"""`fastdcgan bench`: every suite on tiny nets, and what it says to what is wrong."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

from fastdcgan.benchmarks import bench as cases
from fastdcgan.benchmarks import host
from fastdcgan.benchmarks.harness import Timing
from fastdcgan.benchmarks.results import Results
from fastdcgan.benchmarks.shapes import NetShape
from fastdcgan.cli import bench
from tests.benchmarks.broken_peers import change_fused, scale_a_weight

TINY = NetShape(16, ngf=8, ndf=8)


def _bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(arguments))


QUICK = ("--quick", "--device", "cpu", "--batch", "2", "--rounds", "2")


@pytest.fixture
def tiny_sizes(monkeypatch):
    timing = Timing(2, 1e-4)
    monkeypatch.setattr(cases, "_QUICK", cases.Sizes(TINY, 2, timing, timing, all_blocks=False))


def test_bench_from_end_to_end(tiny_sizes, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert _bench(*QUICK, "--peers", "eager", "eager-nhwc", "graph", "fused", "--json", str(file)) == 0
    found = Results.read(file)
    assert [case.name for case in found.cases if case.suite == "step"] == [
        "16x16",
        "16x16 from JPEG",
        "pix2pix 16x16",
    ]
    assert [case.batch for case in found.cases if case.suite == "generate"] == [2]
    assert {case.part for case in found.cases} == {"step", "eval", *host.PARTS}
    for case in found.cases:
        expected = ["ok", "ok"] if "JPEG" in case.name or case.suite == "host" else ["ok", "ok", "unavailable", "ok"]
        assert [row.status for row in case.rows] == expected
    shown = capsys.readouterr().out
    for text in (
        "Training step",
        "Generation",
        "Blocks",
        "Host time of tiny nets",
        "PyTorch eager, NCHW",
        "needs a CUDA device",
        "~ where the spread",
    ):
        assert text in shown


def test_bench_warns_on_a_busy_machine(tiny_sizes, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    assert _bench(*QUICK, "--suite", "step", "--peers", "eager") == 0
    assert "load 1000.0 on" in capsys.readouterr().err


def test_bench_fails_if_ours_is_wrong(tiny_sizes, monkeypatch, capsys):
    change_fused(monkeypatch, scale_a_weight)
    assert _bench(*QUICK, "--suite", "step", "--peers", "eager", "fused") == 1
    assert "wrong: 16x16 step, batch 2, fastdcgan in fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "--batch is 0: expected at least 1"),
        (("--rounds", "-1"), "--rounds is -1: expected at least 1"),
    ],
)
def test_bench_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        _bench("--device", "cpu", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_on_a_missing_gpu():
    with pytest.raises(ValueError, match="finds no GPU"):
        _bench("--device", "cuda")
