"""The image-side layers of the CUDA backend (csrc/cuda/image): contractions with 1 to 4 channels on one side.

A wide tensor is read or written once, prologue and epilogue included; sums are float32, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cuda_tiles
from fastdcgan.backends.cuda_facts import EPILOGUES, IMAGE_CHANNELS, IMAGE_KERNEL, IMAGE_STRIDE
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Call, Epilogue, Operand, memory_format

LEAST_WIDE = 16  # of the other side: with fewer, most threads would have nothing to do
_FUSED = ("none", "bias", "activate")  # epilogues


def _unfit(geometry: Geometry, channels: int, wide: int, *tensors: Tensor) -> str | None:
    g = geometry
    if not 1 <= channels <= IMAGE_CHANNELS:
        return f"{channels} channels on the image's side, more than {IMAGE_CHANNELS}"
    if wide < LEAST_WIDE:
        return f"{wide} channels on the other side, fewer than {LEAST_WIDE}"
    if g.groups != 1 or g.dilation != (1, 1):
        return f"{g.groups} groups and dilation {g.dilation}"
    if max(g.kernel) > IMAGE_KERNEL or max(g.stride) > IMAGE_STRIDE:
        return f"a kernel {g.kernel} with stride {g.stride}, more than {IMAGE_KERNEL} or {IMAGE_STRIDE}"
    if len({t.dtype for t in tensors}) > 1 or any(t.numel() == 0 for t in tensors):
        return "tensors of several dtypes, or none"
    return None


def why_not(ops: Any, call: Call) -> str | None:
    """Why the image-side kernels can't run a call, or None."""
    a, b, g = call.a, call.b, call.geometry
    if call.op == "conv":
        reason = _unfit(g, a.x.shape[1], b.shape[0], a.x, b)
        if reason is None and not _channels_last(a.x, b):
            return "an output that is contiguous"
    elif call.op == "conv_transpose":
        reason = _unfit(g, b.shape[1], a.x.shape[1], a.x, b)
        if reason is None and memory_format(a.x) != torch.channels_last:
            return "an input that is contiguous"
        if reason is None and a.x.element_size() == 2:
            room = cuda_tiles.device_of(a.x.device).shared_memory
            needed = ops.image_side_transpose_bytes(b.shape[1], a.x.shape[1], g.kernel, g.stride, g.padding)
            if needed > room:
                return f"tiles that need {needed} bytes of shared memory, where a block has {room}"
    else:
        reason = _unfit(g, a.x.shape[1], b.x.shape[1], a.x, b.x)
        if reason is None and memory_format(b.x) != torch.channels_last:
            return "a wide tensor that is contiguous"
    return reason


def contract(ops: Any, call: Call) -> Tensor:
    """`conv`: [N, 1..4, H, W] and weight [C, 1..4, kh, kw] -> [N, C, *size] in channels_last; or `conv_transpose`:
    [N, C, H, W] in channels_last and weight [C, 1..4, kh, kw] -> [N, 1..4, *size]."""
    a, weight, g, epilogue = call.a, call.b, call.geometry, _epilogue(call.epilogue)
    if call.op == "conv":
        return ops.image_side_conv(*_operand(a), weight, g.stride, g.padding, *epilogue)
    last = _channels_last(a.x, weight)
    return ops.image_side_conv_transpose(*_operand(a), weight, g.stride, g.padding, call.size, *epilogue, last)


def weight_grad(ops: Any, call: Call) -> Tensor:
    """Gathered operand [N, 1..4, H, W] and linear one [N, C, H', W'] in channels_last -> [C, 1..4, kh, kw]."""
    g, last = call.geometry, memory_format(call.a.x) == torch.channels_last
    return ops.image_side_weight_grad(*_operand(call.a), *_operand(call.b), g.kernel, g.stride, g.padding, last)


def fuses(epilogue: Epilogue) -> bool:
    """Whether a contraction here does that itself; else it stores its sums, and passes follow."""
    return epilogue.kind in _FUSED


def _operand(a: Operand) -> tuple:
    return (a.x, a.y, a.coef, ACTIVATIONS[a.act].id, a.slope)


def _epilogue(e: Epilogue) -> tuple:
    return (EPILOGUES[e.kind], e.coef, ACTIVATIONS[e.act].id, e.slope)


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own convolution would give channels_last."""
    return torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
