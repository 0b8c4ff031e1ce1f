"""The passes over normalised activations of a backend in C++ or CUDA, against the reference in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdcgan.backends.base import Backend
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.spec import Operand
from tests.helpers.tolerance import assert_as_accurate

REFERENCE = ReferenceBackend()


def random(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (1.5 * x + 0.5).to(dtype).contiguous(memory_format=layout)


def coefficients(rows: int, groups: int, channels: int) -> Tensor:
    """(s, t[, mean, rstd]), or a gradient's (s, t[, p, q]); an odd number of rows ends with leaky_relu's slopes."""
    coef = torch.randn(rows, groups, channels, generator=torch.Generator().manual_seed(rows + groups + channels))
    coef[rows // 2 * 2 - 1] = coef[rows // 2 * 2 - 1].abs() + 0.5
    if rows % 2:
        coef[-1] = coef[-1, :1]  # a channel has one slope in all groups
    return coef


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def check_elementwise(backend: Backend, y: Tensor, da: Tensor, coef: Tensor, act: str, slope: float) -> None:
    """norm_act, of activations and of a gradient."""
    what = f"{act}, {list(coef.shape)} coefficients"
    y64, da64, coef64 = wide(y, da, coef)
    for a, a64 in [
        (Operand(y, None, coef, act, slope), Operand(y64, None, coef64, act, slope)),
        (Operand(da, y, coef, act, slope), Operand(da64, y64, coef64, act, slope)),
    ]:
        got, vanilla = backend.norm_act(a), REFERENCE.norm_act(a)
        assert got.stride() == y.stride()
        assert_as_accurate(got, vanilla, REFERENCE.norm_act(a64), what)


def check_sums(backend: Backend, y: Tensor, da: Tensor, coef: Tensor, act: str, slope: float) -> None:
    """norm_act_reduce and grad_stats."""
    y64, da64, coef64 = wide(y, da, coef)
    g64, truth = REFERENCE.grad_stats(da64, y64, coef64, act, slope)
    count = y.shape[0] // coef.shape[1] * y.shape[2] * y.shape[3]
    # A sum may cancel to nothing: its rounding is relative to its terms.
    xhat = 1.0 if len(coef) < 4 else float(((y64 * coef64[3].amax() + coef64[2].abs().amax()) ** 2).mean().sqrt())
    scale = math.sqrt(count) * float(g64.square().mean().sqrt()) * max(1.0, xhat)
    if len(coef) % 2:  # the terms of the slope's gradient are da*z
        scale *= max(1.0, float((y64 * coef64[0].abs().amax() + coef64[1].abs().amax()).square().mean().sqrt()))
    vanilla = REFERENCE.norm_act_reduce(da.float(), y.float(), coef, act, slope)
    sums = backend.norm_act_reduce(da, y, coef, act, slope)
    assert_as_accurate(sums, vanilla, truth, f"sums of {act}", reduction=count, scale=scale)
    kept = da.clone()
    g, same = backend.grad_stats(da, y, coef, act, slope)
    assert torch.equal(da, kept)
    assert all(map(torch.equal, backend.grad_stats_(kept, y, coef, act, slope), (g, same))), "not the same in place"
    again = backend.norm_act_reduce(g, y, coef[: len(coef) // 2 * 2], "identity", 0.0)
    if len(coef) % 2:  # the sums of what is stored, up to rounding: a pass with slopes may be shared out otherwise
        torch.testing.assert_close(same[: len(again)], again, rtol=0, atol=4e-6 * scale)
    else:
        assert torch.equal(same, again), "not the sums of what is stored"
    assert_as_accurate(g, REFERENCE.grad_stats(da, y, coef, act, slope)[0], g64, f"g of {act}")
