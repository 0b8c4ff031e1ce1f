"""What csrc/cpu/machine finds out about the processor."""

from __future__ import annotations

import time

import pytest
import torch

from fastdcgan import backends
from fastdcgan.backends.cpu import CPUBackend, Rates
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Call, Operand

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


def test_what_products_take_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = CPUBackend()
    cpu.rates = Rates(50.0, 0.0, 10.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def least(dtype: torch.dtype = torch.float32, groups: int = 1) -> list[tuple[float, ...]]:
        x, y = torch.empty(5, 24, 4, 4, dtype=dtype), torch.empty(5, 32, 2, 2, dtype=dtype)
        w = torch.empty(32, 24 // groups, 4, 4, dtype=dtype)
        g = Geometry((4, 4), (2, 2), (1, 1), groups=groups)
        calls = (
            Call("conv", Operand(x), w, g, (2, 2)),
            Call("conv_transpose", Operand(y), w, g, (4, 4)),
            Call("weight_grad", Operand(x), Operand(y), g, (4, 4)),
        )
        found = []
        for call in calls:
            of = {algorithm.name: algorithm.least_ms(call) for algorithm in cpu.algorithms(call.op)}
            found.append((cpu.direct_ms(call), of["cpu gemm"], of["cpu winograd_2x2"]))
        return found

    # Of four taps along an axis three read a pixel, at each of two outputs.
    ms = 2 * 5 * 24 * 32 * 36 / (1e6 * 50 * 2)
    assert least() == [pytest.approx((ms, ms, 0.0))] * 3
    for unknown in (least(torch.bfloat16), least(groups=2)):
        assert unknown == [(0.0, 0.0, 0.0)] * 3
    for precision in (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul):
        before = precision.fp32_precision
        precision.fp32_precision = "bf16"
        try:
            assert least() == [(0.0, 0.0, 0.0)] * 3
        finally:
            precision.fp32_precision = before
    assert least() == [pytest.approx((ms, ms, 0.0))] * 3
