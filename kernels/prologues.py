"""Loading a tile of an operand, and what is computed on it before it is multiplied: the prologue.

A tile is `rows` pixels by `block_c` channels of an NHWC tensor. Its pixels come from a grid of (image, q, r): pixel
(q, r) of the grid, shifted by (dy, dx), lies at `(q*stride + dy, r*stride + dx)` of the tensor. That one rule serves
the implicit GEMMs of `conv` and `weight_grad` (stride of the convolution, a shift per tap) and the phases of
`conv_transpose` (stride 1). What lies outside the tensor is 0 after the prologue: padding is 0 and not `act(t)`.

The pixels of a tile are either a TMA tile of images, rows and columns, which a tensor descriptor copies at once, or a
run of consecutive pixels of the grid, which masked pointers read and which fits any height and width without waste.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Pair
from fastdcgan.kernels.activations import activation, activation_derivative
from fastdcgan.spec import Operand, nhwc


@dataclass(frozen=True)
class PrologueTile:
    """How tiles of an operand are loaded (a `constexpr` of the kernels).

    form    "pointer"  masked pointers
            "tma"      tensor descriptors, TMA tiles of pixels
            "matrix"   tensor descriptors, for tiles whose pixels are consecutive (`launch.tile_argument`)
    """

    form: str
    prologue: str  # "none" | "activate" | "bn_backward"
    act: int
    affine: bool  # bn_backward with p and q
    stride: Pair
    lead: Pair  # no shift is below -lead*stride
    rows: int
    block_c: int
    mask: bool  # descriptors may deliver values that the tile has to leave out


def prologue_of(a: Operand) -> str:
    """The prologue that computes `a`."""
    return "none" if a.coef is None else "activate" if a.y is None else "bn_backward"


@dataclass(frozen=True)
class PrologueOperand:
    """An operand as the kernels take it: NHWC in memory, and which prologue computes it."""

    x: Tensor
    y: Tensor | None
    coef: Tensor | None
    prologue: str
    act: int
    affine: bool  # bn_backward with p and q
    groups: int  # statistics groups of `coef`

    @classmethod
    def of(cls, a: Operand) -> PrologueOperand:
        if a.coef is None:
            return cls(nhwc(a.x), None, None, "none", 0, False, 1)
        y, coef, act = None if a.y is None else nhwc(a.y), a.coef.contiguous(), ACTIVATIONS[a.act].id
        return cls(nhwc(a.x), y, coef, prologue_of(a), act, y is not None and len(coef) == 4, coef.shape[1])

    def tile(self, form: str, stride: Pair, lead: Pair, rows: int, block_c: int, mask: bool) -> PrologueTile:
        return PrologueTile(form, self.prologue, self.act, self.affine, stride, lead, rows, block_c, mask)


@triton.jit
def tile_rows(tile, group, batch, height, width, ROWS: tl.constexpr, TMA_TILE: tl.constexpr):
    """((n, q, r, inside), (n0, q0, r0)): the grid pixels of a tile, whether they exist, and its TMA tile's corner.

    `tile` counts the tiles of one statistics group of `batch` images, each a grid of `height` x `width`, perhaps 0.
    """
    i = tl.arange(0, ROWS)
    if TMA_TILE is None:
        m = tile * ROWS + i
        across = tl.maximum(width, 1)
        area = tl.maximum(height * width, 1)
        n = m // area
        q = m % area // across
        r = m % area % across
        n0 = 0
        q0 = 0
        r0 = 0
    else:
        across = tl.maximum(tl.cdiv(width, TMA_TILE[2]), 1)
        down = tl.maximum(tl.cdiv(height, TMA_TILE[1]), 1)
        n0 = tile // (across * down) * TMA_TILE[0]
        q0 = tile // across % down * TMA_TILE[1]
        r0 = tile % across * TMA_TILE[2]
        n = n0 + i // (TMA_TILE[1] * TMA_TILE[2])
        q = q0 + i // TMA_TILE[2] % TMA_TILE[1]
        r = r0 + i % TMA_TILE[2]
    inside = (n < batch) & (q < height) & (r < width)
    first = group * batch
    return (n + first, q, r, inside), (n0 + first, q0, r0)


@triton.jit
def load_tile(x, y, coef, coef_groups, slope, group, rows, corner, shift, channel, size, dtype, S: tl.constexpr):
    """The tile [rows, block_c] of an `Operand` in `dtype`, prologue applied, 0 outside the tensor.

    `rows` and `corner` come from `tile_rows`, `shift` is (dy, dx), `channel` the first channel, `size` the tensor's
    (height, width, channels).
    """
    n, q, r, inside = rows
    n0, q0, r0 = corner
    dy, dx = shift
    height, width, channels = size
    c = channel + tl.arange(0, S.block_c)
    in_range = c < channels
    if S.form == "pointer" or S.mask or S.prologue != "none":
        in_y = q * S.stride[0] + dy
        in_x = r * S.stride[1] + dx
        valid = inside & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
        mask = valid[:, None] & in_range[None, :]

    if S.form == "pointer":
        pixel = (n * height + in_y) * width + in_x
        offsets = pixel[:, None] * channels + c[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0)
        if S.prologue == "bn_backward":
            raw = tl.load(y + offsets, mask=mask, other=0.0)
    elif S.form == "matrix":
        pixel = (n0 * height + q0) * width + r0
        value = x.load([pixel, channel])
        if S.prologue == "bn_backward":
            raw = y.load([pixel, channel])
    else:
        # Division truncates towards 0: keep its operand positive.
        up = dy + S.lead[0] * S.stride[0]
        left = dx + S.lead[1] * S.stride[1]
        q1 = q0 + up // S.stride[0] - S.lead[0]
        r1 = r0 + left // S.stride[1] - S.lead[1]
        c1 = left % S.stride[1] * channels + channel
        value = x.load([n0, q1, up % S.stride[0], r1, c1]).reshape(S.rows, S.block_c)
        if S.prologue == "bn_backward":
            raw = y.load([n0, q1, up % S.stride[0], r1, c1]).reshape(S.rows, S.block_c)

    if S.prologue == "none":
        if S.mask:
            value = tl.where(mask, value, 0.0)
    else:
        first = coef + (group % coef_groups) * channels + c
        step = coef_groups * channels
        s = tl.load(first, mask=in_range, other=0.0)[None, :]
        t = tl.load(first + step, mask=in_range, other=0.0)[None, :]
        value = value.to(tl.float32)
        if S.prologue == "activate":
            value = activation(value * s + t, slope, S.act)
        else:
            raw = raw.to(tl.float32)
            value = s * activation_derivative(raw * s + t, slope, S.act) * value
            if S.affine:
                p = tl.load(first + 2 * step, mask=in_range, other=0.0)[None, :]
                q_row = tl.load(first + 3 * step, mask=in_range, other=0.0)[None, :]
                value += p * raw + q_row
        value = tl.where(mask, value, 0.0)
    return value.to(dtype)
