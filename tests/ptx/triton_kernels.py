"""Triton's kernels on the machine: what would be launched on a GPU, with the arguments that the driver would get.

Kernels are compiled as in `tests/kernels/compiled`, for a GPU that need not be there; a launch then hands PTX, grid and
arguments to the machine. Tensors are the CPU's, and their memory is the GPU's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdcgan.kernels import tiles
from tests.kernels.compiled.compiling import Driver
from tests.ptx.interpreter import Machine, packed, tensor_map

BYTES = {
    "i1": 1,
    "i8": 1,
    "u8": 1,
    "i16": 2,
    "u16": 2,
    "i32": 4,
    "u32": 4,
    "fp32": 4,
    "f32": 4,
    "i64": 8,
    "u64": 8,
    "fp64": 8,
    "map": 128,
}


def _flat(
    machine: Machine, signature: Any, arguments: Any, maps: Iterator[dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """(type, argument) of what a kernel gets: nothing of what was compiled into it. Tensors are the machine's memory
    from then on. `maps`: what the compiler chose for each tensor descriptor."""
    for kind, argument in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(machine, kind, argument, maps)
        elif isinstance(argument, TensorDescriptor):
            machine.add(argument.base)
            yield "map", _tensor_map(argument, next(maps))
            yield from (("i32", size) for size in argument.shape)
            yield from (("i64", stride) for stride in argument.strides)
        elif kind != "constexpr":
            if isinstance(argument, Tensor):
                machine.add(argument)
            yield kind, argument


def _tensor_map(x: TensorDescriptor, meta: dict[str, Any]) -> bytes:
    """As `fill_tma_descriptor_tiled` of Triton's driver asks the GPU's for it."""
    assert not meta["fp4_padded"] and not getattr(x, "round_f32_to_tf32", False)  # of Triton 3.7
    sizes, strides, box = (list(reversed(values)) for values in (x.shape, x.strides, meta["block_size"]))
    steps = [stride * meta["elem_size"] for stride in strides[1:]]
    dtype = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    return tensor_map(x.base.data_ptr(), dtype, sizes, steps, box, meta["swizzle"], x.padding == "nan")


def launch(machine: Machine, binary: Any, ptx: str, grid: tuple[int, ...], arguments: list[Any]) -> None:
    """What Triton's launcher does, but for the driver."""
    metadata = binary.metadata
    assert not metadata.global_scratch_size and not metadata.profile_scratch_size and metadata.num_ctas == 1
    maps = iter(metadata.tensordesc_meta or ())
    given = [
        *_flat(machine, binary.src.signature.values(), arguments, maps),
        *2 * [("*i8", None)],
    ]  # the last two are scratch
    assert next(maps, None) is None
    module = machine.load(ptx)
    memory = b""
    for (offset, size), (kind, argument) in zip(module.fields(metadata.name), given, strict=True):
        assert size == (8 if kind[0] == "*" else BYTES[kind])
        value = argument if isinstance(argument, bytes) else packed(argument, size)
        memory = memory.ljust(offset, b"\0") + value
    module.launch(metadata.name, grid, (32 * metadata.num_warps,), memory, metadata.shared)


class _Fresh(TorchDispatchMode):
    """Memory that torch leaves as it is has values that nobody wrote."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like):
            self.machine.add(found, written=False)
        return found


@contextlib.contextmanager
def triton_on(
    machine: Machine, arch: int, tf32: bool = True, change: Callable[[str], str] = lambda ptx: ptx
) -> Iterator[None]:
    """Inside a `with`, Triton compiles for `arch` and the machine runs what it launches, with a change to the PTX."""
    run = JITFunction.run

    def on_machine(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        binary = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        bound, _, _ = kernel.device_caches[arch][4](*args, debug=kernel.debug, **kwargs)
        launch(machine, binary, change(binary.asm["ptx"]), grid, list(bound.values()))
        return binary

    with (
        mock.patch.object(triton.runtime.driver, "_active", Driver(arch)),
        mock.patch.object(JITFunction, "run", on_machine),
        mock.patch.object(tiles, "device_of", return_value=tiles.KNOWN[arch]),
        torch.backends.cudnn.flags(allow_tf32=tf32),
        _Fresh(machine),
    ):
        yield
