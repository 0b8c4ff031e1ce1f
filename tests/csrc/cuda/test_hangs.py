"""Waits that have a bound: csrc/cuda/device/hangs.h in a library that is compiled for checks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.csrc.cuda import machine_code
from tests.csrc.cuda.compiling import needs_nvcc, nvcc

HERE = Path(__file__).parent
BOUNDED = ["-DFASTDCGAN_BOUNDED_WAITS"]

pytestmark = needs_nvcc


@pytest.mark.parametrize(("flags", "ends"), [([], 0), (BOUNDED, 2)])
def test_a_wait_that_hangs_ends_the_launch(tmp_path: Path, flags: list[str], ends: int) -> None:
    """Both the warp that copies and those that multiply. Else the kernel stays what it is: its products don't wait for
    each other."""
    cubin = nvcc(tmp_path / "kernel.cubin", "-O3", "-arch=sm_90a", "-cubin", *flags, HERE / "one_contraction.cu")
    kernels = machine_code.functions(machine_code.dump(cubin, "-sass"))
    (code,) = (code for name, code in kernels.items() if "sm90_contraction" in name)
    assert sum(each.startswith("BPT.TRAP") for each in code) == ends
    products = [each for each in code if each.startswith("HGMMA")]
    assert len(products) > 1 and sum("gsb0" in each for each in products) == 1


@pytest.mark.parametrize("flags", [[], BOUNDED])
def test_the_barrier_is_named_when_the_process_ends(tmp_path: Path, flags: list[str]) -> None:
    program = nvcc(tmp_path / "hang", "-cudart", "none", *flags, HERE / "hang.cu", HERE / "fake_runtime.cpp")
    done = subprocess.run([program], capture_output=True, text=True)
    said = "block (40,2) thread 256: barrier empty[3] did not end its phase of parity 1\n"
    assert (done.returncode, done.stderr) == (0, said if flags else "")
