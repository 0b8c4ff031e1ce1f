"""CUDA kernels of `csrc/cuda` on the machine: the package's own operators and launchers as nvcc compiles them, on CPU
tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastdcgan
from fastdcgan import backends
from fastdcgan.backends import cuda_tiles
from fastdcgan.backends.cuda import CUDABackend
from fastdcgan.dispatch import training_ops
from tests.csrc.cuda.compiling import EXTENSION, extension
from tests.cuda_on_cpu.host_programs import ROOT
from tests.ptx.interpreter import Machine
from tests.ptx.runtime import compiled_host, launches_on, linked, unchanged

ROOMS = ("elementwise", "gemm", "gemm_sm90", "image", "train")  # of csrc/cuda
BINDINGS = ("elementwise", "contraction", "image_side", "training")  # what registers their operators
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


class Operators:
    """The operators, which make the tensors that they get the machine's memory."""

    machine: Machine  # of all of them: plans keep those that they were made with

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(getattr(torch.ops, NAMESPACE), name)

        def call(*args: Any) -> Any:
            for x in tree_leaves(args):
                if isinstance(x, Tensor):
                    self.machine.add(x)
            return operator(*args)

        return call


class PTXBackend(CUDABackend):
    """The CUDA backend on CPU tensors."""

    device_type = "cpu"

    @property
    def ops(self) -> Any:
        return Operators()


@contextlib.contextmanager
def cuda_on(machine: Machine, change: Callable[[str], str] = unchanged, capability: int = 80) -> Iterator[PTXBackend]:
    """Inside a `with`, the machine runs what the backend launches on a GPU of this compute capability, with a change to
    the PTX."""
    listening = launches_on(machine, library(), change, capability)
    with listening, mock.patch.object(Operators, "machine", machine, create=True):
        yield PTXBackend()


@contextlib.contextmanager
def package_on(machine: Machine, capability: int) -> Iterator[None]:
    """Inside a `with`, what the package would run on a GPU of this compute capability runs on the machine, on CPU
    tensors: blocks, FusedAdam, the loss, images."""
    gpu = replace(cuda_tiles.H100, sm90=capability == 90)
    with (
        cuda_on(machine, capability=capability) as on,
        mock.patch.object(cuda_tiles, "device_of", return_value=gpu),
        mock.patch.dict(backends._loaded, cuda=on),
        mock.patch.dict(backends._selected, clear=True),
        mock.patch.dict(training_ops._reasons, cpu=None),
        mock.patch.dict(training_ops.ADAM_CHUNK, cpu=training_ops.ADAM_CHUNK["cuda"]),
        mock.patch.object(training_ops, "operators", return_value=on.ops),
        fastdcgan.backend("cuda"),
    ):
        yield
