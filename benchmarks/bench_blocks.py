"""Blocks, forward and backward together, under pytest-benchmark: `pytest benchmarks/bench_blocks.py`."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.benchmarks import suites
from fastdcgan.benchmarks.peers import DTYPES, PEERS, default_peers
from fastdcgan.benchmarks.runners import BlockRunner
from fastdcgan.benchmarks.shapes import Block, NetShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128 if DEVICE.type == "cuda" else 16
BLOCKS = [block for net in (NetShape().generator(), NetShape().discriminator()) for block in net]
# Compiling each block is what `fastdcgan bench` does.
NAMES = [name for name in default_peers(DEVICE, "fp32") if PEERS[name].compile_mode is None and not PEERS[name].whole]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block(benchmark, block: Block, name: str) -> None:
    benchmark.group = f"block {block.name}, batch {BATCH}, fp32"
    torch.manual_seed(0)
    x = torch.randn(BATCH, block.in_channels, block.in_size, block.in_size)
    grad = torch.randn(BATCH, block.out_channels, block.out_size, block.out_size)
    with suites.device_settings(DEVICE):
        runner = BlockRunner(PEERS[name], block.module(), x, grad, DEVICE, DTYPES["fp32"], block.in_size > 1)
        runner.prepare()

        def both() -> None:
            runner.forward()
            runner.backward()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(both, rounds=10, warmup_rounds=1)
