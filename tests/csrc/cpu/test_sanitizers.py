"""Every pass and contraction on memory of exactly the right size, odd shapes, under AddressSanitizer and UBSan."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.csrc.cpu import amx_library
from tests.cuda_on_cpu.host_programs import ROOT, compiled, compiler, run
from tests.machine import contraction_sources

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(compiler() is None or platform.machine() != "x86_64", reason="it needs g++ on x86-64"),
]

HERE = Path(__file__).resolve().parent
SANITIZED = ["-std=c++20", "-w", f"-I{ROOT / 'csrc'}", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
DEFAULT = ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]


def calls(name: str, sources: Iterable[Path], flags: list[str]) -> int:
    """How many `sanitize.cpp` made with these sources of the kernels, without anything wrong. Optimising takes most of
    them longer than they run; but emulated instructions run for minutes without."""
    folder = ROOT / "build" / "sanitized" / name
    flags = [*SANITIZED, *flags, *amx_library.torch_includes()]
    objects = []
    for path in (HERE / "sanitize.cpp", *sources):
        level = "-O1" if path in (*amx_library.EMULATED, *amx_library.EMULATIONS) else "-O0"
        objects.append(str(compiled(folder / f"{path.stem}.o", ["-c", str(path)], [level, *flags])))
    code, output = run(compiled(folder / "run", objects, SANITIZED, amx_library.torch_libraries()))
    assert code == 0, output[-3000:]
    return int(output.split()[0])


def test_everything() -> None:
    sources = [path for path in (ROOT / "csrc/cpu").rglob("*.cpp") if not path.name.endswith("ops.cpp")]
    width = DEFAULT if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else AVX2
    assert calls("everything", sources, width) > 10_000


@pytest.mark.skipif(amx_library.why_not() is not None, reason=str(amx_library.why_not()))
def test_emulated_instructions() -> None:
    flags = [*amx_library.WIDTH, "-DFASTDCGAN_BF16_EMULATED", f"-I{HERE}"]
    assert calls("tiles", [*contraction_sources(), *amx_library.EMULATIONS], flags) > 400
