"""The primitives once more, in float64 and as plainly as they can be written: no convolution of PyTorch's is called.

A convolution is a loop over taps and groups, an activation's derivative is autograd's, statistics are per group of the
batch, one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan.activations import to_module
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Epilogue, Operand


def taps(g: Geometry) -> list[tuple[int, int]]:
    return [(ky, kx) for ky in range(g.kernel[0]) for kx in range(g.kernel[1])]


def window(padded: Tensor, g: Geometry, ky: int, kx: int, size: Pair) -> Tensor:
    """The pixels of a padded image that a tap reads for each of `size` output pixels: a view."""
    (s0, s1), top, left = g.stride, ky * g.dilation[0], kx * g.dilation[1]
    return padded[:, :, top : top + (size[0] - 1) * s0 + 1 : s0, left : left + (size[1] - 1) * s1 + 1 : s1]


def pad(x: Tensor, g: Geometry) -> Tensor:
    return F.pad(x, (g.padding[1], g.padding[1], g.padding[0], g.padding[0]))


def conv(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    size = g.conv_size(x.shape[2], x.shape[3])
    outs = []
    for xg, wg in zip(x.chunk(g.groups, 1), weight.chunk(g.groups, 0), strict=True):
        parts = [torch.einsum("nchw,oc->nohw", window(pad(xg, g), g, *t, size), wg[:, :, *t]) for t in taps(g)]
        outs.append(torch.stack(parts).sum(0))
    return torch.cat(outs, 1)


def conv_transpose(x: Tensor, weight: Tensor, g: Geometry, output_size: Pair) -> Tensor:
    outs = []
    for xg, wg in zip(x.chunk(g.groups, 1), weight.chunk(g.groups, 0), strict=True):
        out = pad(x.new_zeros(x.shape[0], weight.shape[1], *output_size), g)
        for t in taps(g):
            window(out, g, *t, (x.shape[2], x.shape[3])).add_(torch.einsum("nchw,co->nohw", xg, wg[:, :, *t]))
        p0, p1 = g.padding
        outs.append(out[:, :, p0 : p0 + output_size[0], p1 : p1 + output_size[1]])
    return torch.cat(outs, 1)


def weight_grad(gathered: Tensor, linear: Tensor, g: Geometry) -> Tensor:
    size, outs = (linear.shape[2], linear.shape[3]), []
    for xg, dyg in zip(gathered.chunk(g.groups, 1), linear.chunk(g.groups, 1), strict=True):
        parts = [torch.einsum("nohw,nchw->oc", dyg, window(pad(xg, g), g, *t, size)) for t in taps(g)]
        outs.append(torch.stack(parts, -1).unflatten(-1, g.kernel))
    return torch.cat(outs, 0)


def activation(name: str, slope: float, z: Tensor) -> Tensor:
    return (to_module(name, slope) or nn.Identity())(z)


def derivative(name: str, slope: float, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(activation(name, slope, z).sum(), z)[0]


def rows_of(coef: Tensor, n: int) -> list[Tensor]:
    """The rows of a coef [rows, stat_groups, C], each as [N, C, 1, 1]."""
    groups = coef.shape[1]
    sample = torch.arange(n, device=coef.device) * groups // n
    return [row[sample][:, :, None, None] for row in coef.double()]


def finished(a: Operand) -> Tensor:
    if a.coef is None:
        return a.x.double()
    if a.y is None:
        s, t = rows_of(a.coef, a.x.shape[0])[:2]
        return activation(a.act, a.slope, a.x.double() * s + t)
    y = a.y.double()
    s, t, *pq = rows_of(a.coef, y.shape[0])
    dy = s * derivative(a.act, a.slope, s * y + t) * a.x.double()
    return dy + pq[0] * y + pq[1] if pq else dy


def stats(y: Tensor, stat_groups: int) -> Tensor:
    """[3, stat_groups, C]: mean, biased and unbiased variance."""
    rows = []
    for part in y.chunk(stat_groups):
        values = part.transpose(0, 1).flatten(1)
        rows.append(torch.stack([values.mean(1), values.var(1, correction=0), values.var(1, correction=1)]))
    return torch.stack(rows, 1)


def sums(g: Tensor, y: Tensor, coef: Tensor) -> Tensor:
    """[2 or 1, stat_groups, C]: sum(g), sum(g*xhat)."""
    terms = [g]
    if coef.shape[0] == 4:
        mean, rstd = rows_of(coef, y.shape[0])[2:]
        terms.append(g * (y.double() - mean) * rstd)
    return torch.stack([torch.stack([p.sum((0, 2, 3)) for p in t.chunk(coef.shape[1])]) for t in terms])


def masked_gradient(da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
    """g = da*act'(s*y + t)."""
    s, t = rows_of(coef, y.shape[0])[:2]
    return da.double() * derivative(act, slope, s * y.double() + t)


def epilogue(acc: Tensor, e: Epilogue) -> tuple[Tensor, Tensor]:
    nothing = acc.new_empty(0)
    if e.kind == "none":
        return acc, nothing
    if e.kind == "stats":
        return acc, stats(acc, e.stat_groups)
    assert e.coef is not None
    if e.kind == "bias":
        return acc + e.coef.double()[:, None, None], nothing
    if e.kind == "activate":
        return finished(Operand(acc, None, e.coef, e.act, e.slope)), nothing
    assert e.kind == "grad_stats" and e.y is not None
    g = masked_gradient(acc, e.y, e.coef, e.act, e.slope)
    return g, sums(g, e.y, e.coef)
