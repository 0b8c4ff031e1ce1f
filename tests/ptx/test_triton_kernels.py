"""Triton's PTX on the machine, against float64: kernels that are written here, as Triton's users write them, for belief
in the machine; and the package's own, through its own launch code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles what is run here")

import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.backends.triton import interpreted
from fastdcgan.geometry import Geometry
from fastdcgan.kernels import image_side, image_side_transpose, norm_act
from fastdcgan.kernels.conv import conv
from fastdcgan.kernels.tiles import TileConfig
from fastdcgan.spec import Call, Operand
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.helpers.contractions import reference, wide
from tests.kernels.compiled.compiling import compiled
from tests.kernels.compiled.compiling import vectors as meta_vectors
from tests.kernels.compiled.test_contraction import CASES, compile_case
from tests.kernels.compiled.test_elementwise import PASSES as COMPILED_PASSES
from tests.kernels.compiled.test_elementwise import TENSORS
from tests.kernels.compiled.test_image_side import LAYERS
from tests.kernels.test_contraction import RUN, Case, check_output, check_weight_grad
from tests.ptx.interpreter import ORDERS, Fault, Machine
from tests.ptx.passes import PASSES, check_image_side, check_pass
from tests.ptx.triton_kernels import triton_on

pytestmark = [needs_compiler, pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: nothing is compiled")]
compiles = pytest.mark.compiles
K4 = Geometry((4, 4), (2, 2), (1, 1))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# --- kernels of nobody's --------------------------------------------------------------------------------------------


@triton.jit
def matmul_kernel(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, k, BK):
        at = start + depth
        left = tl.load(a + rows[:, None] * k + at[None, :], mask=(rows[:, None] < m) & (at[None, :] < k), other=0.0)
        right = tl.load(
            b + at[:, None] * n + columns[None, :], mask=(at[:, None] < k) & (columns[None, :] < n), other=0.0
        )
        acc = tl.dot(left, right, acc)
    where = c + rows[:, None] * n + columns[None, :]
    tl.store(where, acc.to(c.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * columns + at, mask=at < columns, other=-float("inf"))
    e = tl.exp(row - tl.max(row, 0))
    tl.store(out + tl.program_id(0) * columns + at, e / tl.sum(e, 0), mask=at < columns)


def unchanged(ptx: str) -> str:
    return ptx


def matmul(
    dtype: torch.dtype, order: str, change: Callable[[str], str] = unchanged, stages: int = 3
) -> tuple[Tensor, Tensor]:
    """(the product, its float64) of matrices whose sizes are no multiples of the tile's."""
    torch.manual_seed(0)
    a, b = torch.randn(72, 144).to(dtype), torch.randn(144, 96).to(dtype)
    out = torch.empty(72, 96, dtype=FP32)
    with triton_on(Machine(order), 80, change=change):
        matmul_kernel[2, 2](a, b, out, 72, 96, 144, BM=64, BN=64, BK=32, num_warps=4, num_stages=stages)
    return out, a.double() @ b.double()


@compiles
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_matrix_product(dtype: torch.dtype, order: str) -> None:
    found, truth = matmul(dtype, order)
    # Of float32 tensor cores read the upper 10 bits of the mantissa.
    assert (found - truth).abs().max() <= (0.2 if dtype == FP32 else 1e-4)


@compiles
def test_reductions_within_and_across_warps() -> None:
    x = torch.randn(5, 700)
    out = torch.empty_like(x)
    with triton_on(Machine("random"), 80):
        softmax_kernel[5,](x, out, 700, BLOCK=1024, num_warps=8)
    assert torch.allclose(out.double(), x.double().softmax(1), atol=1e-7)


