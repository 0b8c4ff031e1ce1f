"""The CPU backend on emulated AMX tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from fastdcgan.backends import cpu as cpu_backend
from fastdcgan.backends.cpu import CPUBackend
from tests.csrc.cpu import amx_library


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Every contraction of the CPU backend that our kernels can run does, on emulated tiles if it is of bfloat16."""
    found = amx_library.library()
    monkeypatch.setattr(cpu_backend, "CONTRACTIONS", "fastdcgan_cpu_amx")
    monkeypatch.setattr(CPUBackend, "slower", lambda *_: None)
    monkeypatch.setattr(CPUBackend, "compared", lambda *_: None)
    before = found.amx_emulated_products()
    yield found
    assert found.amx_emulated_products() > before
    assert found.amx_emulated_configured_threads() == 0
