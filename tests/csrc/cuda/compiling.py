"""nvcc, called for a single source instead of for the whole extension."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc compiles the CUDA sources, and it is not here")


def nvcc(target: Path, *arguments: str | Path) -> Path:
    """`target`, as nvcc makes it with these arguments; fails with what it printed."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", f"-I{ROOT / 'csrc'}", *map(str, arguments), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target
