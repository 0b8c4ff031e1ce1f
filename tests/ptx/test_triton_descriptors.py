"""Triton's PTX for sm_90 on the machine, against float64: tensor maps, bulk copies, mbarriers, products of warpgroups.
A kernel that is written here, as Triton's users write it, for belief in the machine; and the package's own
contractions, at tiles that the heuristic takes for a DCGAN."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles what is run here")

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdcgan.backends.triton import interpreted
from fastdcgan.geometry import Geometry
from fastdcgan.kernels.conv import conv
from fastdcgan.kernels.tiles import TileConfig
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.kernels.test_contraction import Case, check_output, check_weight_grad
from tests.ptx.interpreter import ORDERS, Fault, Machine
from tests.ptx.triton_kernels import triton_on

pytestmark = [
    needs_compiler,
    pytest.mark.compiles,
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: nothing is compiled"),
]
K4 = Geometry((4, 4), (2, 2), (1, 1))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = ("conv", "conv_transpose")


def unchanged(ptx: str) -> str:
    return ptx


# --- a kernel of nobody's -------------------------------------------------------------------------------------------


@triton.jit
def matmul_kernel(a, b, c, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACROSS: tl.constexpr):
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, depth, BK):
        left = a.load([k, row]).T if ACROSS else a.load([row, k])
        right = b.load([k, column]) if ACROSS else b.load([column, k]).T
        acc = tl.dot(left, right, acc)
    c.store([row, column], acc)


def matmul(
    dtype: torch.dtype,
    order: str,
    change: Callable[[str], str] = unchanged,
    across: bool = False,
    step: int = 64,
    warps: int = 4,
) -> tuple[Tensor, Tensor]:
    """(the product, its float64) of matrices whose sizes are no multiples of the tile's. Both factors are multiplied
    from shared memory."""
    torch.manual_seed(0)
    m, n, k = 152, 136, 168
    a, b = (torch.randn(*((k, side) if across else (side, k))).to(dtype) for side in (m, n))
    out = torch.empty(m, n)
    tile = (64 if warps == 4 else 128, 64, step)
    boxes = [(tile[2], side) if across else (side, tile[2]) for side in tile[:2]]
    left, right = (TensorDescriptor.from_tensor(x, list(box)) for x, box in zip((a, b), boxes, strict=True))
    c = TensorDescriptor.from_tensor(out, list(tile[:2]))
    with triton_on(Machine(order), 90, change=change):
        grid = (triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1]))
        matmul_kernel[grid](left, right, c, k, *tile, ACROSS=across, num_warps=warps, num_stages=3)
    x, y = a.double(), b.double()
    return out, x.T @ y if across else x @ y.T


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("step", [16, 32, 64], ids="swizzle of {} numbers".format)
def test_a_matrix_product(step: int, across: bool, order: str) -> None:
    """Each swizzle, and each way in which a factor can lie."""
    found, truth = matmul(BF16, order, across=across, step=step)
    assert (found - truth).abs().max() <= 1e-4


@pytest.mark.parametrize(("dtype", "step"), [(FP16, 64), (FP32, 32)], ids=str)
def test_a_matrix_product_of_other_numbers(dtype: torch.dtype, step: int) -> None:
    """Of float32 tensor cores read the upper 10 bits of the mantissa. Two warpgroups share a tile."""
    found, truth = matmul(dtype, "random", step=step, warps=8)
    assert (found - truth).abs().max() <= (0.2 if dtype == FP32 else 1e-4)


def test_it_is_what_sm_90_has() -> None:
    text = ""

    def kept(ptx: str) -> str:
        nonlocal text
        text = ptx
        return ptx

    matmul(BF16, "forward", kept)
    for part in (
        r"mbarrier\.try_wait\.parity",
        r"cp\.async\.bulk\.tensor\.2d\.shared::(cta|cluster)\.global",
        r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta",
        r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.bf16\.bf16",
    ):
        assert re.search(part, text), part


def changed(pattern: str, by: str, which: int = 0) -> Callable[[str], str]:
    """Replaces one occurrence."""

    def change(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[which]
        return ptx[: found.start()] + found.expand(by) + ptx[found.end() :]

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (changed(r"(expect_tx.*), (\d+);", r"\1, 128;"), "may not have brought|more bytes than its mbarrier expects"),
        (changed(r"(expect_tx.*), (\d+);", r"\1, 65536;"), "deadlock: .* 0 arrivals and .* bytes never come"),
        (changed(r"mbarrier\.init(.*), 1;", r"mbarrier.init\1, 2;"), "deadlock: .* 1 arrivals and"),
        (changed(r"@%p\d+ mbarrier\.init.*;", ""), "no mbarrier at byte"),
        (changed(r"(try_wait.*\]), (%r\d+);", r"\1, 1;"), "may not have brought|race"),
        (changed(r"wgmma\.wait_group\.sync\.aligned \s*0;", "", -1), "nobody wrote|ends before this wgmma"),
        (changed(r"wgmma\.wait_group\.sync\.aligned \s*1;", ""), "race: a bulk copy .*, which a wgmma of warp"),
        (changed(r"wgmma\.fence\.sync\.aligned;", ""), "without wgmma.fence"),
        (changed(r"fence\.proxy\.async.*;", "", -1), "no proxy fence: a bulk copy .* reads .* which thread"),
        (changed(r"cp\.async\.bulk\.wait_group\.read", "// ", -1), "ends before this bulk copy|race: writes"),
        (changed(r"(cp\.async\.bulk\.tensor\.2d\.global.*), \[%r\d+\];", r"\1, [%r1];"), "aligned|outside|nobody"),
    ],
    ids=[
        "fewer bytes",
        "more bytes",
        "an arrival",
        "an mbarrier",
        "a parity",
        "the last wait",
        "a wait",
        "a fence of registers",
        "a fence between proxies",
        "a wait of a store",
        "an address",
    ],
)
def test_a_planted_fault_of_a_matrix_product_is_named(change: Callable[[str], str], fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        matmul(BF16, "random", change, step=32)


# --- the package's contractions -------------------------------------------------------------------------------------

TILE = {2: TileConfig(64, 64, 64, num_warps=4, num_stages=4), 4: TileConfig(64, 64, 32, num_warps=4, num_stages=4)}


def dcgan(op: str, dtype: torch.dtype) -> Case:
    size = (4, 4) if op == "conv_transpose" else (8, 8)
    return Case(op, K4, size, images=4, groups=2, channels=(32, 64), dtype=dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", ["none", "bias", "activate", "stats", "grad_stats"])
@pytest.mark.parametrize("op", OPS)
def test_contractions(op: str, kind: str, dtype: torch.dtype) -> None:
    """float32 as three products of TF32."""
    prologue = {"none": "none", "stats": "activate"}.get(kind, "bn_backward")
    with triton_on(Machine("random"), 90, tf32=False):
        check_output(dcgan(op, dtype), prologue, kind, "leaky_relu", TILE[dtype.itemsize])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("prologues", [("activate", "bn_backward"), ("bn_backward", "none")])
def test_weight_gradients(prologues: tuple[str, str], dtype: torch.dtype) -> None:
    with triton_on(Machine("random"), 90, tf32=False):
        check_weight_grad(dcgan("weight_grad", dtype), prologues, "leaky_relu", TILE[dtype.itemsize])


@pytest.mark.parametrize(
    "tile",
    [
        TileConfig(128, 256, 64, num_warps=8, num_stages=3),
        TileConfig(128, 128, 64, num_warps=8, num_stages=4),
        TileConfig(128, 64, 64, num_warps=4, num_stages=4),
        TileConfig(64, 128, 64, num_warps=8, num_stages=4),
        TileConfig(128, 32, 64, num_warps=4, num_stages=4),
        TileConfig(64, 16, 64, num_warps=4, num_stages=4, splits=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_tiles_of_the_heuristic(op: str, tile: TileConfig) -> None:
    with triton_on(Machine("random"), 90):
        check_output(dcgan(op, BF16), "activate", "stats", "relu", tile)


@pytest.mark.parametrize("op", [*OPS, "weight_grad"])
def test_ragged_edges_and_sums_in_parts(op: str) -> None:
    """Tiles that reach beyond the tensors on each side, a sum of three parts."""
    case = Case(op, Geometry((3, 3), (2, 2), (1, 1)), (6, 10), images=1, groups=3, channels=(24, 40), dtype=BF16)
    tile = TileConfig(64, 32, 32, num_warps=4, num_stages=3, splits=3)
    with triton_on(Machine("random"), 90):
        if op == "weight_grad":
            check_weight_grad(case, ("bn_backward", "activate"), "elu", tile)
        else:
            check_output(case, "bn_backward", "grad_stats", "silu", tile)


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_the_same_bits_in_any_order(order: str) -> None:
    case = dcgan("conv", BF16)
    call = case.call(case.operand("activate", 32, case.size, "relu"), case.weight(), case.epilogue("stats", "relu"))
    results = []
    for each in ("forward", order):
        with triton_on(Machine(each), 90):
            results.append(conv(call, TILE[2]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
