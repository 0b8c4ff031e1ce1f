"""Blocks and the training step under pytest-benchmark: `pytest benchmarks/bench_peers.py`."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.benchmarks import suites
from fastdcgan.benchmarks.peers import DTYPES, PEERS, default_peers
from fastdcgan.benchmarks.runners import BlockRunner, StepRunner
from fastdcgan.benchmarks.shapes import IMAGE_SIZES, Block, NetShape, inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128 if DEVICE.type == "cuda" else 16
BLOCKS = [block for net in (NetShape().generator(), NetShape().discriminator()) for block in net]
NAMES = sorted({name for dtype in ("fp32", "bf16") for name in default_peers(DEVICE, dtype)})
# Compiling each block is what `fastdcgan bench` does.
OF_BLOCKS = [name for name in default_peers(DEVICE, "fp32") if not (PEERS[name].compile_mode or PEERS[name].whole)]


def finished() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", OF_BLOCKS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block(benchmark, block: Block, name: str) -> None:
    benchmark.group = f"block {block.name}, batch {BATCH}, fp32"
    torch.manual_seed(0)
    x, grad = block.data(BATCH)
    with suites.device_settings(DEVICE):
        runner = BlockRunner(PEERS[name], block.module(), x, grad, DEVICE, DTYPES["fp32"], block.in_size > 1)
        runner.prepare()
        benchmark.pedantic(
            lambda: (runner.forward(), runner.backward(), finished()), rounds=10, warmup_rounds=1
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", IMAGE_SIZES[:2])
@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, name: str, size: int, dtype: str) -> None:
    benchmark.group = f"step {size}x{size}, batch {BATCH}, {dtype}"
    torch.compiler.reset()
    torch.manual_seed(0)
    shape = NetShape(size)
    with suites.device_settings(DEVICE):
        runner = StepRunner(PEERS[name], shape.nets(), [inputs(shape, BATCH)], DEVICE, DTYPES[dtype])
        runner.prepare()
        benchmark.pedantic(lambda: (runner(), finished()), rounds=5, warmup_rounds=1)
