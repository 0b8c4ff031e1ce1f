"""The contractions of csrc/cpu on AMX tiles and by AVX512_BF16, for a processor that has neither: those sources of the
extension that use the instructions, with emulations in their place, and the extension itself for all that they call."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import torch

from fastdcgan import build_info
from fastdcgan.backends.cpu import CPUBackend, extension_name
from tests.cuda_on_cpu.host_programs import ROOT, compiled, compiler

HERE = Path(__file__).resolve().parent
# What uses the instructions, and what chooses it.
EMULATED = [ROOT / "csrc/cpu" / f"{name}_contractions.cpp" for name in ("amx/amx", "bf16/dot")]
SOURCES = [*EMULATED, *(ROOT / "csrc/cpu/contraction" / f"{name}.cpp" for name in ("algorithms", "contraction_ops"))]
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
    CPUBackend().require()  # before this one, which has functions of the same names
    flags = [*FLAGS, *torch_includes()]
    paths = (*SOURCES, *EMULATIONS)
    objects = [str(compiled(BUILD / f"{path.stem}.o", ["-c", str(path)], flags)) for path in paths]
    extension = str(build_info.library(extension_name()))
    linked = compiled(BUILD / "operators.so", objects, ["-shared", "-fopenmp"], [extension, *torch_libraries()])
    torch.ops.load_library(str(linked))
    found = ctypes.CDLL(str(linked))
    found.amx_emulated_products.restype = ctypes.c_int64
    found.amx_emulated_configured_threads.restype = ctypes.c_int64
    return found
