"""What the elementwise passes, the reductions and the updates of vectors compile to, without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdcgan.kernels import norm_act
from fastdcgan.spec import Operand
from tests.kernels.compiled.compiling import ARCHITECTURES, assert_fits, compiled, images, vectors

CONTIGUOUS = torch.contiguous_format
TENSORS = {
    "64x32x32 bf16": images(128, 64, 32, torch.bfloat16),
    "512x4x4 fp32": images(128, 512, 4, torch.float32),
    "3x64x64 bf16": images(128, 3, 64, torch.bfloat16),
    "NCHW 64x32x32 bf16": images(128, 64, 32, torch.bfloat16, CONTIGUOUS),
    "NCHW 512x4x4 fp32": images(128, 512, 4, torch.float32, CONTIGUOUS),
}
# What a kernel of four warps may use so that four programs fit on a multiprocessor, or three of the reductions.
REGISTERS = {"norm_act_kernel": 96, "grad_sums_kernel": 128, "stats_kernel": 160}
PASSES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "activate": lambda y, coef: norm_act.norm_act(Operand(y, None, coef, "relu")),
    "bn_backward": lambda y, coef: norm_act.norm_act(Operand(y, y, coef, "leaky_relu", 0.2)),
    "norm_act_reduce": lambda y, coef: norm_act.norm_act_reduce(y, y, coef, "leaky_relu", 0.2),
    "grad_stats": lambda y, coef: norm_act.grad_stats(y, y, coef, "relu", 0.0),
    "batch_stats": lambda y, coef: norm_act.batch_stats(y, 1),
}
READ_ONE = ("activate", "batch_stats")
WRITE_ONE = ("activate", "bn_backward", "grad_stats")


@pytest.mark.parametrize(
    ("tensor", "arch"), [(name, arch) for name in TENSORS for arch in ARCHITECTURES if arch == 90 or name[:2] == "64"]
)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_touches_wide_tensors_in_16_byte_accesses(name: str, tensor: str, arch: int) -> None:
    """Whole tiles are read and written so, each once."""
    y = TENSORS[tensor]
    kernels = compiled(lambda: PASSES[name](y, vectors(4, y.shape[1])), arch)
    for kernel in kernels:
        assert_fits(kernel, arch)
        assert kernel.registers <= REGISTERS.get(kernel.kernel.__name__, 192)
    kernel = kernels[0]
    elements = kernel.arguments["BLOCK_R"] * kernel.arguments["BLOCK_C"]
    tile = elements * y.element_size()
    assert kernel.bytes_loaded >= (1 if name in READ_ONE else 2) * tile  # and some vectors per channel
    assert kernel.bytes_stored == (tile if name in WRITE_ONE else 0)
    assert not kernel.count(r"st\.global\.b16")
    # Little of a tile or of a last step is idle.
    assert math.prod(kernel.grid) * kernel.arguments.get("steps", 1) * elements <= 1.35 * y.numel()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_vectors_per_channel_are_not_contracted(arch: int) -> None:
    """A fused multiply-add has other bits than PyTorch's formulas."""
    mean, channel = torch.empty(1, 64, device="meta"), torch.empty(64, device="meta")

    def calls() -> None:
        norm_act.coefficients(mean, mean, channel, channel, channel, 1e-5)
        norm_act.grad_coefficients(vectors(2, 64), vectors(4, 64), 131072)
        norm_act.update_running(channel, channel, vectors(3, 64), channel, None, 0.1)

    kernels = compiled(calls, arch)
    assert len(kernels) == 3
    for kernel in kernels:
        assert_fits(kernel, arch)
        assert not kernel.count(r"fma\.rn\.f32")
