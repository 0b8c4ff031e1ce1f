"""Runs PTX on the CPU: `machine/` in C++, built when it is first asked for."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.cuda_on_cpu.host_programs import ROOT, compiled

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "ptx"
# Products and sums stay apart, as PTX has them; integers wrap.
FLAGS = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fwrapv", "-fPIC", "-Wall", "-Wextra", "-Werror"]
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
Dim = tuple[int, int, int]


class Fault(Exception):
    """What the machine, or the parser, found wrong: the line, the thread, the reason."""


@functools.cache
def library() -> ctypes.CDLL:
    sources = sorted((HERE / "machine").glob("*.cpp"))
    objects = [compiled(BUILD / f"{source.stem}.o", ["-c", str(source)], FLAGS) for source in sources]
    found = ctypes.CDLL(str(compiled(BUILD / "machine.so", list(map(str, objects)), ["-shared"])))
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "machine": (pointer, []),
        "machine_free": (None, [pointer]),
        "memory_add": (text, [pointer, text, pointer, size, ctypes.c_int]),
        "memory_written": (text, [pointer, pointer, size, pointer]),
        "load": (text, [pointer, text, pointer]),
        "names": (text, [pointer, ctypes.c_int]),
        "launch": (
            text,
            [pointer, text, pointer, pointer, size, text, size, ctypes.c_int, ctypes.c_uint32, ctypes.c_int, pointer],
        ),
        "counting": (pointer, [size]),
        "counting_free": (None, [pointer]),
        "counted": (text, [pointer, ctypes.c_int]),
        "tensor_map": (text, [pointer, ctypes.c_int, ctypes.c_uint32, *4 * [pointer], ctypes.c_int, ctypes.c_int]),
        "parameters": (ctypes.c_int, [pointer, text, pointer, ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, f"ptx_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def _check(error: bytes | None) -> None:
    if error is not None:
        raise Fault(error.decode())


@dataclass(frozen=True)
class Counts:
    """What the blocks of a launch that were run did. Instructions, requests and wavefronts are of warps."""

    kernel: str
    number: dict[str, int]  # by the names of Counting::text in machine/counting.cpp
    waste: list[tuple[str, int, int, int]]  # PTX, how often it ran, its sectors and its wavefronts beyond the least

    def __getitem__(self, name: str) -> int:
        return self.number[name]


class Machine:
    """A GPU's memory and clock. Tensors keep their memory, which kernels may touch once it was added."""

    def __init__(self, order: str = "forward", seed: int = 1, counted: int | None = None) -> None:
        """`order`: in which blocks and warps run, "forward", "reverse" or "random". `counted`: each launch runs an even
        sample of its blocks, until their warps have run so many instructions, and adds to `counts`."""
        self.order, self.seed, self.counted = order, seed, counted
        self.counts: list[Counts] = []
        self.launched: list[str] = []  # kernels
        self._lib = library()
        self._handle = self._lib.ptx_machine()
        self._kept: dict[
            int, tuple[int, Tensor]
        ] = {}  # the first byte of a storage: its bytes, and what keeps it alive
        self._loaded: dict[str, ctypes.c_void_p] = {}

    def add(self, x: Tensor, name: str = "a tensor", written: bool = True) -> int:
        """The address of `x`, whose storage is global memory from now on; not written: nobody may use what is in it."""
        assert x.device.type == "cpu"
        storage = x.untyped_storage()
        begin = storage.data_ptr()
        if storage.nbytes() and begin not in self._kept:
            known = written or self.counted is not None  # where some blocks run, others read what wasn't written
            self.add_memory(begin, storage.nbytes(), f"{name} ({'x'.join(map(str, x.shape))})", known)
            self._kept[begin] = x
        return x.data_ptr()

    def add_memory(self, begin: int, size: int, name: str = "memory", written: bool = True) -> None:
        """Memory that stays where it is as long as the machine."""
        _check(self._lib.ptx_memory_add(self._handle, name.encode(), begin, size, written))
        self._kept.setdefault(begin, None)

    def written(self, x: Tensor) -> bool:
        """Whether every byte of a contiguous tensor's memory was written."""
        found = ctypes.c_int()
        _check(
            self._lib.ptx_memory_written(self._handle, x.data_ptr(), x.numel() * x.element_size(), ctypes.byref(found))
        )
        return bool(found.value)

    def load(self, ptx: str) -> Module:
        """The kernels of a text of PTX."""
        if ptx not in self._loaded:
            handle = ctypes.c_void_p()
            _check(self._lib.ptx_load(self._handle, ptx.encode(), ctypes.byref(handle)))
            self._loaded[ptx] = handle
        return Module(self, self._loaded[ptx], ptx)

    def __del__(self) -> None:
        self._lib.ptx_machine_free(self._handle)