def without(pattern: str, which: int, by: str = "") -> Callable[[str], str]:
    """Replaces one occurrence."""

    def change(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[which]
        return ptx[: found.start()] + found.expand(by) + ptx[found.end() :]

    return change


@compiles
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without(r"bar\.sync\s+0;", 1), "race|nobody wrote|cp.async may not"),
        (without(r"cp\.async\.wait_group\s+2;", 0, "cp.async.wait_group 4;"), "cp.async may not have brought"),
        (without(r"cp\.async\.commit_group;", 1), "cp.async may not have brought"),
        (without(r"(cp\.async\.cg\.shared\.global \[ %r\d+) \+ 0", 1, r"\1 + 16"), "race|nobody wrote|is writing"),
    ],
    ids=["a barrier", "a wait", "a commit", "an address"],
)
def test_a_planted_fault_of_a_matrix_product_is_named(change: Callable[[str], str], fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        matmul(BF16, "random", change)


@compiles
@pytest.mark.parametrize(
    "change",
    [
        without(r"(ldmatrix[^;]*\[%r\d+)(\+\d+)?\]", 1, r"\1+512]"),
        without(r"(ldmatrix\S*x4)\.trans", 0, r"\1"),
        without(r"(mma\.sync.*f32 \{ )(%r\d+, %r\d+), (%r\d+, %r\d+)", 3, r"\1\3, \2"),
        without(r"add\.s32 (\s+%r\d+, %r\d+), 1;", 0, r"add.s32 \1, 2;"),
    ],
    ids=["a row", "a transposition", "an accumulator", "a step"],
)
def test_a_planted_change_of_a_matrix_product_is_wrong(change: Callable[[str], str]) -> None:
    try:
        found, truth = matmul(BF16, "forward", change)
    except Fault:
        return
    assert not (found - truth).abs().max() <= 0.5


# --- the package's contractions, at tiles that the heuristic takes for a DCGAN ---------------------------------------

TILE = TileConfig(64, 64, 32, num_warps=4, num_stages=3, descriptors=False)


def dcgan(op: str, dtype: torch.dtype) -> Case:
    size = (4, 4) if op == "conv_transpose" else (8, 8)
    return Case(op, K4, size, images=4, groups=2, channels=(32, 64), dtype=dtype)


def test_one_contraction() -> None:
    """The sample of `make test`."""
    with triton_on(Machine("random"), 80):
        check_output(dcgan("conv", BF16), "activate", "stats", "relu", TILE)


@compiles
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", ["none", "bias", "activate", "stats", "grad_stats"])
@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
def test_contractions(op: str, kind: str, dtype: torch.dtype) -> None:
    """float32 as three products of TF32."""
    prologue = {"none": "none", "stats": "activate"}.get(kind, "bn_backward")
    with triton_on(Machine("random"), 80, tf32=False):
        check_output(dcgan(op, dtype), prologue, kind, "leaky_relu", TILE)


@compiles
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("prologues", [("activate", "bn_backward"), ("bn_backward", "none")])
def test_weight_gradients(prologues: tuple[str, str], dtype: torch.dtype) -> None:
    with triton_on(Machine("random"), 80, tf32=False):
        check_weight_grad(dcgan("weight_grad", dtype), prologues, "leaky_relu", TILE)


@compiles
@pytest.mark.parametrize("op", RUN)
def test_tf32(op: str) -> None:
    """Each factor loses at most 2^-10 of itself where its lower bits don't count."""
    case = dcgan(op, FP32)
    a = Operand(case.tensor(case.channels[0], case.size))
    b = Operand(case.tensor(case.channels[1], case.out_size)) if op == "weight_grad" else case.weight()
    call = case.call(a, b)
    with triton_on(Machine("reverse"), 80, tf32=True):
        found = RUN[op](call, TILE)
    sizes = case.call(Operand(a.x.abs()), Operand(b.x.abs()) if isinstance(b, Operand) else b.abs())
    of = (lambda x: x) if op == "weight_grad" else (lambda x: x[0])
    error, most = (of(found) - of(reference(wide(call)))).abs(), of(reference(wide(sizes)))
    assert (error <= 2.1 * 2**-10 * most).all() and error.max() > 2**-16 * most.max()


@compiles
@pytest.mark.parametrize("op", RUN)
def test_ragged_edges_and_sums_in_parts(op: str) -> None:
    """Channels of no multiple of 16 bytes, a geometry of its own, a sum of three parts."""
    case = Case(op, Geometry((3, 3), (2, 2), (1, 1)), (5, 7), images=1, groups=3, channels=(20, 41), dtype=BF16)
    tile = TileConfig(64, 32, 32, num_warps=4, num_stages=3, splits=3, descriptors=False)
    with triton_on(Machine("random"), 80):
        if op == "weight_grad":
            check_weight_grad(case, ("bn_backward", "activate"), "elu", tile)
        else:
            check_output(case, "bn_backward", "grad_stats", "silu", tile)


@compiles
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_the_same_bits_in_any_order(order: str) -> None:
    case = dcgan("conv", BF16)
    call = case.call(case.operand("activate", 32, case.size, "relu"), case.weight(), case.epilogue("stats", "relu"))
    results = []
    for each in ("forward", order):
        with triton_on(Machine(each), 80):
            results.append(conv(call, TILE))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# --- all of them: what the machine knows is what occurs --------------------------------------------------------------


@compiles
@pytest.mark.slow
def test_every_instruction_of_sm_80_is_known() -> None:
    calls: list[Callable[[], object]] = []
    for y in TENSORS.values():
        calls += [lambda f=f, y=y: f(y, meta_vectors(4, y.shape[1])) for f in COMPILED_PASSES.values()]
    for layers in LAYERS.values():
        calls += layers.values()
    machine, names = Machine(), set()
    for call in calls:
        for kernel in compiled(call, 80):
            names |= set(machine.load(kernel.ptx).instructions)
    for case in CASES:
        if case.arch == 80:
            names.update(*(machine.load(kernel.ptx).instructions for kernel in compile_case(case)))
    assert {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "cp.async.wait_group", "bar.sync"} <= names


# --- the elementwise passes ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def passes_on(machine: Machine) -> Iterator[Any]:
    with triton_on(machine, 80):
        yield norm_act


@compiles
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    machine = Machine("random")
    assert machine.written(check_pass(name, dtype, layout, passes_on(machine)))


IMAGE_SIDE: dict[str, Callable[[Call], object]] = {
    "conv": image_side.conv,
    "conv_transpose": image_side_transpose.conv_transpose,
    "weight_grad": image_side.weight_grad,
}


@compiles
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_image_side(name: str, dtype: torch.dtype) -> None:
    def run(call: Call) -> object:
        with triton_on(Machine("random"), 80, tf32=False):
            return IMAGE_SIDE[name](call)

    check_image_side(name, dtype, run)
