"""CUDA kernels of `csrc/cuda` on the machine: the package's own operators and launchers as nvcc compiles them, on CPU
tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan.backends.cuda import CUDABackend
from tests.csrc.cuda.compiling import EXTENSION, extension
from tests.cuda_on_cpu.host_programs import ROOT
from tests.ptx.interpreter import Machine
from tests.ptx.runtime import compiled_host, launches_on, linked, unchanged

ROOMS = ("elementwise", "gemm", "gemm_sm90", "image")  # of csrc/cuda
BINDINGS = ("elementwise", "contraction", "image_side")  # what registers their operators
NAMESPACE = "fastdcgan_cuda_ptx"  # in the place of the shim's
RENAMED = ["-DFASTDCGAN_CUDA_ON_CPU", f"-Dfastdcgan_cuda_on_cpu={NAMESPACE}"]


def _built() -> Path:
    """The operators as a library: the kernels and their launchers are the objects of the extension."""
    extension()
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", *RENAMED, f"-I{ROOT / 'csrc'}"]
    objects = [compiled_host(ROOT / f"csrc/cuda/ops/{name}_bindings.cpp", *flags) for name in BINDINGS]
    objects += [found for room in ROOMS for found in sorted((EXTENSION / "temp/csrc/cuda" / room).rglob("*.o"))]
    return linked("operators", objects)


@functools.cache
def library() -> ctypes.CDLL:
    built = str(_built())
    torch.ops.load_library(built)
    return ctypes.CDLL(built)


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


@contextlib.contextmanager
def cuda_on(machine: Machine, change: Callable[[str], str] = unchanged, capability: int = 80) -> Iterator[PTXBackend]:
    """Inside a `with`, the machine runs what the backend launches on a GPU of this compute capability, with a change to
    the PTX."""
    with launches_on(machine, library(), change, capability), _Known(machine):
        yield PTXBackend()
