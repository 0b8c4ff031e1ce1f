"""nvcc's PTX of the CUDA kernels on the machine, against float64, through the package's own launch code."""

from __future__ import annotations

import re

import pytest
import torch

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
