"""CUDA kernels of `csrc/cuda` on the machine: the package's own operators and launchers as nvcc compiles them, on CPU
tensors, with a CUDA runtime (`runtime.cpp`) that hands each launch to the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan.backends.cuda import CUDABackend
from tests.csrc.cuda.compiling import EXTENSION, extension
from tests.cuda_on_cpu.host_programs import ROOT, compiled
from tests.machine import setup_script
from tests.ptx.interpreter import BUILD, HERE, Machine

ROOMS = ("elementwise", "gemm", "gemm_sm90", "image")  # of csrc/cuda
BINDINGS = ("elementwise", "contraction", "image_side")  # what registers their operators
NAMESPACE = "fastdcgan_cuda_ptx"  # in the place of the shim's
RENAMED = ["-DFASTDCGAN_CUDA_ON_CPU", f"-Dfastdcgan_cuda_on_cpu={NAMESPACE}"]


def _built() -> Path:
    """The operators as a library: the kernels and their launchers are the objects of the extension."""
    extension()
    torch_folder, cuda_folder = Path(torch.__file__).parent, setup_script().cuda_home(os.environ)
    flags = ["-std=c++17", "-O2", "-w", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", *RENAMED]
    flags += [f"-I{ROOT / 'csrc'}", f"-isystem{torch_folder / 'include'}", f"-isystem{cuda_folder}/include"]
    sources = [*(ROOT / f"csrc/cuda/ops/{name}_bindings.cpp" for name in BINDINGS), HERE / "runtime.cpp"]
    objects = [compiled(BUILD / "cuda" / f"{source.stem}.o", ["-c", str(source)], flags) for source in sources]
    objects += [found for room in ROOMS for found in sorted((EXTENSION / "temp/csrc/cuda" / room).rglob("*.o"))]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    return compiled(BUILD / "cuda/operators.so", [*map(str, objects)], ["-shared", "-Wl,-Bsymbolic"], libraries)


LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int,
)
ALLOCATED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)


@functools.cache
def library() -> ctypes.CDLL:
    linked = _built()
    torch.ops.load_library(str(linked))
    return ctypes.CDLL(str(linked))


class PTXBackend(CUDABackend):
    """The CUDA backend's passes on CPU tensors."""

    device_type = "cpu"

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, NAMESPACE)


class _Known(TorchDispatchMode):
    """The tensors that an operator of ours gets are the machine's memory."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            for x in args:
                if isinstance(x, Tensor):
                    self.machine.add(x)
        return func(*args, **(kwargs or {}))


def only(ptx: str, kernel: str) -> str:
    """The PTX without other kernels: a source has hundreds."""
    head, *entries = ptx.split(".entry ")
    own = next(entry for entry in entries if entry.startswith(f"{kernel}("))
    return f"{head}.entry {own[: own.rindex(chr(10) + '}')]}\n}}"


@contextlib.contextmanager
def cuda_on(
    machine: Machine, change: Callable[[str], str] = lambda ptx: ptx, capability: int = 80
) -> Iterator[PTXBackend]:
    """Inside a `with`, the machine runs what the backend launches on a GPU of this compute capability, with a change to
    the PTX."""
    faults: list[Exception] = []

    def launch(ptx: bytes, kernel: bytes, grid: Any, block: Any, shared: int, arguments: Any, early: int) -> int:
        try:
            name = kernel.decode()
            module = machine.load(change(only(ptx.decode(), name)))
            memory = b""
            for k, (offset, size) in enumerate(module.fields(name)):
                memory = memory.ljust(offset, b"\0") + ctypes.string_at(arguments[k], size)
            module.launch(name, grid[:3], block[:3], memory, shared, bool(early))
        except Exception as error:  # goes through C++
            faults.append(error)
        return len(faults)

    listeners = LAUNCHED(launch), ALLOCATED(machine.add_memory)
    library().ptx_listen(*listeners, capability)
    try:
        with _Known(machine):
            yield PTXBackend()
    except RuntimeError as error:
        if faults:
            raise faults[0] from error
        raise
    finally:
        library().ptx_listen(None, None, 80)
