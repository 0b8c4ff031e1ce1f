"""Kernel, stride, padding and dilation arithmetic of 2-d convolutions, plain and transposed."""

from __future__ import annotations

import math
from dataclasses import dataclass

Pair = tuple[int, int]


def pair(value: int | tuple[int, ...]) -> Pair:
    """`3` and `(3,)` -> `(3, 3)`; a pair stays as it is."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@dataclass(frozen=True)
class Geometry:
    """Where the taps of a strided gather (`conv`) lie; `conv_transpose` is its adjoint with the same numbers."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def lead(self) -> Pair:
        """The padding in whole strides: taps of `conv` begin at most this many strides before an input pixel."""
        return (-(-self.padding[0] // self.stride[0]), -(-self.padding[1] // self.stride[1]))

    def spans(self, height: int, width: int) -> bool:
        """Whether the kernel covers a `height` x `width` image exactly, so that `conv` makes one pixel of it."""
        plain = self.padding == (0, 0) and self.dilation == (1, 1)
        return plain and self.kernel == (height, width) and self.kernel != (1, 1)

    def conv_size(self, height: int, width: int) -> Pair:
        """Output height and width of `conv` on a `height` x `width` input (PyTorch, `nn.Conv2d`, Shape)."""
        k, s, p, d = self.kernel, self.stride, self.padding, self.dilation
        return (
            (height + 2 * p[0] - d[0] * (k[0] - 1) - 1) // s[0] + 1,
            (width + 2 * p[1] - d[1] * (k[1] - 1) - 1) // s[1] + 1,
        )

    def conv_transpose_size(self, height: int, width: int, output_padding: Pair = (0, 0)) -> Pair:
        """Output height and width of `conv_transpose` (PyTorch, `nn.ConvTranspose2d`, Shape)."""
        k, s, p, d, o = self.kernel, self.stride, self.padding, self.dilation, output_padding
        return (
            (height - 1) * s[0] - 2 * p[0] + d[0] * (k[0] - 1) + o[0] + 1,
            (width - 1) * s[1] - 2 * p[1] + d[1] * (k[1] - 1) + o[1] + 1,
        )

    def reaches(self, image: Pair, outputs: Pair) -> bool:
        """Whether each tap of `conv` reads a pixel of the image for some output."""
        axes = zip(self.kernel, self.stride, self.padding, self.dilation, image, outputs, strict=True)
        for kernel, stride, padding, dilation, size, many in axes:
            for start in (tap * dilation - padding for tap in range(kernel)):
                first = max(0, -(start // stride))  # output whose tap lies at 0 or beyond
                if first >= many or start + first * stride >= size:
                    return False
        return True

    def reads(self, image: Pair, outputs: Pair) -> int:
        """How many pixels of the image the taps of all outputs of `conv` read, without those of the padding."""
        axes = zip(self.kernel, self.stride, self.padding, self.dilation, image, outputs, strict=True)
        return math.prod(
            sum(0 <= out * stride + tap * dilation - padding < size for out in range(many) for tap in range(kernel))
            for kernel, stride, padding, dilation, size, many in axes
        )

    def of_upsampled(self) -> Geometry | None:
        """The transposed convolution that does what nearest upsampling by 2 and this `conv` do; None where there is
        none, or none with fewer products."""
        (kh, kw), (ph, pw) = self.kernel, self.padding
        plain = self.stride == (1, 1) and self.dilation == (1, 1) and self.groups == 1
        if not plain or self.kernel == (1, 1) or ph >= kh or pw >= kw:
            return None
        return Geometry((kh + 1, kw + 1), (2, 2), (kh - 1 - ph, kw - 1 - pw))

    def output_padding(self, height: int, width: int, output_size: Pair) -> Pair:
        """The rows and columns that `conv_transpose` of a `height` x `width` input adds to reach `output_size`."""
        base = self.conv_transpose_size(height, width)
        return (output_size[0] - base[0], output_size[1] - base[1])


@dataclass(frozen=True)
class Phases:
    """The taps of `conv_transpose` along one axis, without inserted zeros: one entry per phase `f`, 0 <= f < stride.

    Output pixel `q*stride + f` is the sum over j < count[f] of the weight's tap `first[f] + j*tap_step` times the input
    pixel `q + offset[f] - j*pixel_step`.
    """

    first: tuple[int, ...]
    count: tuple[int, ...]
    offset: tuple[int, ...]
    tap_step: int
    pixel_step: int


def phases(kernel: int, stride: int, padding: int, dilation: int = 1) -> Phases:
    """The phases along one axis: phase `f` owns the taps `k` with `k*dilation = f + padding (mod stride)`."""
    common = math.gcd(dilation, stride)
    step = stride // common
    first, count, offset = [], [], []
    for f in range(stride):
        own = [k for k in range(min(step, kernel)) if (f + padding - k * dilation) % stride == 0]
        k = own[0] if own else 0
        first.append(k)
        count.append(len(range(k, kernel, step)) if own else 0)
        offset.append((f + padding - k * dilation) // stride if own else 0)
    return Phases(tuple(first), tuple(count), tuple(offset), step, dilation // common)


IDENTITY = Geometry((1, 1))  # of a block without a convolution
