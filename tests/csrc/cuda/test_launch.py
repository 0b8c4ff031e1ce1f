"""csrc/cuda/device/launch.h as nvcc compiles it, with a CUDA runtime that says what code is loaded."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.csrc.cuda.compiling import needs_nvcc, nvcc

HERE = Path(__file__).parent

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("launches") / "launches"
    return nvcc(target, "-cudart", "none", "-arch=sm_90", HERE / "launches.cu", HERE / "fake_runtime.cpp")


def launches(program: Path, *ptx_versions: str, **environment: str) -> list[str]:
    done = subprocess.run([program, *ptx_versions], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# (PTX versions of the code on one GPU, and on another) -> whether each launch was early, and how often it was asked for
# the code: two on the one, two on the other, two of which the second may not be early.
@pytest.mark.parametrize(
    ("ptx_versions", "said"),
    [
        (("90", "80"), ["1 1", "1 0", "0 1", "0 0", "0 1", "0 0"]),
        (("80", "100"), ["0 1", "0 0", "1 1", "1 0", "1 1", "0 0"]),
    ],
)
def test_a_launch_is_early_where_the_loaded_code_waits(
    program: Path, ptx_versions: tuple[str, str], said: list[str]
) -> None:
    """Code of 8.0 that the driver compiled for a GPU of 9.0 has no wait. Each kernel is asked once for each GPU."""
    assert launches(program, *ptx_versions) == said


def test_early_launches_can_be_turned_off(program: Path) -> None:
    assert not any(line.startswith("1") for line in launches(program, "90", "90", FASTDCGAN_EARLY_LAUNCH="0"))
    assert any(line.startswith("1") for line in launches(program, "90", "90", FASTDCGAN_EARLY_LAUNCH="1"))
