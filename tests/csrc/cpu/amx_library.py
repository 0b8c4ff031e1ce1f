"""The contractions of csrc/cpu on AMX tiles and by AVX512_BF16, for a processor that has neither: the extension's own
sources, with the emulations of the instructions in their place."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import torch

from tests.machine import contraction_sources

HERE = Path(__file__).resolve().parent
from tests.cuda_on_cpu.host_programs import ROOT, compiled, compiler  # noqa: E402

EMULATIONS = [HERE / "amx_emulated.cpp", HERE / "avx512_bf16_emulated.cpp"]
BUILD = ROOT / "build" / "amx_emulated"
# As setup.py has it for processors with AVX-512; symbols that are this library's own.
WIDTH = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mavx2", "-mfma", "-mf16c"]
WIDTH += ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-fopenmp", "-fPIC", "-w", "-fno-gnu-unique", *WIDTH]
FLAGS += ["-DFASTDCGAN_BF16_EMULATED", "-DFASTDCGAN_CPU_NAMESPACE=fastdcgan_cpu_amx", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]


def why_not() -> str | None:
    """Why the emulations can't be built or can't run here, or None."""
    if platform.machine() != "x86_64" or compiler() is None:
        return "the emulation of AMX needs g++ on x86-64"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the kernels for AMX need AVX-512"
    return None


def torch_includes() -> list[str]:
    package = Path(torch.__file__).parent
    return [f"-isystem{package / 'include'}", f"-isystem{package / 'include/torch/csrc/api/include'}"]


def torch_libraries() -> list[str]:
    folder = Path(torch.__file__).parent / "lib"
    return [f"-L{folder}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}"]


@functools.cache
def library() -> ctypes.CDLL:
    """Compile what has changed, register the operators as torch.ops.fastdcgan_cpu_amx."""
    operators = [ROOT / "csrc/cpu" / name for name in ("contraction/contraction_ops.cpp", "memory/memory.cpp")]
    sources = [*operators, *contraction_sources(), *EMULATIONS]
    flags = [*FLAGS, *torch_includes()]
    objects = [str(compiled(BUILD / f"{path.stem}.o", ["-c", str(path)], flags)) for path in sources]
    linked = compiled(BUILD / "operators.so", objects, ["-shared", "-fopenmp"], torch_libraries())
    torch.ops.load_library(str(linked))
    found = ctypes.CDLL(str(linked))
    found.amx_emulated_products.restype = ctypes.c_int64
    found.amx_emulated_configured_threads.restype = ctypes.c_int64
    return found
