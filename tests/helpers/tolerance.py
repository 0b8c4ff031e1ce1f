"""What counts as right: a result may err twice as much as vanilla PyTorch in the same dtype, plus a little rounding.

The truth is computed in float64 from the same (already rounded) inputs. The error is judged in five ways, since each of
them is blind to something: the largest element (blind to a small systematic error), the Frobenius norm and the angle
(blind to one wrong element among many), and the bias of sums and of scale (which rounding hardly has, while a dropped
tap, truncation or a wrong factor has).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLACK = 2.0  # how often vanilla's own error is allowed


def rounding(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of `dtype`; rounding to nearest errs by at most half of it, relatively."""
    return torch.finfo(dtype).eps


def allowance(dtype: torch.dtype, reduction: int = 1) -> float:
    """The relative error granted beyond vanilla's: one more rounding of the result, and a sum of `reduction` terms.

    Sums are accumulated in float32 at least; the rounding of n terms grows with sqrt(n).
    """
    accumulator = min(rounding(dtype), rounding(torch.float32))
    return rounding(dtype) / 2 + accumulator * math.sqrt(reduction)


def verdict(
    got: Tensor,
    vanilla: Tensor,
    truth: Tensor,
    *,
    reduction: int = 1,
    scale: float | None = None,
    terms: torch.dtype | None = None,
) -> list[str]:
    """Why `got` is not as accurate as `vanilla`, both in one dtype, measured against the float64 `truth`; [] if it is.

    `reduction` is the number of terms of each element's sum (for a weight gradient N*H*W). `scale` is the magnitude
    that rounding is relative to (by default the truth's root mean square), for results that cancel to almost nothing.
    `terms` is the dtype to which a sum's terms are rounded before they are added up, where that is not the result's:
    vanilla's error is then one draw from the same distribution, whose standard deviation is a rounding / sqrt(12).
    """
    if got.shape != truth.shape or got.dtype != vanilla.dtype or got.device != vanilla.device:
        expected = f"expected {list(truth.shape)} {vanilla.dtype} on {vanilla.device}"
        return [f"is {list(got.shape)} {got.dtype} on {got.device}, {expected}"]
    assert vanilla.shape == truth.shape and truth.dtype == torch.float64
    if truth.numel() == 0:
        return []
    dtype = got.dtype
    got, vanilla = got.detach().double(), vanilla.detach().double()
    if not torch.equal(got.isfinite(), vanilla.isfinite()):
        return [
            f"has {int((~got.isfinite()).sum())} infinite or NaN elements, vanilla {int((~vanilla.isfinite()).sum())}"
        ]
    finite = vanilla.isfinite()
    got, vanilla, truth = got[finite], vanilla[finite], truth.detach()[finite]
    error, usual = got - truth, vanilla - truth
    size = float(truth.square().mean().sqrt()) if truth.numel() else 0.0
    scale = max(size, scale or 0.0, torch.finfo(torch.float64).tiny)
    extra, n = allowance(dtype, reduction), truth.numel()
    if terms is not None:
        extra += rounding(terms) / math.sqrt(12)
    faults = []

    def judge(what: str, found: float, usual: float, granted: float) -> None:
        if not found <= SLACK * usual + granted:
            faults.append(f"{what}: {found:.3e}, vanilla {usual:.3e}, so at most {SLACK * usual + granted:.3e}")

    # An element may be rounded once more at its own magnitude, and sums err at the magnitude of their terms.
    beyond = (error.abs() - rounding(dtype) * truth.abs()).clamp(min=0)
    judge("largest error", float(beyond.max()) / scale, float(usual.abs().max()) / scale, 4 * extra)
    judge("relative Frobenius norm of the error", _rms(error) / scale, _rms(usual) / scale, extra)
    if size > extra * scale:
        judge("angle to the truth", _angle(got, truth), _angle(vanilla, truth), extra * scale / size)
    # Independent errors average out: four standard deviations of the mean; an eighth of a rounding for others.
    floor = 4 * (SLACK * _rms(usual) / scale + extra) / math.sqrt(n) + (extra - rounding(dtype) * 3 / 8)
    judge("mean signed error", abs(float(error.mean())) / scale, abs(float(usual.mean())) / scale, floor)
    judge("scale", _projection(error, truth) * size / scale, _projection(usual, truth) * size / scale, floor)
    return faults


def assert_as_accurate(
    got: Tensor,
    vanilla: Tensor,
    truth: Tensor,
    what: str = "result",
    *,
    reduction: int = 1,
    scale: float | None = None,
    terms: torch.dtype | None = None,
) -> None:
    """Fail, with every reason, unless `verdict` finds none."""
    faults = verdict(got, vanilla, truth, reduction=reduction, scale=scale, terms=terms)
    assert not faults, f"{what} {'; '.join(faults)}"


def assert_same_float64(
    got: Tensor | None, truth: Tensor | None, what: str = "result", tolerance: float = 1e-10
) -> None:
    """Fail unless two float64 results agree to `tolerance` of the truth's largest element (or of 1 where that is less).

    None equals only None.
    """
    assert (got is None) == (truth is None), f"{what} is {'None' if got is None else 'a tensor'}, the other is not"
    if got is None or truth is None:
        return
    assert got.shape == truth.shape, f"{what} has shape {list(got.shape)}, expected {list(truth.shape)}"
    assert got.dtype == truth.dtype == torch.float64, f"{what} is {got.dtype}, expected float64"
    if truth.numel() == 0:
        return
    error = float((got - truth).detach().abs().max())
    scale = max(1.0, float(truth.detach().abs().max()))
    assert error <= tolerance * scale, f"{what} is off by {error:.3e} at a magnitude of {scale:.3e}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _angle(a: Tensor, b: Tensor) -> float:
    """The distance of two directions on the unit sphere, sqrt(2 - 2*cosine), without its cancellation."""
    lengths = float(a.norm()), float(b.norm())
    return 2.0 if 0.0 in lengths else float((a / lengths[0] - b / lengths[1]).norm())


def _projection(error: Tensor, truth: Tensor) -> float:
    """How far the result is the truth scaled: <error, truth> / <truth, truth>."""
    square = float(truth.square().sum())
    return 0.0 if square == 0 else abs(float((error * truth).sum())) / square
