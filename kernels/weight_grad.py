"""The weight gradient: a reduction over pixels, [Cg, pixels] x [pixels, Cl] for every tap.

The gathered operand (a convolution's input, or a transposed one's output gradient) is shifted by the tap; the linear
one is not. Few output tiles would leave most multiprocessors idle, so the pixels may be split: every part writes a
float32 tile of its own to a workspace, and a second kernel adds the parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.geometry import Geometry
from fastdcgan.kernels import launch, tiles
from fastdcgan.kernels.contraction import ADD_PARTS, why_not
from fastdcgan.kernels.launch import dot, tile_of_program
from fastdcgan.kernels.prologues import PrologueOperand, load_tile, prologue_of, tile_rows
from fastdcgan.kernels.tiles import TileConfig, ceil_div
from fastdcgan.spec import Algorithm, Call, Operand, flat_operand, memory_format


@triton.jit
def weight_grad_kernel(
    x,
    x_y,
    x_coef,
    x_slope,
    x_groups,
    dy,
    dy_y,
    dy_coef,
    dy_slope,
    dy_groups,
    out,
    groups,
    batch,
    tiles_per_group,
    splits,
    height,
    width,
    c_x,
    dy_height,
    dy_width,
    c_dy,
    KERNEL: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    PROLOGUE: tl.constexpr,
    LINEAR: tl.constexpr,
    TMA_TILE: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One tile [PROLOGUE.block_c, LINEAR.block_c] of one tap, from one of `splits` parts of the pixels.

    `x` is the gathered operand, `dy` the linear one; `out` is [splits, Cl, taps, Cg].
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    tiles_x = tl.cdiv(c_x, PROLOGUE.block_c)
    tiles_dy = tl.cdiv(c_dy, LINEAR.block_c)
    row, tile_dy = tile_of_program(splits * TAPS * tiles_x, tiles_dy, GROUP_M)
    cx = row % tiles_x * PROLOGUE.block_c
    tap = row // tiles_x % TAPS
    split = row // (tiles_x * TAPS)
    cdy = tile_dy * LINEAR.block_c
    shift = (tap // KERNEL[1] * DILATION[0] - PADDING[0], tap % KERNEL[1] * DILATION[1] - PADDING[1])
    size = (height, width, c_x)
    linear_size = (dy_height, dy_width, c_dy)
    share = tl.cdiv(groups * tiles_per_group, splits)
    first = split * share
    last = tl.minimum(first + share, groups * tiles_per_group)
    BLOCK_X: tl.constexpr = PROLOGUE.block_c
    BLOCK_DY: tl.constexpr = LINEAR.block_c
    acc = tl.zeros((BLOCK_X, BLOCK_DY), tl.float32)
    for i in range(first, last):
        group = i // tiles_per_group
        rows, corner = tile_rows(i % tiles_per_group, group, batch, dy_height, dy_width, PROLOGUE.rows, TMA_TILE)
        a = load_tile(x, x_y, x_coef, x_groups, x_slope, group, rows, corner, shift, cx, size, DTYPE, PROLOGUE)
        b = load_tile(
            dy, dy_y, dy_coef, dy_groups, dy_slope, group, rows, corner, (0, 0), cdy, linear_size, DTYPE, LINEAR
        )
        acc = dot(a.T, b, acc, PRECISION)
    c = cx + tl.arange(0, PROLOGUE.block_c)
    o = cdy + tl.arange(0, LINEAR.block_c)
    place = out + split.to(tl.int64) * c_dy * TAPS * c_x + (o[None, :] * TAPS + tap) * c_x + c[:, None]
    mask = (c < c_x)[:, None] & (o < c_dy)[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_splits_kernel(parts, out, values, splits, BLOCK: tl.constexpr):
    """out [values] = the sum of parts [splits, values], in ascending order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    place = parts + i
    for _ in range(splits):
        total += tl.load(place, mask=i < values, other=0.0)
        place += values
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < values)


_ADD_BLOCK = 1024


