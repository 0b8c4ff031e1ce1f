"""Normalise and activate, its backward, and the per-channel reductions: the passes that are bound by bytes.

Operands, `coef`, `grad_coef`, `stats` and `sums` are as `fastdcgan/spec.py` describes them. Every wide tensor
is read or written once, in 16-byte accesses where its channels (NHWC) or its pixels (NCHW) allow it. A reduction runs
in two stages: programs that share out the rows, as many as fill the chip at any number of channels, write one partial
each; `combine_stats` and `combine_sums` then merge the partials in a fixed order. Nothing is atomic, so the same input
gives the same bits.

All functions take float16, bfloat16 or float32 tensors, run on the current stream and allocate through torch alone:
they can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.kernels import launch
from fastdcgan.kernels.activations import activation, activation_derivative
from fastdcgan.kernels.elementwise import (
    GRAD_SUMS_TILE,
    STATS_TILE,
    PassConfig,
    dense,
    elementwise_config,
    like,
    matrices_of,
    reduction_config,
)
from fastdcgan.kernels.partials import chan_reduce, combine_stats, combine_sums
from fastdcgan.spec import Operand

# --- stage one: tiles of rows x columns -------------------------------------------------------------------------------


@triton.jit
def _channels_of_program(columns, channels, FOLDED: tl.constexpr, BLOCK_C: tl.constexpr):
    """(column, its channel, mask) of this program's columns; with pixels folded into columns, channels repeat."""
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = column % channels if FOLDED else column
    return column, channel, column < columns


@triton.jit
def _tile(step, tiles, rows, outers, outer_stride, row_stride, column, column_stride, BLOCK_R: tl.constexpr):
    """(first element, offsets from it [BLOCK_R, BLOCK_C], which rows exist [BLOCK_R]) of tile `step` of this group."""
    outer = tl.program_id(2) * outers + step // tiles
    start = (step % tiles) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    base = outer.to(tl.int64) * outer_stride + start.to(tl.int64) * row_stride
    return base, row[:, None] * row_stride + column[None, :] * column_stride, start + row < rows


@triton.jit
def _vector(coef, row: tl.constexpr, channels, channel, mask):
    """Row `row` of a per-channel `[rows, groups, channels]` for this program's group, [1, BLOCK_C]."""
    at = (row * tl.num_programs(2) + tl.program_id(2)) * channels + channel
    return tl.load(coef + at, mask=mask, other=0.0)[None, :]


