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
from fastdcgan.kernels import launch, tiles, tuning
from fastdcgan.kernels.contraction import ADD_PARTS, Loaded
from fastdcgan.kernels.launch import dot, tile_of_program
from fastdcgan.kernels.prologues import load_tile, tile_rows
from fastdcgan.kernels.tiles import TileConfig, ceil_div
from fastdcgan.spec import Operand, flat_operand, memory_format


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
    SOURCE: tl.constexpr,
    LINEAR: tl.constexpr,
    BOX: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    ADD: tl.constexpr,
):
    """One tile [SOURCE.block_c, LINEAR.block_c] of one tap, from one of `splits` parts of the pixels.

    `x` is the gathered operand, `dy` the linear one; `out` is [splits, Cl, taps, Cg], added to if ADD.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    tiles_x = tl.cdiv(c_x, SOURCE.block_c)
    tiles_dy = tl.cdiv(c_dy, LINEAR.block_c)
    row, tile_dy = tile_of_program(splits * TAPS * tiles_x, tiles_dy, GROUP_M)
    cx = row % tiles_x * SOURCE.block_c
    tap = row // tiles_x % TAPS
    split = row // (tiles_x * TAPS)
    cdy = tile_dy * LINEAR.block_c
    shift = (tap // KERNEL[1] * DILATION[0] - PADDING[0], tap % KERNEL[1] * DILATION[1] - PADDING[1])
    size = (height, width, c_x)
    linear_size = (dy_height, dy_width, c_dy)
    share = tl.cdiv(groups * tiles_per_group, splits)
    first = split * share
    last = tl.minimum(first + share, groups * tiles_per_group)
    BLOCK_X: tl.constexpr = SOURCE.block_c
    BLOCK_DY: tl.constexpr = LINEAR.block_c
    acc = tl.zeros((BLOCK_X, BLOCK_DY), tl.float32)
    for i in range(first, last):
        group = i // tiles_per_group
        rows, corner = tile_rows(i % tiles_per_group, group, batch, dy_height, dy_width, SOURCE.rows, BOX)
        a = load_tile(x, x_y, x_coef, x_groups, x_slope, group, rows, corner, shift, cx, size, DTYPE, SOURCE)
        b = load_tile(
            dy, dy_y, dy_coef, dy_groups, dy_slope, group, rows, corner, (0, 0), cdy, linear_size, DTYPE, LINEAR
        )
        acc = dot(a.T, b, acc, PRECISION)
    c = cx + tl.arange(0, SOURCE.block_c)
    o = cdy + tl.arange(0, LINEAR.block_c)
    place = out + split.to(tl.int64) * c_dy * TAPS * c_x + (o[None, :] * TAPS + tap) * c_x + c[:, None]
    mask = (c < c_x)[:, None] & (o < c_dy)[None, :]
    if ADD:
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_splits_kernel(parts, out, values, splits, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """out [values] = the sum of parts [splits, values], in ascending order; with ADD that and what `out` was."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    place = parts + i
    for _ in range(splits):
        total += tl.load(place, mask=i < values, other=0.0)
        place += values
    if ADD:
        total += tl.load(out + i, mask=i < values, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < values)


_ADD_BLOCK = 1024


