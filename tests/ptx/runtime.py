"""Libraries of CUDA kernels with launch code of their own, and a CUDA runtime (`runtime.cpp`) that hands each launch to
the machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.cuda_on_cpu.host_programs import compiled
from tests.machine import setup_script
from tests.ptx.interpreter import BUILD, HERE, Machine

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


def compiled_host(source: Path, *more_flags: str) -> Path:
    """The object of host code that uses torch and CUDA."""
    torch_folder, cuda_folder = Path(torch.__file__).parent, setup_script().cuda_home(os.environ)
    flags = ["-std=c++17", "-O2", "-w", "-fPIC", *more_flags]
    flags += [f"-isystem{torch_folder / 'include'}", f"-isystem{cuda_folder}/include"]
    return compiled(BUILD / "cuda" / f"{source.stem}.o", ["-c", str(source)], flags)


def linked(name: str, objects: list[Path]) -> Path:
    """A library of these objects and the runtime."""
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    sources = [str(each) for each in (*objects, compiled_host(HERE / "runtime.cpp"))]
    return compiled(BUILD / "cuda" / f"lib{name}.so", sources, ["-shared", "-Wl,-Bsymbolic"], libraries)


def only(ptx: str, kernel: str) -> str:
    """The PTX without other kernels: a source has hundreds."""
    head, *parts = re.split(r"^(?=(?:\.\w+ )*\.(?:entry|func)\b)", ptx, flags=re.MULTILINE)
    functions = [part for part in parts if ".entry " not in part[: part.index("(")]]
    own = next(part for part in parts if f".entry {kernel}(" in part)
    return "".join((head, *functions, own))


def unchanged(ptx: str) -> str:
    return ptx


@contextlib.contextmanager
def launches_on(
    machine: Machine, library: ctypes.CDLL, change: Callable[[str], str] = unchanged, capability: int = 80
) -> Iterator[None]:
    """Inside a `with`, the machine runs what the library launches on a GPU of this compute capability, with a change to
    the PTX. Its memory is what torch allocates meanwhile."""
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
    library.ptx_listen(*listeners, capability)
    try:
        yield
    finally:
        library.ptx_listen(None, None, 80)
        if faults:  # that is why the launch failed
            raise faults[0]