@triton.jit
def _store_partial(partials, row: tl.constexpr, ROWS: tl.constexpr, value, columns, channels, column, channel, mask):
    """One row of this program's partial; a column that is a folded pixel has a slot of its own."""
    slot = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * (columns // channels) + column // channels
    tl.store(partials + (slot * ROWS + row) * channels + channel, value, mask=mask)


@triton.jit
def norm_act_kernel(
    x, y, coef, out, slope,
    channels, outers, rows, columns, outer_stride, row_stride, column_stride, tiles, steps,
    ACT: tl.constexpr, BACKWARD: tl.constexpr, CENTRED: tl.constexpr, SLOPE_ROW: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act(s*x + t); BACKWARD: s*act'(s*y + t)*x, CENTRED: + p*y + q. SLOPE_ROW: of coef, or 0: `slope` then."""
    column, channel, mask = _channels_of_program(columns, channels, FOLDED, BLOCK_C)
    s = _vector(coef, 0, channels, channel, mask)
    t = _vector(coef, 1, channels, channel, mask)
    if CENTRED:
        p = _vector(coef, 2, channels, channel, mask)
        q = _vector(coef, 3, channels, channel, mask)
    if SLOPE_ROW:
        slope = _vector(coef, SLOPE_ROW, channels, channel, mask)
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, outers * tiles)):
        base, offsets, exists = _tile(
            step, tiles, rows, outers, outer_stride, row_stride, column, column_stride, BLOCK_R
        )
        inside = exists[:, None] & mask[None, :]
        value = tl.load(x + base + offsets, mask=inside).to(tl.float32)
        if BACKWARD:
            wide = tl.load(y + base + offsets, mask=inside).to(tl.float32)
            value = s * activation_derivative(s * wide + t, slope, ACT) * value
            if CENTRED:
                value += p * wide + q
        else:
            value = activation(s * value + t, slope, ACT)
        tl.store(out + base + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def grad_sums_kernel(
    da, y, coef, g_out, partials, slope,
    channels, outers, rows, columns, outer_stride, row_stride, column_stride, tiles, steps,
    ACT: tl.constexpr, XHAT: tl.constexpr, STORE: tl.constexpr, SLOPE_ROW: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums of g = da*act'(s*y + t), XHAT: of g*xhat, SLOPE_ROW: of da*min(z, 0); STORE: g as well."""
    column, channel, mask = _channels_of_program(columns, channels, FOLDED, BLOCK_C)
    s = _vector(coef, 0, channels, channel, mask)
    t = _vector(coef, 1, channels, channel, mask)
    if XHAT:
        mean = _vector(coef, 2, channels, channel, mask)
        rstd = tl.load(coef + (3 * tl.num_programs(2) + tl.program_id(2)) * channels + channel, mask=mask, other=0.0)
    if SLOPE_ROW:
        slope = _vector(coef, SLOPE_ROW, channels, channel, mask)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_of_slope = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, outers * tiles)):
        base, offsets, exists = _tile(
            step, tiles, rows, outers, outer_stride, row_stride, column, column_stride, BLOCK_R
        )
        inside = exists[:, None] & mask[None, :]
        g = tl.load(da + base + offsets, mask=inside, other=0.0).to(tl.float32)
        wide = tl.load(y + base + offsets, mask=inside, other=0.0).to(tl.float32)
        z = s * wide + t
        if SLOPE_ROW:
            sum_of_slope += tl.where(inside & ~(z > 0.0), g * z, 0.0)
        g = tl.where(inside, g * activation_derivative(z, slope, ACT), 0.0)
        if STORE:  # and sum what is stored: the next pass takes a difference to its mean
            stored = g.to(g_out.dtype.element_ty)
            tl.store(g_out + base + offsets, stored, mask=inside)
            g = stored.to(tl.float32)
        sum_g += g
        if XHAT:
            sum_gx += g * (wide - mean)
    ROWS: tl.constexpr = (2 if XHAT else 1) + (1 if SLOPE_ROW else 0)
    _store_partial(partials, 0, ROWS, tl.sum(sum_g, axis=0), columns, channels, column, channel, mask)
    if XHAT:
        _store_partial(partials, 1, ROWS, tl.sum(sum_gx, axis=0) * rstd, columns, channels, column, channel, mask)
    if SLOPE_ROW:
        value = tl.sum(sum_of_slope, axis=0)
        _store_partial(partials, ROWS - 1, ROWS, value, columns, channels, column, channel, mask)


