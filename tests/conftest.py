"""What all tests share: markers, the device (`machine.py`), seeds, threads, hypothesis' profile, and the backends.

A plain `pytest` runs neither what is marked `compiles` nor what is marked `slow`. What is named (by a path, -m or -k)
runs whole: `pytest tests` runs everything.

FASTDCGAN_TEST_THREADS  CPU threads (1 by default: the tensors are small, and waiting threads take time from each other)
HYPOTHESIS_PROFILE      "fixed" (the same examples on every run), "device" (the same, but few: the default on a GPU)
                        or "explore" (new ones, more of them)
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastdcgan
from fastdcgan.dispatch import autotune
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.helpers import twins
from tests.machine import DEVICE, DEVICE_EXAMPLES, ROOT, backends_here

QUICK = "not compiles and not slow"
LONG = ("compiles", "slow", "interpreter")
# The markers of whole folders of tests: folder -> marker
MARKERS = {"kernels": "interpreter", "kernels/compiled": "compiles", "csrc/cuda": "compiles", "cuda_on_cpu": "compiles"}

# nohup has the first ignored, a shell the second by what it starts in the background; and so do all processes below.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_CALLS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

settings.register_profile("fixed", deadline=None, derandomize=True, database=None, suppress_health_check=SLOW_CALLS)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=SLOW_CALLS)
settings.register_profile("device", settings.get_profile("fixed"), max_examples=DEVICE_EXAMPLES)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed" if DEVICE.type == "cpu" else "device"))


def pytest_configure(config: pytest.Config) -> None:
    # What runs does not depend on how fast this machine is; measuring has tests of its own.
    os.environ["FASTDCGAN_AUTOTUNE"] = "off"  # for other processes
    autotune._by_rule = True
    torch.set_num_threads(int(os.environ.get("FASTDCGAN_TEST_THREADS", "1")))
    # float32 means float32 here, for the vanilla modules and for ours; TF32 has tests of its own.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True  # so that PyTorch's own gradients have the same bits each time
    if config.args_source is not pytest.Config.ArgsSource.ARGS and not (
        config.option.markexpr or config.option.keyword
    ):
        config.option.markexpr = QUICK


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the markers of folders, fixtures and the device; what takes long comes first, so that no process of several
    is left with it at the end."""
    for item in items:
        folder = item.path.parent.relative_to(ROOT / "tests").as_posix()
        if folder in MARKERS:
            item.add_marker(MARKERS[folder])
        if isinstance(item, pytest.Function) and "emulated" in item.fixturenames:
            item.add_marker("compiles")  # the library whose AMX tiles are emulated
        if isinstance(item, pytest.Function) and _asks_for_the_device(item):
            item.add_marker("device")
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What is there before the first test, PyTorch and thousands of tests, stays: garbage collection skips it."""
    gc.collect()
    gc.freeze()


def _asks_for_the_device(item: pytest.Function) -> bool:
    """Whether a test takes the device as a fixture, or its module uses DEVICE or `numbers` on it."""
    fixtures, names = item.fixturenames, vars(item.module).values()
    return "device" in fixtures or "backend" in fixtures or any(v is DEVICE or v is twins.numbers for v in names)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"device: {DEVICE}", *(f"backend {name}: {status}" for name, status in fastdcgan.backends().items())]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After a kernel has trapped, nothing runs on the GPU in this process: a worker ends, and another takes over."""
    if report.failed and DEVICE.type == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs once per backend available here (`test_primitives.py` reports the others as
    skips), and on a CPU once more on the CUDA kernels, which the shim in `cuda_on_cpu` runs on CPU tensors, slowly."""
    if "backend" in metafunc.fixturenames:
        names = [pytest.param(name) for name in backends_here()]
        if DEVICE.type == "cpu":
            names.append(pytest.param("cuda", marks=[pytest.mark.compiles, needs_compiler]))
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that is available here; blocks run on it during the test."""
    with contextlib.ExitStack() as stack:
        if request.param == "cuda" and DEVICE.type == "cpu":
            from tests.cuda_on_cpu.host_library import cuda_backend_on_cpu

            stack.enter_context(cuda_backend_on_cpu())
        stack.enter_context(fastdcgan.backend(request.param))
        yield request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """An output that is not wholly written keeps NaNs. (What isn't deterministic on a GPU is another matter.)"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
