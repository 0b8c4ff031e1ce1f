"""The training step under pytest-benchmark: `pytest benchmarks/bench_step.py`."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.benchmarks import suites
from fastdcgan.benchmarks.peers import DTYPES, PEERS, default_peers
from fastdcgan.benchmarks.runners import StepRunner
from fastdcgan.benchmarks.shapes import IMAGE_SIZES, NetShape, inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128 if DEVICE.type == "cuda" else 16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", IMAGE_SIZES[:2])
@pytest.mark.parametrize("name", sorted({name for dtype in ("fp32", "bf16") for name in default_peers(DEVICE, dtype)}))
def test_step(benchmark, name: str, size: int, dtype: str) -> None:
    benchmark.group = f"step {size}x{size}, batch {BATCH}, {dtype}"
    torch.compiler.reset()
    torch.manual_seed(0)
    shape = NetShape(size)
    with suites.device_settings(DEVICE):
        runner = StepRunner(PEERS[name], shape.nets(), [inputs(shape, BATCH)], DEVICE, DTYPES[dtype])
        runner.prepare()

        def step() -> None:
            runner()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(step, rounds=5, warmup_rounds=1)
