"""What a kernel file may not contain, since it has to run on a CPU as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cuda_on_cpu.host_programs import ROOT

CUDA = ROOT / "csrc" / "cuda"
WRAPPERS = CUDA / "device"

FORBIDDEN = {
    r"<<<": "kernels are launched by gpu::launch",
    r"__shared__": "shared memory comes from gpu::shared_memory",
    r"\basm\b": "inline assembly is in device/ alone",
    r"\batomic\w*\s*\(": "atomics would make results depend on the order of blocks",
    r"cuda(Malloc|Free|MemcpyAsync|Memcpy|MemsetAsync|Memset|DeviceSynchronize|StreamSynchronize)\b": (
        "memory is torch's, and nothing may wait or allocate while a graph is captured"
    ),
}
IN_KERNEL_FILES = {
    r"#include\s*[<\"](torch|ATen|c10|cuda(?!/(device|elementwise|gemm|gemm_sm90|image|train)/))": (
        "kernel files include kernel files and the wrappers alone"
    ),
    r"\bmem(cpy|set)\b": "g++ inlines it where the thread sanitizer does not see it",
    r"\bprintf\b": "the CPU has other ways to look inside",
}


def code(text: str) -> str:
    """Without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def offences(text: str, rules: dict[str, str]) -> list[str]:
    return [f"{pattern}: {why}" for pattern, why in rules.items() if re.search(pattern, code(text))]


def files(*suffixes: str) -> list[Path]:
    found = sorted(path for suffix in suffixes for path in CUDA.rglob(f"*{suffix}"))
    return [path for path in found if WRAPPERS not in path.parents]


@pytest.mark.parametrize("path", files(".cuh", ".cu", ".cpp", ".h"), ids=lambda path: path.name)
def test_conventions(path: Path) -> None:
    rules = FORBIDDEN | (IN_KERNEL_FILES if path.suffix == ".cuh" else {})
    assert not offences(path.read_text(), rules)


def test_the_rules_see_what_they_forbid() -> None:
    bad = [
        "kernel<<<1, 32>>>(x);", "__shared__ float x[32];", 'asm volatile("bar.sync 0;");', "atomicAdd(p, 1.f);",
        "cudaMalloc(&p, 4);", "cudaDeviceSynchronize();",
    ]  # fmt: skip
    assert all(offences(line, FORBIDDEN) for line in bad)
    bad = [
        "#include <torch/library.h>",
        '#include "cuda_bf16.h"',
        "#include <cuda/std/array>",
        '#include "cuda/ops/tensors.h"',
        "std::memcpy(&a, &b, 4);",
        'printf("x");',
    ]
    assert all(offences(line, IN_KERNEL_FILES) for line in bad)
    good = '// not <<< here\n#include "cuda/device/vec.h"\n__syncthreads(); /* asm */'
    assert not offences(good, FORBIDDEN | IN_KERNEL_FILES)