class Module:
    """PTX, read, as a machine has it."""

    def __init__(self, machine: Machine, handle: ctypes.c_void_p, ptx: str) -> None:
        self._machine, self._lib, self._handle, self._ptx = machine, machine._lib, handle, ptx

    @property
    def kernels(self) -> list[str]:
        return self._lib.ptx_names(self._handle, 0).decode().split()

    @property
    def instructions(self) -> list[str]:
        """The names of the instructions that occur."""
        return self._lib.ptx_names(self._handle, 1).decode().split()

    def fields(self, kernel: str) -> list[tuple[int, int]]:
        """(offset, bytes) of each parameter of a kernel."""
        pairs = (ctypes.c_uint64 * 2048)()
        count = self._lib.ptx_parameters(self._handle, kernel.encode(), pairs, 1024)
        assert 0 <= count <= 1024, kernel
        return [(pairs[2 * k], pairs[2 * k + 1]) for k in range(count)]

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        parameters: bytes,
        shared: int = 0,
        early: bool = False,
    ) -> None:
        """Run a kernel. `parameters`: its memory of parameters; `shared`: bytes of dynamic shared memory; `early`: it
        may begin before the kernels before it have ended."""
        dims = [(ctypes.c_uint32 * 3)(*[*sizes, 1, 1][:3]) for sizes in (grid, block)]
        name, size, order = kernel.encode(), len(parameters), ORDERS[self._machine.order]
        machine, lib = self._machine, self._lib
        machine.launched.append(kernel)
        counting = None if machine.counted is None else ctypes.c_void_p(lib.ptx_counting(machine.counted))
        try:
            numbers = shared, parameters, size, order, machine.seed, early
            _check(lib.ptx_launch(self._handle, name, *dims, *numbers, counting))
            if counting is not None:
                machine.counts.append(self._counts(kernel, counting))
        finally:
            if counting is not None:
                lib.ptx_counting_free(counting)

    def _counts(self, kernel: str, counting: ctypes.c_void_p) -> Counts:
        numbers, lines = (self._lib.ptx_counted(counting, which).decode().splitlines() for which in (0, 1))
        ptx, waste = self._ptx.splitlines(), []
        for line, *many in (map(int, text.split()) for text in lines):
            waste.append((" ".join(ptx[line - 1].split()), *many))
        return Counts(kernel, {name: int(number) for name, number in map(str.split, numbers)}, waste)

    def __call__(
        self, kernel: str, grid: Sequence[int], block: Sequence[int], *arguments: Any, shared: int = 0
    ) -> None:
        """Run a kernel with numbers, and tensors that the machine has: integers and floats as wide as the parameter."""
        fields = self.fields(kernel)
        assert len(fields) == len(arguments), f"{kernel} has {len(fields)} parameters"
        memory = bytearray(fields[-1][0] + fields[-1][1] if fields else 0)
        for (offset, size), argument in zip(fields, arguments, strict=True):
            memory[offset : offset + size] = packed(argument, size)
        self.launch(kernel, grid, block, bytes(memory), shared)


def tensor_map(
    base: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int,
    nan: bool = False,
) -> bytes:
    """The 128 bytes that cuTensorMapEncodeTiled gives, or a Fault where it would refuse. The innermost dimension first;
    `strides` in bytes of all others; `dtype`, `swizzle`: as the driver numbers them."""
    memory, rank = ctypes.create_string_buffer(128), len(sizes)
    arrays = (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * rank)(*strides), (ctypes.c_uint32 * rank)(*box)
    _check(library().ptx_tensor_map(memory, dtype, rank, base, *arrays, swizzle, nan))
    return memory.raw


def packed(argument: Any, size: int) -> bytes:
    """The bytes of a parameter."""
    if isinstance(argument, Tensor):
        argument = argument.data_ptr()
    if isinstance(argument, float):
        return struct.pack({2: "e", 4: "f", 8: "d"}[size], argument)
    return (0 if argument is None else int(argument)).to_bytes(size, "little", signed=int(argument or 0) < 0)
