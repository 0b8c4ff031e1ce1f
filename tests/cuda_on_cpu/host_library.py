"""The CUDA extension as it is but for the compiler: its operators on CPU tensors, every kernel run by the shim."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastdcgan import backends
from fastdcgan.backends import cuda_facts
from fastdcgan.backends.cuda import CUDABackend
from fastdcgan.dispatch import training_ops
from tests.cuda_on_cpu.host_programs import BUILD, HERE, ROOT, compiled, includes

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-w", "-DFASTDCGAN_CUDA_ON_CPU"]


def _torch_flags() -> list[str]:
    package = Path(torch.__file__).parent
    return [f"-isystem{package / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


@functools.cache
def library() -> ctypes.CDLL:
    """Compile what has changed, register the operators as torch.ops.fastdcgan_cuda_on_cpu."""
    sources = sorted(path for path in (ROOT / "csrc/cuda").rglob("*") if path.suffix in (".cu", ".cpp"))
    sources.append(HERE / "host_library.cpp")
    flags = [*FLAGS, *_torch_flags(), *includes()]
    objects = [compiled(BUILD / f"{source.stem}.o", ["-c", "-x", "c++", str(source)], flags) for source in sources]
    package = Path(torch.__file__).parent / "lib"
    linked = compiled(
        BUILD / "operators.so", list(map(str, objects)), ["-shared"], [f"-L{package}", "-ltorch_cpu", "-lc10"]
    )
    torch.ops.load_library(str(linked))
    return ctypes.CDLL(str(linked))


def set_order(name: str, seed: int = 1) -> None:
    """In which order blocks, warps and lanes run: "forward", "reverse" or "random"."""
    library().cuda_on_cpu_set_order(ORDERS[name], seed)


def set_multiprocessors(count: int) -> None:
    library().cuda_on_cpu_set_multiprocessors(count)


class HostCUDABackend(CUDABackend):
    """`backend("cuda")` on CPU tensors."""

    device_type = "cpu"

    @property
    def ops(self) -> Any:
        return torch.ops.fastdcgan_cuda_on_cpu

    def require(self) -> None:
        library()
        cuda_facts.require_agreement(self.ops)


@contextlib.contextmanager
def cuda_backend_on_cpu() -> Iterator[None]:
    """`backend("cuda")` runs on CPU tensors."""
    library()
    with mock.patch.dict(backends._loaded, cuda=HostCUDABackend()), mock.patch.dict(backends._selected, clear=True):
        yield


def pytest_configure() -> None:
    """`pytest -p tests.cuda_on_cpu.host_library`: FusedAdam, the loss and images run CUDA kernels on CPU tensors."""
    library()
    training_ops.NAMESPACES["cpu"] = "fastdcgan_cuda_on_cpu"
    training_ops.ADAM_CHUNK["cpu"] = training_ops.ADAM_CHUNK["cuda"]