def weight_grad(
    gathered: Operand,
    linear: Operand,
    geometry: Geometry,
    config: TileConfig | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """`gathered` [N, Cg, H, W], `linear` [N, Cl, H', W'] -> [Cl, Cg, kh, kw], in the dtype of a raw output.

    float32, float16 or bfloat16, any memory format (copied to NHWC unless it is that), no groups. `config`: the tile.
    `into` [Cl, Cg, kh, kw], channels_last, of any of these dtypes, is a gradient that this one is added to, in place
    and rounded once; it is returned. Raises ValueError if it has another shape or layout.
    """
    shape_of_weight = (linear.x.shape[1], gathered.x.shape[1], *geometry.kernel)
    if into is not None and (
        into.shape != shape_of_weight or not into.is_contiguous(memory_format=torch.channels_last)
    ):
        raise ValueError(
            f"into must be channels_last of shape {list(shape_of_weight)}, "
            f"got {list(into.shape)} with strides {into.stride()}"
        )
    if geometry.spans(*gathered.x.shape[2:]):
        rows = None if into is None else into.permute(0, 2, 3, 1).reshape(len(into), -1, 1, 1)
        dw = weight_grad(flat_operand(gathered), linear, Geometry((1, 1)), config, rows)
        if into is not None:
            return into
        dw = dw.view(-1, *geometry.kernel, gathered.x.shape[1]).permute(0, 3, 1, 2)
        return dw.contiguous(memory_format=memory_format(gathered.x))
    g = geometry
    x, dy = Loaded.of(gathered), Loaded.of(linear)
    n, c_x, height, width = x.x.shape
    c_dy, *grid = dy.x.shape[1:]
    groups = max(x.groups, dy.groups)
    batch = n // groups
    taps = g.kernel[0] * g.kernel[1]
    dtype = (x.x if x.y is None else x.y).dtype
    described = all(launch.fits_view(t, g.stride) for t in (x.x, x.y))
    described = described and all(launch.fits_view(t, (1, 1)) for t in (dy.x, dy.y))

    def attempt(config: TileConfig, dw: Tensor | None = None) -> Tensor:
        add = dw is not None
        if dw is None:
            dw = launch.empty_nhwc(shape_of_weight, x.x, dtype)
        rows, block_x, block_dy = config.block_k, config.block_m, config.block_n
        box = tiles.box(rows, batch, *grid)
        # Beyond a group's last image lies the next group's first.
        boxed = config.descriptors and described and (groups == 1 or batch % box[0] == 0)
        exact = grid[0] % box[1] == 0 and grid[1] % box[2] == 0
        whole_rows = exact and grid[1] == box[2] and (box[0] == 1 or grid[0] == box[1])
        forms = ("box", "matrix" if whole_rows else "box") if boxed else ("pointer", "pointer")
        # An image beyond the last is 0 in both operands, a pixel beyond the grid need not be. Channels beyond the last
        # are the neighbouring pixel's in a strided view, and their results are not stored.
        source = x.source(forms[0], g.stride, g.lead, rows, block_x, boxed and not exact)
        line = dy.source(forms[1], (1, 1), (0, 0), rows, block_dy, boxed and not exact)
        out = dw
        if config.splits > 1:
            out = torch.empty((config.splits, dw.numel()), dtype=torch.float32, device=dw.device)
        load = (forms[0], g.stride, box, rows, block_x)
        load_dy = (forms[1], (1, 1), box, rows, block_dy)
        tiles_per_group = tiles.tiles(rows, box if boxed else None, batch, *grid)
        arguments = {
            "x": launch.tile_argument(x.x, *load),
            "x_y": launch.tile_argument(x.y, *load),
            "x_coef": x.coef,
            "x_slope": float(gathered.slope),
            "x_groups": x.groups,
            "dy": launch.tile_argument(dy.x, *load_dy),
            "dy_y": launch.tile_argument(dy.y, *load_dy),
            "dy_coef": dy.coef,
            "dy_slope": float(linear.slope),
            "dy_groups": dy.groups,
            "out": out,
            "groups": groups,
            "batch": batch,
            "tiles_per_group": tiles_per_group,
            "splits": config.splits,
            "height": height,
            "width": width,
            "c_x": c_x,
            "dy_height": grid[0],
            "dy_width": grid[1],
            "c_dy": c_dy,
            "KERNEL": g.kernel,
            "PADDING": g.padding,
            "DILATION": g.dilation,
            "SOURCE": source,
            "LINEAR": line,
            "BOX": box if boxed else None,
            "GROUP_M": config.group_m,
            "PRECISION": launch.dot_precision(dtype),
            "DTYPE": launch.triton_dtype(dtype),
            "ADD": add and config.splits == 1,
        }
        programs = config.splits * taps * ceil_div(c_x, block_x) * ceil_div(c_dy, block_dy)
        launch.run(weight_grad_kernel, programs, arguments, config)
        if config.splits > 1:
            values = dw.numel()
            parts = {"parts": out, "out": dw, "values": values, "splits": config.splits}
            launch.run(
                add_splits_kernel, ceil_div(values, _ADD_BLOCK), {**parts, "BLOCK": _ADD_BLOCK, "ADD": add}, ADD_PARTS
            )
        return dw

    if config is None:
        prologue = f"{x.prologue} {dy.prologue}"
        shape = (n, c_x, height, width, c_dy, *grid, *g.kernel, *g.stride, groups)
        pixels = n * grid[0] * grid[1]
        problem = tiles.Problem("weight_grad", dtype, c_x, c_dy, pixels, taps, prologue, "none", described, shape)
        config = tuning.choose(problem, x.x.device, attempt)
    dw = attempt(config, into)
    return dw if into is not None else dw.contiguous(memory_format=memory_format(gathered.x))
