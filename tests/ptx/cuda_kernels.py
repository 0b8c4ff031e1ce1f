"""CUDA kernels of `csrc/cuda` on the machine: the package's own operators and launchers as nvcc compiles them, on CPU
tensors, with a CUDA runtime (`runtime.cpp`) that hands each launch to the machine."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ninja
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan.backends.cuda import CUDABackend
from tests.csrc.cuda.compiling import NVCC
from tests.cuda_on_cpu.host_programs import ROOT
from tests.ptx.interpreter import BUILD, HERE, Machine

ROOMS = ("elementwise", "gemm", "gemm_sm90", "image")  # of csrc/cuda
BINDINGS = ("elementwise", "contraction", "image_side")  # what registers their operators
NAMESPACE = "fastdcgan_cuda_ptx"  # in the place of the shim's
NVCC_FLAGS = [
    *("-std=c++17", "-O2", "-w", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr", "-no-compress"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
]
ARCHITECTURES = {"gemm_sm90": "90a"}  # of the other rooms: 80
RENAMED = ["-DFASTDCGAN_CUDA_ON_CPU", f"-Dfastdcgan_cuda_on_cpu={NAMESPACE}"]


RULES = """
rule nvcc
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = g++ -shared -Wl,-Bsymbolic $in $libraries -o $out
"""


def _built() -> Path:
    """The operators as a library, by ninja, which compiles what has changed."""
    assert NVCC is not None
    folder, torch_folder = BUILD / "cuda", Path(torch.__file__).parent
    flags = [*NVCC_FLAGS, f"-I{ROOT / 'csrc'}", f"-isystem {torch_folder / 'include'}"]
    sources = [source for room in ROOMS for source in sorted((ROOT / "csrc/cuda" / room).rglob("*.cu"))]
    sources += [*(ROOT / f"csrc/cuda/ops/{name}_bindings.cpp" for name in BINDINGS), HERE / "runtime.cpp"]
    lines = [f"nvcc = {NVCC}", f"libraries = -L{torch_folder / 'lib'} -ltorch_cpu -lc10", RULES]
    for source in sources:
        arch = f"compute_{ARCHITECTURES.get(source.parent.name, '80')}"
        more = [f"-gencode=arch={arch},code={arch}", *([] if source.suffix == ".cu" else RENAMED)]
        lines += [f"build {source.stem}.o: nvcc {source}", f"  flags = {' '.join([*flags, *more])}"]
    lines.append(f"build operators.so: link {' '.join(f'{source.stem}.o' for source in sources)}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder, "-j", os.environ.get("MAX_JOBS", "2")]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return folder / "operators.so"


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
