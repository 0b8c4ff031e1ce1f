"""nvcc: for the whole extension, as setup.py calls it, and for a single source."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
EXTENSION = ROOT / "build" / "cuda-extension"
ARCHITECTURES = "8.0 9.0a 10.0+PTX"  # which setup.py takes by default
# For RTX 40 and 50, which setup.py compiles for where it finds such a GPU. PTX of 8.9 and 12.0 is that of 8.0 and 10.0
# but for the names of unused symbols, so theirs is not made a second time. And PTX of 8.0 and 9.0a, as text: tests/ptx
# runs it.
MORE_CODE = "-no-compress -gencode=arch=compute_80,code=[compute_80,sm_89] -gencode=arch=compute_90a,code=compute_90a"
MORE_CODE += " -gencode=arch=compute_100,code=sm_120"
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc compiles the CUDA sources, and it is not here")


def nvcc(target: Path, *arguments: str | Path) -> Path:
    """`target`, as nvcc makes it with these arguments; fails with what it printed."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", f"-I{ROOT / 'csrc'}", *map(str, arguments), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@functools.cache
def extension() -> Path:
    """The CUDA extension as setup.py builds it; its objects are in `EXTENSION`. Sources that changed are compiled
    again, and all where a header did: with a torch without CUDA, PyTorch's build doesn't know what nvcc includes."""
    environment = os.environ | {"FASTDCGAN_EXTENSION": "_cuda", "FASTDCGAN_FORCE_CUDA": "1"}
    environment |= {"TORCH_CUDA_ARCH_LIST": ARCHITECTURES, "NVCC_APPEND_FLAGS": MORE_CODE}
    # One for each core: another worker of pytest soon waits for this.
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(EXTENSION / "temp"), "--build-lib"]
    command.append(str(EXTENSION / "lib"))
    EXTENSION.mkdir(parents=True, exist_ok=True)
    with (EXTENSION / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        headers = [path for suffix in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
        changed = max(path.stat().st_mtime for path in (*headers, Path(__file__)))
        for built in EXTENSION.rglob("*.o"):
            if built.stat().st_mtime < changed:
                built.unlink()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return EXTENSION / "lib" / "fastdcgan" / "_cuda.so"
