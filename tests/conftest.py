"""What all tests share: the device (`machine.py`), seeds, threads, hypothesis' profile, and the backends.

FASTDCGAN_TEST_CUDA_ON_CPU  1: backend("cuda") runs on CPU tensors, its kernels under the shim in `cuda_on_cpu`, slowly
FASTDCGAN_TEST_THREADS  CPU threads (1 by default: the tensors are small, and waiting threads take time from each other)
HYPOTHESIS_PROFILE      "fixed" (the default: the same examples on every run) or "explore" (new ones, more of them)
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastdcgan
from fastdcgan import backends
from fastdcgan.dispatch import training_ops
from tests.machine import DEVICE, backends_here

SLOW_CALLS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

settings.register_profile("fixed", deadline=None, derandomize=True, database=None, suppress_health_check=SLOW_CALLS)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=SLOW_CALLS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("FASTDCGAN_TEST_THREADS", "1")))
    # float32 means float32 here, for the vanilla modules and for ours; TF32 has tests of its own.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if os.environ.get("FASTDCGAN_TEST_CUDA_ON_CPU"):
        from tests.cuda_on_cpu.host_library import HostCUDABackend

        loaded = HostCUDABackend()
        loaded.require()
        backends._loaded["cuda"] = loaded
        training_ops.NAMESPACES["cpu"] = "fastdcgan_cuda_on_cpu"
        training_ops.ADAM_CHUNK["cpu"] = training_ops.ADAM_CHUNK["cuda"]


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"device: {DEVICE}", *(f"backend {name}: {status}" for name, status in fastdcgan.backends().items())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs once per backend available here (`test_ops.py` reports the others as skips)."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends_here(), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that is available here; blocks run on it during the test."""
    with fastdcgan.backend(request.param):
        yield request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
