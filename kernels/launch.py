"""What the contractions share on the way to a kernel: memory layout, descriptors, precision, order of the tiles."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdcgan.geometry import Pair
from fastdcgan.kernels.tiles import TileConfig, TmaTile

# Kernels are interpreted or compiled as TRITON_INTERPRET says when they are defined.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ahead = False


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if INTERPRETED:  # which multiplies the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of this program: `GROUP_M` tiles along m run through all of n before the next ones begin."""
    pid = tl.program_id(0)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    high = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % high, within // high


def run(kernel: Any, programs: int, arguments: dict[str, Any], config: TileConfig) -> None:
    """Launch `kernel` with its arguments by name."""
    start(kernel, (programs,), **arguments, num_warps=config.num_warps, num_stages=config.num_stages)


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Launch `kernel`; inside of `compiling_ahead`, have it compiled."""
    if _ahead:
        kernel.warmup(*arguments, grid=grid, **named)
    else:
        kernel[grid](*arguments, **named)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside a `with`, kernels are compiled, by a thread for each core, and not launched: results are whatever their
    memory holds. What can't be compiled is left for its launch to say."""
    from triton.runtime._async_compile import AsyncCompileMode  # not of Triton's public interface

    global _ahead
    with ThreadPoolExecutor(os.cpu_count()) as threads, AsyncCompileMode(threads, ignore_errors=True):
        _ahead = True
        try:
            yield
        finally:
            _ahead = False


def empty_nhwc(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [N, C, H, W] with its memory in the order N, H, W, C."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def dot_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s `input_precision`: TF32 where PyTorch's convolutions may use it, else three TF32 products, whose
    error is that of float32 (Henry, Tang, Heinecke, 2019)."""
    if dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "tf32x3"


def aligned(x: Tensor | None, channels: int) -> bool:
    """Whether a tensor descriptor takes `x` [N, C, H, W], once it is NHWC, with rows of `channels`: their addresses are
    multiples of 16 bytes. What is not NHWC yet will be copied to an aligned address."""
    if x is None:
        return True
    copied = not x.is_contiguous(memory_format=torch.channels_last)
    return channels * x.element_size() % 16 == 0 and (copied or x.data_ptr() % 16 == 0)


def fits_view(x: Tensor | None, stride: Pair) -> bool:
    """Whether a descriptor of pixels `stride` apart covers all of `x` [N, C, H, W] (None: there is nothing to read)."""
    return x is None or (aligned(x, x.shape[1]) and x.shape[2] % stride[0] == 0 and x.shape[3] % stride[1] == 0)


def tile_argument(
    x: Tensor | None, form: str, stride: Pair, tma_tile: TmaTile | None, rows: int, channels: int
) -> Tensor | TensorDescriptor | None:
    """`x` [N, C, H, W], NHWC in memory, as a kernel reads or writes tiles of it.

    "pointer"  `x` itself
    "tma"      a descriptor of [N, H/sy, sy, W/sx, sx*C]: a TMA tile holds pixels that are `stride` apart
    "matrix"   a descriptor of [N*H*W, C]: `rows` consecutive pixels
    """
    if x is None or form == "pointer":
        return x
    n, c, h, w = x.shape
    if form == "matrix":
        return matrix(x, c, (rows, channels))
    assert tma_tile is not None
    shape = [n, h // stride[0], stride[0], w // stride[1], stride[1] * c]
    strides = [h * w * c, stride[0] * w * c, w * c, stride[1] * c, 1]
    return TensorDescriptor(x, shape, strides, [tma_tile[0], tma_tile[1], 1, tma_tile[2], channels])


def matrix(x: Tensor, columns: int, block: Pair) -> TensorDescriptor:
    """A descriptor of memory without gaps as [numel/columns, columns]."""
    return TensorDescriptor(x, [x.numel() // columns, columns], [columns, 1], list(block))


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
