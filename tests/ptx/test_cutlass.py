"""GEMMs of CUTLASS, whose kernels are known to be right on GPUs, on the machine: belief in the machine doesn't rest on
what was written here."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.cuda.compiling import NVCC, needs_nvcc
from tests.cuda_on_cpu.host_programs import compiled, needs_compiler
from tests.ptx.interpreter import BUILD, HERE, ORDERS, Fault, Machine
from tests.ptx.runtime import launches_on, linked, unchanged


def headers() -> Path | None:
    """The folder of CUTLASS's headers, which its package has beside what Python can import."""
    try:
        package = importlib.metadata.distribution("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(package.locate_file("cutlass_library/source/include"))


needs_cutlass = pytest.mark.skipif(headers() is None, reason="the package nvidia-cutlass is not here")
pytestmark = [needs_nvcc, needs_compiler, needs_cutlass, pytest.mark.compiles]
ARCHITECTURES = {80: "80", 90: "90a"}
OUT = {"k_major": torch.bfloat16, "mn_major": torch.float32}
Change = Callable[[str], str]


@functools.cache
def library(capability: int) -> ctypes.CDLL:
    architecture = f"compute_{ARCHITECTURES[capability]}"
    flags = ["-std=c++17", "-w", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", f"-I{headers()}"]
    flags += ["-no-compress", f"-gencode=arch={architecture},code={architecture}"]
    name = f"cutlass_sm{capability}"
    built = compiled(BUILD / "cuda" / f"{name}.o", ["-c", str(HERE / f"{name}.cu")], flags, by=NVCC)
    return ctypes.CDLL(str(linked(name, [built])))


def gemm(
    capability: int, name: str, shape: tuple[int, int, int], order: str = "random", change: Change = unchanged
) -> tuple[Tensor, Tensor]:
    """(what CUTLASS computes, what is right): of whole numbers whose sums are exact in float32."""
    m, n, k = shape
    a, b = (torch.randint(-9, 9, size).bfloat16() for size in ((m, k), (n, k)))
    truth = (a.double() @ b.double().T).to(OUT[name])
    if name == "mn_major":
        a, b = a.T.contiguous(), b.T.contiguous()
    machine, lib = Machine(order), library(capability)
    machine.add(a), machine.add(b)
    with launches_on(machine, lib, change, capability):
        found = torch.empty(m, n, dtype=OUT[name])
        assert getattr(lib, name)(*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, found)), m, n, k) == 0
    return found, truth


@pytest.mark.parametrize("shape", [(128, 128, 64), (136, 72, 264)], ids=str)
@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_gemm(capability: int, name: str, shape: tuple[int, int, int]) -> None:
    for order in ORDERS:
        found, truth = gemm(capability, name, shape, order)
        assert torch.equal(found, truth)


def changed(pattern: str, by: str, which: int | None = None) -> Change:
    """Replaces what a pattern finds: all of it, or one."""

    def change(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))
        for at in reversed(found) if which is None else [found[which]]:
            ptx = ptx[: at.start()] + at.expand(by) + ptx[at.end() :]
        return ptx

    return change


def stride_of_descriptors(ptx: str) -> str:
    """Twice as far from 8 rows to the next."""
    return re.sub(r"\d{19}", lambda found: str(int(found[0]) + (int(found[0]) >> 32 & 0x3FFF) * 2**32), ptx)


PLANTED: dict[tuple[int, str], tuple[Change, str]] = {
    (80, "a wait"): (changed(r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"), "cp.async may not have brought"),
    (80, "a group"): (changed(r"cp\.async\.commit_group;", "", 0), "cp.async may not have brought"),
    (80, "a barrier"): (changed(r"bar\.sync 0;", "", 1), "race"),
    (80, "a barrier of the epilogue"): (changed(r"bar\.sync 0;", "", 4), "race"),
    (90, "bytes"): (changed(r"(expect_tx.*, )%r\d+;", r"\g<1>1024;"), "more bytes"),
    (90, "a parity of those that multiply"): (changed(r"(try_wait.*\]), %r\d+,", r"\1, 1,", 1), "brought|race"),
    (90, "an arrival of those that multiply"): (changed(r"mbarrier\.arrive\.shared::cluster.*;", "", 0), "deadlock"),
    (90, "a wait for products"): (
        changed(r"wgmma\.wait_group\S+ 1;", ""),
        "race: a bulk copy .* writes .* wgmma of warp",
    ),
    (90, "a fence of registers"): (changed(r"wgmma\.fence\S+;", "", 0), "without wgmma.fence"),
    (90, "a proxy fence"): (
        changed(r"fence\.proxy\.async\.shared::cta;", "", 0),
        "no proxy fence: a bulk copy",
    ),
    (90, "a wait for stores"): (changed(r"cp\.async\.bulk\.wait_group\.read \d;", ""), "race|ends before"),
    (90, "a barrier of warps"): (changed(r"bar\.sync %r\d+, %r\d+;", "", 0), "race"),
}


@pytest.mark.parametrize(("capability", "what"), PLANTED, ids=str)
def test_a_planted_fault_is_named(capability: int, what: str) -> None:
    change, fault = PLANTED[capability, what]
    with pytest.raises(Fault, match=fault):
        gemm(capability, "k_major", (64, 128, 320), change=change)


@pytest.mark.parametrize(
    ("capability", "change"),
    [
        (80, changed(r"(ldmatrix[^;]*\[%r\d+)(\+\d+)?\]", r"\1+512]", 0)),
        (80, changed(r"xor\.b32 (.*), 32;", r"xor.b32 \1, 0;", 0)),
        (90, stride_of_descriptors),
        (90, changed(r"(stmatrix[^;]*\[%r\d+)\]", r"\1+16]", 0)),
    ],
    ids=["a row", "a swizzle", "a descriptor's stride", "a row of the result"],
)
def test_a_planted_address_is_wrong(capability: int, change: Change) -> None:
    with pytest.raises((AssertionError, Fault)):
        assert torch.equal(*gemm(capability, "k_major", (64, 128, 320), change=change))
