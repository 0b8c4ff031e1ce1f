"""What csrc/cpu/machine finds out about the processor."""

from __future__ import annotations

import time

import pytest
import torch

from fastdcgan import backends
from fastdcgan.backends.cpu import CPUBackend, Rates

STATUS = backends.status()["cpu"]
pytestmark = pytest.mark.skipif(STATUS != "available", reason=STATUS)


def test_rates() -> None:
    """Those of some processor, in milliseconds."""
    begin = time.process_time()
    found = Rates(*torch.ops.fastdcgan_cpu.rates())
    assert time.process_time() - begin < 0.1
    # From one product a cycle on a slow processor to more than any has.
    assert 1 < found.fma < 2000 and 0.1 < found.copy < 1000
    has_it = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    if has_it:
        assert 0.2 * found.fma < found.vdpbf16ps < 4 * found.fma
    else:
        assert found.vdpbf16ps == 0


def test_the_backend_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = CPUBackend()
    cpu.require()
    first = cpu.rates
    monkeypatch.setattr(torch.ops.fastdcgan_cpu, "rates", None)  # a call would fail
    assert cpu.rates is first
