"""The bits of matrix descriptors, which no CPU can judge: they are those that Triton has for the same tiles."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.cuda_on_cpu.host_programs import build, needs_compiler, run

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = needs_compiler


@triton.jit
def product(a_ptr, b_ptr, out_ptr, depth, A_ACROSS: tl.constexpr, B_ACROSS: tl.constexpr):
    m, n, k = tl.arange(0, 128), tl.arange(0, 128), tl.arange(0, 64)
    acc = tl.zeros((128, 128), tl.float32)
    for i in range(0, depth, 64):
        if A_ACROSS:
            a = tl.trans(tl.load(a_ptr + (i + k)[:, None] * 1024 + m[None, :]))
        else:
            a = tl.load(a_ptr + m[:, None] * 1024 + (i + k)[None, :])
        if B_ACROSS:
            b = tl.load(b_ptr + (i + k)[:, None] * 1024 + n[None, :])
        else:
            b = tl.trans(tl.load(b_ptr + n[:, None] * 1024 + (i + k)[None, :]))
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + m[:, None] * 1024 + n[None, :], acc)


def constants(across: tuple[int, int]) -> set[int]:
    """What is added to the places of both factors, in Triton's code for sm_90."""
    pointers: dict[str, Any] = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "depth": "i32"}
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(product, pointers, dict(zip(("A_ACROSS", "B_ACROSS"), across, strict=True)), divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    text = compiled.asm["ptx"]
    flags = f"1, 1, {across[0]}, {across[1]};"
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.bf16\.bf16 .*{flags}", text), (
        "another product"
    )
    # Of swizzled tiles: bits 62 and 63 are 1.
    return {int(number) for number in re.findall(r"(?:or|add)\.[bs]64 .* (\d{19});", text) if int(number) >> 62 == 1}


def test_descriptors_are_those_of_triton() -> None:
    code, output = run(build("descriptors"))
    assert code == 0
    along, along_next, _, across_first, _, _ = numbers = [int(line) for line in output.split()]
    assert {along, along_next} <= constants((0, 0))
    # Panels of 64 columns lie 64 rows of 128 bytes apart; 16 steps of the depth are 16 rows.
    both = constants((0, 1))
    assert {along, along_next, across_first, numbers[5]} <= both
    # The left factor's 64 rows are one panel: nothing lies apart.
    assert {along, numbers[2], across_first, numbers[5]} <= constants((1, 1))
    assert numbers[4] not in both
