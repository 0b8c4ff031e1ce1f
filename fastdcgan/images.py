"""Images as they are stored to images as networks take them, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdcgan.dispatch import training_ops

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normalize_images(pixels: Tensor, flip: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [N, H, W, C] -> `dtype` [N, C, H, W] in channels_last, in [-1, 1]: `pixels / 127.5 - 1`, computed in
    float32 (float64 for float64) and rounded once.

    `flip` bool [N], on the same device, says which images are mirrored left to right. The bits are the same on every
    device and with or without the extension. Raises TypeError or ValueError for arguments that don't fit.
    """
    for name, value in (("pixels", pixels), ("flip", flip)):
        if not isinstance(value, Tensor) and not (name == "flip" and value is None):
            raise TypeError(f"expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise TypeError(f"expected uint8 pixels [N, H, W, C], got {pixels.dtype} {list(pixels.shape)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"expected a floating-point dtype, got {dtype}")
    if flip is not None and (flip.dtype != torch.bool or flip.shape != pixels.shape[:1]):
        raise ValueError(f"expected flip to be bool [{pixels.shape[0]}], got {flip.dtype} {list(flip.shape)}")
    compiling = torch.compiler.is_compiling()
    if not compiling and dtype in _KERNEL_DTYPES and training_ops.why_not(pixels.device.type) is None:
        return training_ops.operators(pixels.device.type).images(pixels, flip, dtype)
    x = pixels.permute(0, 3, 1, 2)  # NHWC in memory is channels_last
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    # By a tensor: PyTorch's CUDA kernel multiplies by the reciprocal of a number, which has other bits.
    x = (x / torch.full((), 127.5, dtype=x.dtype, device=x.device)).sub_(1.0).to(dtype)
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last)