@triton.jit
def stats_kernel(
    y, partials,
    channels, outers, rows, columns, outer_stride, row_stride, column_stride, tiles, steps,
    FOLDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial (count, mean, M2): Welford's recurrence down each row lane, Chan's formula across the lanes.

    Both work on the distance to the program's first value of the channel, which has the deviation's magnitude.
    """
    column, channel, mask = _channels_of_program(columns, channels, FOLDED, BLOCK_C)
    count = tl.zeros((BLOCK_R,), tl.float32)
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = tl.program_id(0) * steps
    base, _, _ = _tile(first, tiles, rows, outers, outer_stride, row_stride, column, column_stride, BLOCK_R)
    pivot = tl.load(y + base + column * column_stride, mask=mask, other=0.0).to(tl.float32)
    for step in range(first, tl.minimum(first + steps, outers * tiles)):
        base, offsets, exists = _tile(
            step, tiles, rows, outers, outer_stride, row_stride, column, column_stride, BLOCK_R
        )
        inside = exists[:, None] & mask[None, :]
        wide = tl.load(y + base + offsets, mask=inside, other=0.0).to(tl.float32) - pivot[None, :]
        count += exists.to(tl.float32)
        share = tl.where(exists, 1.0 / tl.maximum(count, 1.0), 0.0)
        delta = tl.where(inside, wide - mean, 0.0)
        mean += delta * share[:, None]
        m2 += delta * (wide - mean)
    n, mean, m2 = chan_reduce(count[:, None] + tl.zeros_like(mean), mean, m2)
    _store_partial(partials, 0, 3, n, columns, channels, column, channel, mask)
    _store_partial(partials, 1, 3, mean + pivot, columns, channels, column, channel, mask)
    _store_partial(partials, 2, 3, m2, columns, channels, column, channel, mask)


# --- the passes -------------------------------------------------------------------------------------------------------


def norm_act(a: Operand, config: PassConfig | None = None) -> Tensor:
    """The operand computed and stored, [N, C, H, W] in `a.x`'s format and the dtype of the raw output.

    `a.coef` is a coef (then act(s*x + t)) or, with `a.y`, a grad_coef (then s*act'(s*y + t)*x + p*y + q).
    """
    assert a.coef is not None
    x = dense(a.x)
    y = x if a.y is None else like(x, a.y)
    out = torch.empty_like(y)
    if out.numel() == 0:
        return out
    matrices = matrices_of(x, a.coef.shape[1])
    config = config or elementwise_config(matrices, x.element_size())
    launch.start(
        norm_act_kernel, matrices.grid(config),
        x, y, a.coef.contiguous(), out, a.slope, *matrices.arguments(config),
        ACT=ACTIVATIONS[a.act].id, BACKWARD=a.y is not None, CENTRED=a.coef.shape[0] >= 4,
        SLOPE_ROW=_slope_row(a.coef), **matrices.options(config),
    )  # fmt: skip
    return out


def _slope_row(coef: Tensor) -> int:
    """Of leaky_relu, where it is learned; else 0."""
    return coef.shape[0] - 1 if coef.shape[0] % 2 else 0


def _grad_sums(
    da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float, store: bool, config: PassConfig | None
) -> tuple[Tensor, Tensor]:
    y = dense(y)
    da = like(y, da)
    g = torch.empty_like(y) if store else y
    if y.numel() == 0:
        return g, torch.zeros_like(coef[: (coef.shape[0] + 1) // 2])
    matrices = matrices_of(y, coef.shape[1])
    config = config or reduction_config(matrices, GRAD_SUMS_TILE)
    rows = (coef.shape[0] + 1) // 2
    partials = coef.new_empty((matrices.groups, matrices.slots(config), rows, y.shape[1]))
    launch.start(
        grad_sums_kernel, matrices.grid(config),
        da, y, coef.contiguous(), g, partials, slope, *matrices.arguments(config),
        ACT=ACTIVATIONS[act].id, XHAT=coef.shape[0] >= 4, STORE=store, SLOPE_ROW=_slope_row(coef),
        **matrices.options(config),
    )  # fmt: skip
    return g, combine_sums(partials)


def norm_act_reduce(
    da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float, config: PassConfig | None = None
) -> Tensor:
    """`sums` [1 to 3, groups, C] of `g = da*act'(s*y + t)` (and `g*xhat` where the coef has mean and rstd)."""
    return _grad_sums(da, y, coef, act, slope, False, config)[1]


def grad_stats(
    da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float, config: PassConfig | None = None
) -> tuple[Tensor, Tensor]:
    """(`g` in `y`'s dtype and format, its `sums`); the sums are of `g` before it is rounded."""
    return _grad_sums(da, y, coef, act, slope, True, config)


def batch_stats(y: Tensor, groups: int, config: PassConfig | None = None) -> Tensor:
    """`stats` [3, groups, C] of a raw output [N, C, H, W]; accurate also where the mean is far above the deviation."""
    if y.numel() == 0:
        raise ValueError(f"statistics need at least one value for each channel, got a batch of {list(y.shape)}")
    y = dense(y)
    matrices = matrices_of(y, groups)
    config = config or reduction_config(matrices, STATS_TILE)
    partials = torch.empty((groups, matrices.slots(config), 3, y.shape[1]), dtype=torch.float32, device=y.device)
    launch.start(
        stats_kernel, matrices.grid(config), y, partials, *matrices.arguments(config), **matrices.options(config)
    )
    return combine_stats(partials)


# --- vectors per channel ----------------------------------------------------------------------------------------------
# Compiled without contraction to fused multiply-adds: the same roundings, and so the same bits, as PyTorch's formulas.


@triton.jit
def coefficients_kernel(mean, var, weight, bias, shift, coef, channels, values, EPS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < values
    channel = i % channels
    m = tl.load(mean + i, mask=mask, other=0.0).to(tl.float32)
    if shift is not None:
        m -= tl.load(shift + channel, mask=mask, other=0.0).to(tl.float32)
    variance = tl.load(var + i, mask=mask, other=1.0).to(tl.float64)
    rstd = (1.0 / tl.sqrt(variance + EPS)).to(tl.float32)  # in double, as PyTorch's CPU kernel does
    s = rstd
    if weight is not None:
        s = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32) * rstd
    t = -m * s
    if bias is not None:
        t += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(coef + i, s, mask=mask)
    tl.store(coef + values + i, t, mask=mask)
    tl.store(coef + 2 * values + i, m, mask=mask)
    tl.store(coef + 3 * values + i, rstd, mask=mask)


@triton.jit
def grad_coefficients_kernel(sums, coef, grad_coef, count, values, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < values
    s = tl.load(coef + i, mask=mask, other=0.0)
    t = tl.load(coef + values + i, mask=mask, other=0.0)
    mean = tl.load(coef + 2 * values + i, mask=mask, other=0.0)
    rstd = tl.load(coef + 3 * values + i, mask=mask, other=0.0)
    p = tl.div_rn(-s * rstd * tl.load(sums + values + i, mask=mask, other=0.0), count)
    q = tl.div_rn(-s * tl.load(sums + i, mask=mask, other=0.0), count) - p * mean
    tl.store(grad_coef + i, s, mask=mask)
    tl.store(grad_coef + values + i, t, mask=mask)
    tl.store(grad_coef + 2 * values + i, p, mask=mask)
    tl.store(grad_coef + 3 * values + i, q, mask=mask)


@triton.jit
def update_running_kernel(
    mean, var, stats, shift, factor, momentum, mean_stride, var_stride, groups, channels, BLOCK: tl.constexpr
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    to_mean = mean + channel * mean_stride
    to_var = var + channel * var_stride
    old_mean = tl.load(to_mean, mask=mask, other=0.0)
    old_var = tl.load(to_var, mask=mask, other=0.0)
    moved = tl.zeros((BLOCK,), tl.float32)
    if shift is not None:
        moved = tl.load(shift + channel, mask=mask, other=0.0).to(tl.float32)
    new = momentum
    for group in range(groups):
        if factor is not None:
            new = tl.load(factor + group).to(tl.float32)
        at = stats + group * channels + channel
        batch_mean = tl.load(at, mask=mask, other=0.0) + moved
        unbiased = tl.load(at + 2 * groups * channels, mask=mask, other=0.0)
        old_mean = (new * batch_mean + (1.0 - new) * old_mean.to(tl.float32)).to(mean.dtype.element_ty)
        # PyTorch's CPU kernel has the batch's variance in double here, and the running one not.
        old_share = ((1.0 - new) * old_var.to(tl.float32)).to(tl.float64)
        old_var = (unbiased.to(tl.float64) * new + old_share).to(var.dtype.element_ty)
    tl.store(to_mean, old_mean, mask=mask)
    tl.store(to_var, old_var, mask=mask)


_BLOCK = 128


def coefficients(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """`coef` [4, groups, C], float32, from mean and variance [groups, C] and the vectors [C] (`ops.coefficients`)."""
    groups, channels = mean.shape
    coef = torch.empty((4, groups, channels), dtype=torch.float32, device=mean.device)
    vectors = [None if v is None else v.contiguous() for v in (weight, bias, shift)]
    values = groups * channels
    launch.start(
        coefficients_kernel, (triton.cdiv(values, _BLOCK),),
        mean.contiguous(), var.contiguous(), *vectors, coef, channels, values,
        EPS=eps, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return coef


def grad_coefficients(sums: Tensor, coef: Tensor, count: float) -> Tensor:
    """`grad_coef` [4, groups, C] from `sums` [2, groups, C] over `count` values (`ops.grad_coefficients`)."""
    grad_coef = torch.empty_like(coef)
    values = coef[0].numel()
    launch.start(
        grad_coefficients_kernel, (triton.cdiv(values, _BLOCK),),
        sums.contiguous(), coef.contiguous(), grad_coef, float(count), values,
        BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return grad_coef


def update_running(
    mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
) -> None:
    """Update running statistics [C] in place, one statistics group after another (`Backend.update_running`)."""
    _, groups, channels = stats.shape
    launch.start(
        update_running_kernel, (triton.cdiv(channels, _BLOCK),),
        mean, var, stats.contiguous(),
        None if shift is None else shift.contiguous(), None if factor is None else factor.contiguous(),
        float(momentum), mean.stride(0), var.stride(0), groups, channels,
        BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
