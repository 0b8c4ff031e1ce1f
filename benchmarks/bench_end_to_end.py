"""Training from a folder of JPEG files under pytest-benchmark: `pytest benchmarks/bench_end_to_end.py`."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.benchmarks import suites
from fastdcgan.benchmarks.end_to_end import PEER_NAMES, trainers
from fastdcgan.benchmarks.shapes import NetShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128 if DEVICE.type == "cuda" else 16


@pytest.mark.parametrize("name", PEER_NAMES)
def test_training_from_a_folder(benchmark, name: str) -> None:
    benchmark.group = f"64x64 from JPEG, batch {BATCH}, fp32"
    torch.manual_seed(0)
    with suites.device_settings(DEVICE), trainers(NetShape(64), BATCH, DEVICE, "fp32") as (calls, _):

        def step() -> None:
            calls[name]()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(step, rounds=5, warmup_rounds=2)
