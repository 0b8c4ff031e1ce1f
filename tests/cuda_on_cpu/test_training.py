"""Adam, the loss and the images' kernels of csrc/cuda on a CPU: under the sanitizers, and behind the public API."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastdcgan.dispatch import training_ops
from tests.cuda_on_cpu.host_library import ORDERS, library, set_order
from tests.cuda_on_cpu.host_programs import MODES, ROOT, assert_passes, needs_compiler

pytestmark = needs_compiler


@pytest.mark.parametrize("mode", MODES)
def test_kernels(mode: str) -> None:
    assert_passes("training_tests", mode)


def test_the_public_functions_on_these_kernels() -> None:
    """What the tests say of FusedAdam, the loss and the images holds with the CUDA kernels behind them."""
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in ("optim", "optim_writes", "losses", "images")]
    library()  # compiled here, so that a failure to do so is shown as such
    plugins = ["-p", "no:cacheprovider", "-p", "tests.cuda_on_cpu.host_library"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-x", *tests],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " skipped" not in done.stdout.splitlines()[-1]


def test_a_chunk_is_as_long_as_python_thinks() -> None:
    library()
    chunk = training_ops.ADAM_CHUNK["cuda"]
    for size, counters in ((chunk, 1), (chunk + 1, 2)):
        state = [[torch.zeros(size)] for _ in range(4)]
        scalars = (0.1, None, 0.9, 0.99, 1e-8, 0.0, False, False, False, None, None)
        call = torch.ops.fastdcgan_cuda_on_cpu.adam_
        call(*state, [torch.empty(0)], [torch.zeros(counters)], *scalars)
        with pytest.raises(RuntimeError, match=f"expected {counters} step counters"):
            call(*state, [torch.empty(0)], [torch.zeros(counters + 1)], *scalars)


def test_the_same_bits_in_every_order_of_threads() -> None:
    library()
    ops, random = torch.ops.fastdcgan_cuda_on_cpu, torch.Generator().manual_seed(0)
    logits, pixels = torch.randn(2000, generator=random), torch.randint(0, 256, (3, 8, 9, 3), dtype=torch.uint8)
    found = []
    try:
        for order in ORDERS:
            set_order(order)
            results = ops.bce_with_logits(logits, [0.9, 0.0], True)
            found.append([*results, ops.images(pixels, torch.tensor([True, False, True]), torch.bfloat16)])
    finally:
        set_order("forward")
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
