"""nvcc's PTX of the CUDA kernels on the machine, against float64, through the package's own launch code."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from fastdcgan.backends.cuda_tiles import OF_SIZE, Choice
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Call
from tests.csrc.cuda.compiling import needs_nvcc
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.helpers.contractions import run
from tests.ptx.cuda_kernels import cuda_on
from tests.ptx.interpreter import ORDERS, Fault, Machine
from tests.ptx.passes import PASSES, check_image_side, check_pass

pytestmark = [needs_nvcc, needs_compiler, pytest.mark.compiles]
NHWC, NCHW = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    check_pass(name, dtype, layout, cuda_on(Machine("random")))


@pytest.mark.parametrize("name", PASSES)
def test_the_same_bits_in_any_order(name: str) -> None:
    first, *others = (check_pass(name, torch.bfloat16, NHWC, cuda_on(Machine(order))) for order in ORDERS)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["conv", "conv_transpose", "weight_grad"])
def test_image_side(name: str, dtype: torch.dtype) -> None:
    def image_side(call: Call) -> object:
        with cuda_on(Machine("random")) as backend:
            return run(backend, call, "cuda image-side")

    check_image_side(name, dtype, image_side)


NUMBERS = {dtype: OF_SIZE[dtype.itemsize] for dtype in (torch.bfloat16, torch.float16, torch.float32)}
TILES = [(dtype, number) for dtype, numbers in NUMBERS.items() for number in numbers]


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, torch.dtype, Choice], None]:
    """Checks a contraction of a DCGAN's geometry, with prologue and epilogue, as those of Triton are checked."""
    checks = pytest.importorskip("tests.kernels.test_contraction", reason="what is checked there, is so in Triton")

    def check(op: str, dtype: torch.dtype, choice: Choice, change: Callable[[str], str] = lambda ptx: ptx) -> None:
        def run_on_machine(call: Call, tile: Choice) -> object:
            with cuda_on(Machine("random"), change) as backend:
                return run(backend, call, "cuda", tile)

        monkeypatch.setitem(checks.RUN, op, run_on_machine)
        monkeypatch.setattr(checks, "weight_grad", run_on_machine)
        size = (4, 4) if op == "conv_transpose" else (8, 8)
        geometry = Geometry((4, 4), (2, 2), (1, 1))
        case = checks.Case(op, geometry, size, images=4, groups=2, channels=(32, 64), dtype=dtype)
        with torch.backends.cudnn.flags(allow_tf32=False):
            if op == "weight_grad":
                checks.check_weight_grad(case, ("bn_backward", "activate"), "leaky_relu", choice)
            else:
                checks.check_output(case, "activate", "stats", "relu", choice)
                checks.check_output(case, "bn_backward", "grad_stats", "leaky_relu", choice)

    return check


@pytest.mark.parametrize(("dtype", "number"), TILES, ids=str)
@pytest.mark.parametrize("op", ["conv", "conv_transpose", "weight_grad"])
def test_contractions(op: str, dtype: torch.dtype, number: int, contract: Callable) -> None:
    """Every tile, in one part and in two."""
    for parts in (1, 2):
        contract(op, dtype, Choice(number, parts))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (r"bar\.sync\s+0;", "", r"race|nobody wrote"),
        (r"cp\.async\.wait_group (\d+);", r"cp.async.wait_group 1\1;", r"cp.async may not have brought"),
        (r"cp\.async\.commit_group;", "", r"cp.async may not have brought"),
    ],
)
def test_a_planted_fault_of_a_contraction_is_named(contract: Callable, old: str, new: str, fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        contract("conv", torch.bfloat16, Choice(3, 1), lambda ptx: re.sub(old, new, ptx))


def test_a_planted_row_of_a_contraction_is_wrong(contract: Callable) -> None:
    row = r"(ldmatrix[^;]*\[%r\d+)(\+\d+)?\]"
    with pytest.raises((AssertionError, Fault)):
        contract("conv", torch.bfloat16, Choice(3, 1), lambda ptx: re.sub(row, r"\1+512]", ptx, count=1))


@pytest.mark.parametrize("name", ["batch_stats", "norm_act_reduce"])
def test_a_missing_barrier_is_named(name: str) -> None:
    def change(ptx: str) -> str:
        changed, count = re.subn(r"bar\.sync\s+0;", "", ptx)
        assert count
        return changed

    with pytest.raises(Fault, match=r"race|nobody wrote"):
        check_pass(name, torch.bfloat16, NHWC, cuda_on(Machine("reverse"), change))


def test_a_wrong_bound_is_named() -> None:
    """Threads past the end go on: what they write is another thread's, or lies beyond the tensor."""
    with pytest.raises(Fault, match=r"outside of all global memory|race: writes"):
        check_pass("activate", torch.float32, NHWC, cuda_on(Machine(), lambda ptx: ptx.replace("setp.ge", "setp.gt")))