class WeightGradient:
    """One call of `weight_grad` and how it is launched with a given tile; only `run` allocates."""

    def __init__(self, gathered: Operand, linear: Operand, geometry: Geometry) -> None:
        self.gathered, self.linear, self.geometry = gathered, linear, geometry
        g = geometry
        operands = ((gathered.x, gathered.y), (linear.x, linear.y))
        self.unaligned = sum(not all(launch.aligned(t, x.shape[1]) for t in (x, y)) for x, y in operands)
        self.described = all(launch.fits_view(t, g.stride) for t in (gathered.x, gathered.y)) and all(
            launch.fits_view(t, (1, 1)) for t in (linear.x, linear.y)
        )
        self.dtype = (gathered.x if gathered.y is None else gathered.y).dtype
        self.taps = g.kernel[0] * g.kernel[1]

    @property
    def problem(self) -> tiles.Problem:
        """What the choice of a tile depends on."""
        n, channels, height, width = self.linear.x.shape
        prologue = f"{prologue_of(self.gathered)} {prologue_of(self.linear)}"
        of_gathered = self.gathered.x.shape[1]
        return tiles.Problem(
            "weight_grad", self.dtype, of_gathered, channels, n * height * width, self.taps, prologue, "none",
            self.described, self.unaligned,
        )  # fmt: skip

    def candidates(self) -> list[TileConfig]:
        """The tiles that are worth measuring, the heuristic's first."""
        return tiles.shortlist(self.problem, tiles.device_of(self.gathered.x.device))

    def run(self, tile: TileConfig | None) -> Tensor:
        """[Cl, Cg, kh, kw], channels_last. Without a tile the heuristic chooses one."""
        tile = tile or tiles.heuristic(self.problem, tiles.device_of(self.gathered.x.device))
        g, x, dy = self.geometry, PrologueOperand.of(self.gathered), PrologueOperand.of(self.linear)
        n, c_x, height, width = x.x.shape
        c_dy, *grid = dy.x.shape[1:]
        groups = max(x.groups, dy.groups)
        batch = n // groups
        dw = launch.empty_nhwc((c_dy, c_x, *g.kernel), x.x, self.dtype)
        rows, block_x, block_dy = tile.block_k, tile.block_m, tile.block_n
        tma_tile = tiles.tma_tile(rows, batch, *grid)
        # Beyond a group's last image lies the next group's first.
        described = tile.descriptors and self.described and (groups == 1 or batch % tma_tile[0] == 0)
        exact = grid[0] % tma_tile[1] == 0 and grid[1] % tma_tile[2] == 0
        whole_rows = exact and grid[1] == tma_tile[2] and (tma_tile[0] == 1 or grid[0] == tma_tile[1])
        forms = ("tma", "matrix" if whole_rows else "tma") if described else ("pointer", "pointer")
        # An image beyond the last is 0 in both operands, but a pixel beyond the grid need not be. Channels beyond the
        # last are those of the neighbouring pixel in a strided view, and their results are not stored.
        prologue = x.tile(forms[0], g.stride, g.lead, rows, block_x, described and not exact)
        line = dy.tile(forms[1], (1, 1), (0, 0), rows, block_dy, described and not exact)
        out = dw
        if tile.splits > 1:
            out = torch.empty((tile.splits, dw.numel()), dtype=torch.float32, device=dw.device)
        load = (forms[0], g.stride, tma_tile, rows, block_x)
        load_dy = (forms[1], (1, 1), tma_tile, rows, block_dy)
        arguments = {
            "x": launch.tile_argument(x.x, *load),
            "x_y": launch.tile_argument(x.y, *load),
            "x_coef": x.coef,
            "x_slope": float(self.gathered.slope),
            "x_groups": x.groups,
            "dy": launch.tile_argument(dy.x, *load_dy),
            "dy_y": launch.tile_argument(dy.y, *load_dy),
            "dy_coef": dy.coef,
            "dy_slope": float(self.linear.slope),
            "dy_groups": dy.groups,
            "out": out,
            "groups": groups,
            "batch": batch,
            "tiles_per_group": tiles.tile_count(rows, tma_tile if described else None, batch, *grid),
            "splits": tile.splits,
            "height": height,
            "width": width,
            "c_x": c_x,
            "dy_height": grid[0],
            "dy_width": grid[1],
            "c_dy": c_dy,
            "KERNEL": g.kernel,
            "PADDING": g.padding,
            "DILATION": g.dilation,
            "PROLOGUE": prologue,
            "LINEAR": line,
            "TMA_TILE": tma_tile if described else None,
            "GROUP_M": tile.group_m,
            "PRECISION": launch.dot_precision(self.dtype),
            "DTYPE": launch.triton_dtype(self.dtype),
        }
        programs = tile.splits * self.taps * ceil_div(c_x, block_x) * ceil_div(c_dy, block_dy)
        launch.run(weight_grad_kernel, programs, arguments, tile)
        if tile.splits > 1:
            parts = {"parts": out, "out": dw, "values": dw.numel(), "splits": tile.splits, "BLOCK": _ADD_BLOCK}
            launch.run(add_splits_kernel, ceil_div(dw.numel(), _ADD_BLOCK), parts, ADD_PARTS)
        return dw


def gradient(call: Call) -> WeightGradient:
    """The matrix products that compute `call`. A kernel as large as its image has one pixel of long rows."""
    assert isinstance(call.b, Operand)
    if call.geometry.spans(*call.a.x.shape[2:]):
        return WeightGradient(flat_operand(call.a), call.b, Geometry((1, 1)))
    return WeightGradient(call.a, call.b, call.geometry)


def weight_grad(call: Call, tile: TileConfig | None = None) -> Tensor:
    """`a` [N, Cg, H, W], gathered, and `b` [N, Cl, H', W'], linear -> [Cl, Cg, kh, kw], in the dtype of a raw output
    and the memory format of `a`.

    float32, float16 or bfloat16, any memory format (copied to NHWC unless it is that), no groups. A `tile` that the GPU
    has no shared memory for raises `triton.runtime.errors.OutOfResources`.
    """
    dw = gradient(call).run(tile)
    if call.geometry.spans(*call.a.x.shape[2:]):
        dw = dw.view(-1, *call.geometry.kernel, call.a.x.shape[1]).permute(0, 3, 1, 2)
    return dw.contiguous(memory_format=memory_format(call.a.x))


WEIGHT_GRAD = Algorithm("triton", why_not, weight_grad, lambda call: gradient(call).candidates(), TileConfig)
