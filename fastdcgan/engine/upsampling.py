"""Nearest upsampling by 2 and the convolution behind it, as one transposed convolution.

An upsampled pixel is there four times, so the taps that read the same one are summed up first. Along one axis the taps
[a, b, c] become [c, b + c, a + b, a] of a kernel of stride 2: 4 products per output of a 3x3 kernel in place of 9, and
what is upsampled is never stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.engine.double_backward import batched
from fastdcgan.spec import says_channels_last, stat_dtype, strides_in, with_strides


def doubles(scale_factor: Any, mode: Any, align_corners: Any) -> bool:
    """Whether `F.interpolate` of images [N, C, H, W] with these arguments is nearest upsampling by 2."""
    by_2 = isinstance(scale_factor, (int, float, tuple, list)) and scale_factor in (2, (2, 2), [2, 2])
    return by_2 and mode in ("nearest", "nearest-exact") and align_corners is None


def weight(w: Tensor) -> Tensor:
    """[Co, Ci, kh, kw] of the convolution -> [Ci, Co, kh + 1, kw + 1] of the transposed one, in the same dtype and
    memory format; sums are float32 (float64 of float64) and rounded once."""
    return _Weight.apply(w)


class _Weight(torch.autograd.Function):
    """A Function for the sake of the gradient's strides, which PyTorch's operators would not give it."""

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        return _laid_as(w, _sums(F.pad(_mirrored(w), (1, 1, 1, 1)), w.dtype))

    @staticmethod
    def backward(ctx, dw: Tensor) -> Tensor:
        found = _sums(_mirrored(dw), dw.dtype)
        return found if batched(dw) else _laid_as(dw, found)


def _mirrored(t: Tensor) -> Tensor:
    """A plain convolution's taps as a transposed one has them: in reverse order, the channels' dimensions swapped."""
    return t.flip(2, 3).transpose(0, 1).to(stat_dtype(t))


def _sums(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums over all 2x2 neighbours."""
    rows = t[:, :, 1:] + t[:, :, :-1]
    return (rows[..., 1:] + rows[..., :-1]).to(dtype)


def _laid_as(like: Tensor, t: Tensor) -> Tensor:
    format = torch.channels_last if says_channels_last(like) else torch.contiguous_format
    return with_strides(t, strides_in(t.shape, format))
