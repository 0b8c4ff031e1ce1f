"""The CPU backend on emulations of instructions."""

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
def emulated_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ctypes.CDLL:
    """The contractions of the CPU backend are those of the library of emulations, and none of them was measured."""
    found = amx_library.library()
    monkeypatch.setattr(cpu_backend, "NAMESPACE", "fastdcgan_cpu_amx")
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))
    monkeypatch.setattr(router, "_routes", {})
    monkeypatch.setattr(router, "_alike", {})
    return found


@pytest.fixture
def emulated(emulated_operators: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The CPU backend has contractions on emulated AMX tiles, and takes them wherever they can run."""
    monkeypatch.setattr(backends.get("cpu"), "amx", True)
    before = emulated_operators.amx_emulated_products()
    yield emulated_operators
    assert emulated_operators.amx_emulated_products() > before
    assert emulated_operators.amx_emulated_configured_threads() == 0
