"""`vdpbf16ps`: its emulation, the instruction itself where the processor has it, and when the kernels on it are taken.
The contractions are tested in test_bf16.py."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from fastdcgan import backends
from fastdcgan.backends.cpu import Rates
from fastdcgan.dispatch import router
from tests.csrc.cpu import amx_library
from tests.csrc.cpu.test_amx import inner_loops
from tests.csrc.cpu.test_contractions import Kernels, block
from tests.cuda_on_cpu.host_programs import ROOT, compiled, run

REASON = amx_library.why_not() or (backends.status()["cpu"] if backends.status()["cpu"] != "available" else None)
pytestmark = [pytest.mark.compiles, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
HERE = Path(__file__).resolve().parent
BF16 = torch.bfloat16
HAS_IT = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else False
needs_it = pytest.mark.skipif(not HAS_IT, reason="this processor has no AVX512_BF16")


# --- the instruction -------------------------------------------------------------------------------------------------


def dot(total: float, a: tuple[float, float], b: tuple[float, float]) -> float:
    """What the emulation makes of pairs (first, second), the same in all lanes."""
    sums = torch.full((16,), total)
    pairs = [torch.tensor(pair).to(BF16).repeat(16) for pair in (a, b)]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (sums, *pairs)]
    amx_library.library().avx512_bf16_emulated_dot(*pointers)
    assert (sums == sums[0]).all()
    return float(sums[0])


def test_the_second_product_is_added_first() -> None:
    assert dot(1.0, (3.0, 5.0), (7.0, 11.0)) == 77.0
    # 1 is lost beside 2**30, and not after it is gone.
    assert dot(1.0, (1.0, 2.0**15), (-(2.0**30), 2.0**15)) == 0.0
    assert dot(1.0, (2.0**15, 1.0), (2.0**15, -(2.0**30))) == 0.0
    assert dot(-(2.0**30), (1.0, 2.0**15), (1.0, 2.0**15)) == 1.0
    assert dot(-(2.0**30), (2.0**15, 1.0), (2.0**15, 1.0)) == 0.0


def test_a_product_is_not_rounded_before_it_is_added() -> None:
    x = 1 + 2.0**-7
    assert dot(-1.0 - 2.0**-6, (0.0, x), (0.0, x)) == 2.0**-14


def test_denormal_numbers_are_zeros() -> None:
    tiny, small = 2.0**-130, 2.0**-70
    assert dot(0.0, (tiny, tiny), (2.0**100, 2.0**100)) == 0.0
    assert dot(0.0, (small, small), (small, small)) == 0.0
    assert dot(tiny, (0.0, 0.0), (0.0, 0.0)) == 0.0


@needs_it
def test_the_emulation_is_the_instruction() -> None:
    """Bit by bit, on random numbers of all magnitudes."""
    folder = ROOT / "build" / "avx512_bf16"
    flags = ["-std=c++20", "-O2", "-w", f"-I{HERE}", f"-I{ROOT / 'csrc'}", *amx_library.WIDTH]
    flags += amx_library.torch_includes()
    source = str(HERE / "avx512_bf16_compared.cpp")
    code, output = run(compiled(folder / "compared", [source], flags, amx_library.torch_libraries()))
    count, different = map(int, output.split())
    assert code == 0 and count > 1_000_000 and different == 0, output


# --- the library that was built --------------------------------------------------------------------------------------


def test_inner_loops_of_the_library() -> None:
    """A lane of A for each row, one vector or two of B; no sum is stored, no register goes to the stack."""
    inner = [body for body in inner_loops() if {"vdpbf16ps", "vbroadcastss"} <= {x.split()[0] for x in body}]
    counts = {sum("vdpbf16ps" in line for line in body) for body in inner}
    assert counts >= {rows * vectors for rows in range(1, 13) for vectors in (1, 2)}
    for body in inner:
        assert not any(re.search(r"vmov\w+ +%zmm\d+,.*\(|%rsp|call", line) for line in body), body


@needs_it
@pytest.mark.parametrize("name", ["wide", "image", "projection", "logit", "3x3", "odd"])
def test_with_the_instruction(name: str) -> None:
    block(name, BF16).check(Kernels("avx512_bf16_col2im", "avx512_bf16"))


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "first"), [(200.0, "cpu avx512_bf16"), (100.0, "cpu gemm")])
def test_it_comes_first_where_it_is_faster(
    emulated_operators: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, rate: float, first: str
) -> None:
    others = Kernels("avx512_bf16", "gemm")  # than those on emulated tiles
    others._processor_has_amx = False
    others.rates = Rates(100.0, rate, 10.0)
    monkeypatch.setattr(backends.get("cpu"), "algorithms", others.algorithms)
    calls = block("wide", BF16).calls()
    assert router.route(calls["weight_grad"], "cpu").algorithm.name == first


def test_it_comes_last_beside_tiles(emulated_operators: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = backends.get("cpu")
    monkeypatch.setattr(cpu, "amx", True)
    for op, call in block("wide", BF16).calls().items():
        assert router.route(call, "cpu").algorithm.name == "cpu amx"
        able = {a.name: a.why_last(call) for a in cpu.algorithms(op) if a.why_not(call) is None}
        assert "costs little" in (able.pop("cpu unpacked") or "")
        assert able == {"cpu amx": None, "cpu avx512_bf16": "AMX tiles are faster"}
