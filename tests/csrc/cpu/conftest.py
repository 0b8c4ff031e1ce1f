"""The CPU backend on emulated AMX tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdcgan import backends
from fastdcgan.backends import cpu as cpu_backend
from fastdcgan.dispatch import router
from tests.csrc.cpu import amx_library


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ctypes.CDLL]:
    """The CPU backend has contractions on emulated AMX tiles, and takes them wherever they can run."""
    found = amx_library.library()
    cpu = backends.get("cpu")
    monkeypatch.setattr(cpu_backend, "NAMESPACE", "fastdcgan_cpu_amx")
    monkeypatch.setattr(cpu, "amx", True)
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))  # where nothing was measured
    monkeypatch.setattr(router, "_routes", {})
    before = found.amx_emulated_products()
    yield found
    assert found.amx_emulated_products() > before
    assert found.amx_emulated_configured_threads() == 0
