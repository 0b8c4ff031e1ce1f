"""The image-side layers of the CUDA backend (csrc/cuda/narrow*.cuh): contractions with 1 to 4 channels on one side.

A wide tensor is read or written once, prologue and epilogue included; sums are float32, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cuda_tiles
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Epilogue, Operand, memory_format

NARROW = 4  # channels at most, as in csrc/cuda/narrow.cuh; likewise the next two
MOST_KERNEL = 5
MOST_STRIDE = 2
LEAST_WIDE = 16  # of the other side: with fewer, most threads would have nothing to do
_EPILOGUES = {"none": 0, "bias": 1, "activate": 2}  # `NarrowEpilogue::Kind`


def _unfit(geometry: Geometry, narrow: int, wide: int, *tensors: Tensor) -> str | None:
    g = geometry
    if not 1 <= narrow <= NARROW:
        return f"{narrow} channels on the image's side, more than {NARROW}"
    if wide < LEAST_WIDE:
        return f"{wide} channels on the other side, fewer than {LEAST_WIDE}"
    if g.groups != 1 or g.dilation != (1, 1):
        return f"{g.groups} groups and dilation {g.dilation}"
    if max(g.kernel) > MOST_KERNEL or max(g.stride) > MOST_STRIDE:
        return f"a kernel {g.kernel} with stride {g.stride}, more than {MOST_KERNEL} or {MOST_STRIDE}"
    if len({t.dtype for t in tensors}) > 1 or any(t.numel() == 0 for t in tensors):
        return "tensors of several dtypes, or none"
    return None


def transpose_bytes(geometry: Geometry, narrow: int, wide: int) -> int:
    """Bytes of shared memory that a block of `conv_transpose` of 16-bit numbers takes at least: the `Plan` of
    csrc/cuda/narrow_transpose_tensor.cuh for tiles of 1 x 32 pixels of a phase."""
    staged, threads, of_warp = 64 + 8, 256, 48
    boxes = []
    for pixels, k, s, p in zip((1, 32), geometry.kernel, geometry.stride, geometry.padding, strict=True):
        boxes.append(pixels + (k + s - 1) // s - 1 + (s - 1 + p) // s - p // s)
    blocks = (geometry.kernel[0] * geometry.kernel[1] * narrow + 7) // 8
    pitch = (max(blocks, (staged // 2 + 7) // 8) | 1) * 8
    apart = threads // 32 * of_warp * staged * 2 if wide > 64 else 0
    return blocks * 8 * staged * 2 + boxes[0] * boxes[1] * pitch * 4 + apart


def why_not_conv(a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """None if `conv` takes this call, else the reason."""
    reason = _unfit(geometry, a.x.shape[1], weight.shape[0], a.x, weight)
    if reason is None and not _channels_last(a.x, weight):
        return "an output that is contiguous"
    return reason


def why_not_conv_transpose(
    a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue
) -> str | None:
    """None if `conv_transpose` takes this call, else the reason."""
    reason = _unfit(geometry, weight.shape[1], a.x.shape[1], a.x, weight)
    if reason is None and memory_format(a.x) != torch.channels_last:
        return "an input that is contiguous"
    if reason is None and a.x.element_size() == 2:
        room = cuda_tiles.device_of(a.x.device).shared_memory
        needed = transpose_bytes(geometry, weight.shape[1], a.x.shape[1])
        if needed > room:
            return f"tiles that need {needed} bytes of shared memory, where a block has {room}"
    return reason


def why_not_weight_grad(gathered: Operand, linear: Operand, geometry: Geometry) -> str | None:
    """None if `weight_grad` takes this call, else the reason."""
    reason = _unfit(geometry, gathered.x.shape[1], linear.x.shape[1], gathered.x, linear.x)
    if reason is None and memory_format(linear.x) != torch.channels_last:
        return "a wide tensor that is contiguous"
    return reason


def conv(ops: Any, a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """`a` [N, 1..4, H, W] and weight [C, 1..4, kh, kw] -> [N, C, H', W'] in channels_last."""
    return ops.narrow_conv(*_operand(a), weight, geometry.stride, geometry.padding, *_epilogue(epilogue))


def conv_transpose(
    ops: Any, a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue
) -> Tensor:
    """`a` [N, C, H, W] in channels_last and weight [C, 1..4, kh, kw] -> [N, 1..4, *output_size]."""
    g, last = geometry, _channels_last(a.x, weight)
    return ops.narrow_conv_transpose(*_operand(a), weight, g.stride, g.padding, output_size, *_epilogue(epilogue), last)


def weight_grad(ops: Any, gathered: Operand, linear: Operand, geometry: Geometry) -> Tensor:
    """`gathered` [N, 1..4, H, W] and `linear` [N, C, H', W'] in channels_last -> [C, 1..4, kh, kw]."""
    g, last = geometry, memory_format(gathered.x) == torch.channels_last
    return ops.narrow_weight_grad(*_operand(gathered), *_operand(linear), g.kernel, g.stride, g.padding, last)


def fuses(epilogue: Epilogue) -> bool:
    """Whether a contraction here does that itself; else it stores its sums, and passes follow."""
    return epilogue.kind in _EPILOGUES


def _operand(a: Operand) -> tuple:
    return (a.x, a.y, a.coef, ACTIVATIONS[a.act].id, a.slope)


def _epilogue(e: Epilogue) -> tuple:
    return (_EPILOGUES[e.kind], e.coef, ACTIVATIONS[e.act].id, e.slope)


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own convolution would give channels_last."""
    return torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
