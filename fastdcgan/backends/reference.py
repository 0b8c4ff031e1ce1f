"""The definition of right, in plain PyTorch: any device, dtype and memory format that PyTorch takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.base import Backend
from fastdcgan.spec import Operand, stat_dtype


def per_sample(row: Tensor, x: Tensor) -> Tensor:
    """[stat_groups, C] -> [N or 1, C, 1, 1], to broadcast against `x` [N, C, H, W]."""
    if row.shape[0] > 1:
        row = row.repeat_interleave(x.shape[0] // row.shape[0], dim=0)
    return row[:, :, None, None]


class ReferenceBackend(Backend):
    """Plain PyTorch, one formula after another."""

    name = "reference"

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        return None

    def norm_act(self, a: Operand) -> Tensor:
        assert a.coef is not None
        y = a.x if a.y is None else a.y
        rows = [per_sample(row, y) for row in a.coef]
        wide = y.to(stat_dtype(y))
        z = wide * rows[0] + rows[1]
        if a.y is None:
            learned = len(rows) % 2
            return (F.prelu(z, a.coef[-1, 0]) if learned else ACTIVATIONS[a.act].forward(z, a.slope)).to(y.dtype)
        dy = self._derivative(z, a.coef, a.act, a.slope) * rows[0] * a.x  # in this order it gets the strides of y
        if len(rows) >= 4:
            dy = dy + rows[2] * wide + rows[3]
        return dy.to(y.dtype)

    def grad_stats(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        z = self._z(y, coef)
        g = (da * self._derivative(z, coef, act, slope)).to(y.dtype)
        return g, self._sums(g.to(stat_dtype(g)), da, y, z, coef)

    def _z(self, y: Tensor, coef: Tensor) -> Tensor:
        return y.to(stat_dtype(y)) * per_sample(coef[0], y) + per_sample(coef[1], y)

    def _derivative(self, z: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        if coef.shape[0] % 2:
            return torch.where(z > 0, torch.ones_like(z), per_sample(coef[-1], z))
        return ACTIVATIONS[act].derivative(z, slope)

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        z = self._z(y, coef)
        return self._sums(da * self._derivative(z, coef, act, slope), da, y, z, coef)

    def _sums(self, g: Tensor, da: Tensor, y: Tensor, z: Tensor, coef: Tensor) -> Tensor:
        terms = [g]
        if coef.shape[0] >= 4:
            terms.append(g * (y.to(g.dtype) - per_sample(coef[2], y)) * per_sample(coef[3], y))
        if coef.shape[0] % 2:
            terms.append(torch.where(z > 0, torch.zeros_like(z), da * z))
        groups = coef.shape[1]
        return torch.stack([t.reshape(groups, -1, *t.shape[1:]).sum(dim=(1, 3, 4)) for t in terms])

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        return torch.stack([self._group_stats(part) for part in y.chunk(stat_groups)], dim=1)

    def _group_stats(self, y: Tensor) -> Tensor:
        # With momentum 1, PyTorch's own kernel leaves the unbiased variance in the running one: all three rows are then
        # the bits that nn.BatchNorm2d computes.
        unused, unbiased = y.new_zeros((2, y.shape[1]), dtype=stat_dtype(y)).unbind()
        mean, var = torch.ops.aten.batch_norm_update_stats(y, unused, unbiased, 1.0)
        return torch.stack([mean, var, unbiased])

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        mean = mean.to(dtype) if shift is None else mean.to(dtype) - shift.to(dtype)
        rstd = torch.rsqrt(var.double() + eps).to(dtype)  # in double, as PyTorch's CPU kernel does
        s = rstd if weight is None else weight.to(dtype) * rstd
        t = -mean * s
        if bias is not None:
            t = t + bias.to(dtype)
        return torch.stack([s, t, mean, rstd])

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: int) -> Tensor:
        s, t, mean, rstd = coef
        p = -s * rstd * sums[1] / count
        q = -s * sums[0] / count - p * mean
        return torch.stack([s, t, p, q])
