"""Memory layout on the way to a contraction's kernel: NHWC, and kernels that are as large as their image.

Where a kernel covers an image exactly, taps and channels are one axis of one matrix product: [N, H*W*C] in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdcgan.backends.base import Epilogue, Operand


def nhwc(x: Tensor) -> Tensor:
    """`x` [N, C, H, W] with its memory in the order N, H, W, C, without gaps; a copy only if it isn't so already."""
    return x.contiguous(memory_format=torch.channels_last)


def in_format_of_torch(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`out` in the memory format that PyTorch's convolution of `x` and `weight` has; `torch.compile` relies on it."""
    formats = [suggest_memory_format(x)] + ([suggest_memory_format(weight)] if x.is_cuda else [])
    return out if torch.channels_last in formats else out.contiguous()


def flat(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H*W*C, 1, 1]; a view where `x` is NHWC in memory."""
    return nhwc(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 1, 1)


def flat_operand(a: Operand) -> Operand:
    taps = a.x.shape[2] * a.x.shape[3]
    return a._replace(
        x=flat(a.x), y=None if a.y is None else flat(a.y), coef=None if a.coef is None else a.coef.repeat(1, 1, taps)
    )


def flat_epilogue(e: Epilogue, taps: int) -> Epilogue:
    """For an output with `taps` times as many channels: (tap, channel)."""
    coef = None if e.coef is None else e.coef.repeat(*[1] * (e.coef.dim() - 1), taps)
    return e._replace(y=None if e.y is None else flat(e.y), coef=coef)


def says_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's convolution takes the strides of `x` [N, C, H, W] for channels_last, also where one channel or
    one pixel makes them ambiguous (`is_channels_last_strides_2d`)."""
    size, stride = x.shape, x.stride()
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(size[d], 1)
    return True
