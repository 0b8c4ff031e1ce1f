"""Compiling what a function launches for a GPU that need not be there, and what the compiler made of it.

Kernels are compiled on the way that a launch takes (with Triton's own specialisation of the arguments), by a driver
that names a target in the place of a GPU, for tensors without memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastdcgan.kernels import tiles

ARCHITECTURES = tuple(tiles.KNOWN)
TENSOR_CORES = dict.fromkeys(ARCHITECTURES, r"mma\.sync")
TENSOR_CORES |= {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma|mma\.sync"}


class Driver:
    """All that Triton's way to a launch asks of a GPU's driver before the launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@dataclass(frozen=True)
class Compiled:
    """A launch, and what its kernel became."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    ptx: str
    registers: int
    stack: int  # bytes of local memory for each thread: registers are spilled there
    shared_memory: int  # bytes
    threads: int

    def count(self, instruction: str) -> int:
        """Instructions of the PTX that the regular expression matches."""
        return len(re.findall(instruction, self.ptx))

    @property
    def bytes_loaded(self) -> int:
        """By one program, in 16-byte accesses, each instruction counted once."""
        asynchronous = r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"
        return 16 * self.threads * (self.count(r"ld\.global\.v4\.b32") + self.count(asynchronous))

    @property
    def bytes_stored(self) -> int:
        return 16 * self.threads * self.count(r"st\.global\.v4\.b32")


def compiled(call: Callable[[], object], arch: int) -> list[Compiled]:
    """What `call` launches, compiled for `arch` and not started, with the tiles and TF32 as they are used there."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        binary = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _resource_usage(binary.asm["cubin"])))
        found.append(
            Compiled(
                kernel,
                grid,
                arguments,
                binary.asm["ptx"],
                int(usage["REG"]),
                int(usage["STACK"]) + int(usage["LOCAL"]),
                binary.metadata.shared,
                32 * binary.metadata.num_warps,
            )
        )

    with (
        mock.patch.object(triton.runtime.driver, "_active", Driver(arch)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tiles, "device_of", return_value=tiles.KNOWN[arch]),
        torch.backends.cudnn.flags(allow_tf32=True),
    ):
        call()
    return found


def _resource_usage(cubin: bytes) -> str:
    """Of the cuobjdump that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_fits(kernel: Compiled, arch: int) -> None:
    """No kernel spills, but for the two registers that ptxas gives up on sm_89 where one more block then has room; or
    takes more shared memory than one program may have."""
    assert kernel.stack <= (8 if arch == 89 else 0)
    assert kernel.shared_memory <= tiles.KNOWN[arch].shared_memory


def images(
    batch: int, channels: int, size: int, dtype: torch.dtype, layout: torch.memory_format = torch.channels_last
) -> Tensor:
    """[batch, channels, size, size] without memory."""
    return torch.empty(batch, channels, size, size, dtype=dtype, device="meta").contiguous(memory_format=layout)


def vectors(rows: int, channels: int) -> Tensor:
    """[rows, 1, channels] without memory: a coef, or what is like it."""
    return torch.empty(rows, 1, channels, device="meta")
