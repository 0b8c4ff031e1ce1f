"""What a backend is, what it takes and gives, and the parts that every backend may share.

The contractions take their activations as an `Operand` (a tensor, or one that is computed on load: the prologue) and
may do more to the accumulator than store it (the `Epilogue`). The README ("How it works") has the formulas: `y` is the
raw convolution output, `z = s*y + t` the pre-activation, `xhat = (y - mean)*rstd`, `g = da*act'(z)`.

Per-channel vectors are float32 (float64 for float64 tensors) of shape `[rows, stat_groups, C]`; statistics group `i`
covers the `i`-th of `stat_groups` equal parts of the batch:

    stats       (mean, biased variance, unbiased variance)
    coef        (s, t, mean, rstd)   or (s, t) where nothing is normalised
    grad_coef   (s, t, p, q)         or (s, t) where p = q = 0
    sums        (sum(g), sum(g*xhat)) or (sum(g),) for a coef of two rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Boundaries, Epilogue, Operand, Update, memory_format, stat_dtype

if TYPE_CHECKING:
    from fastdcgan.spec import Block


class Backend:
    """The primitives of `ops.py`. This class runs contractions as PyTorch's own convolutions with the prologue and the
    epilogue as passes of their own (`norm_act`, `batch_stats`, `grad_stats`), so a backend may own as few as those."""

    name: str
    chooses_boundaries = False  # whether `boundaries` may say anything but no
    casts_weights = False  # whether `conv` and `conv_transpose` take float32 weights with 16-bit activations
    seen: list[str] | None = None  # for `explain`: where each contraction went, if a backend has more than one way

    def require(self) -> None:
        """Raise Unavailable, with the original error, if this backend can't run on this machine."""

    def covers(self, device_type: str, dtype: torch.dtype) -> str | None:
        """None if blocks of this device and dtype run here, else the reason."""
        raise NotImplementedError

    def boundaries(
        self, blocks: Sequence[Block], weights: Sequence[Tensor], size: Pair, needs: Sequence[bool]
    ) -> Boundaries:
        """What a chain does where nothing was measured: `blocks` on an input image of `size`, with these weights.

        `needs`: whether the input, and then each of the weights, needs a gradient.
        """
        n = len(blocks)
        return Boundaries((False,) * (n - 1), (False,) * (n - 1), (False,) * n)

    def turns(self, blocks: Sequence[Block], weights: Sequence[Tensor], x: Tensor) -> bool:
        """Whether a chain whose tensors are contiguous is faster with `x` turned to channels_last, its output back."""
        return False

    def why_not(self, op: str, *args: Any) -> str | None:
        """None if this call of a contraction runs in a kernel of this backend's own, else why PyTorch's own does it.

        `op` is "conv", "conv_transpose" or "weight_grad", and `args` are that method's.
        """
        return f"backend {self.name!r} has no contractions of its own"

    # --- what a backend has to bring: shapes and formulas as in ops.py ---

    def norm_act(self, a: Operand) -> Tensor:
        raise NotImplementedError

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        raise NotImplementedError

    def grad_stats(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        """`g = da*act'(s*y + t)`, stored (it may take the place of `da`), and its `sums`."""
        raise NotImplementedError

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        """`stats` [3, stat_groups, C] of a raw output [N, C, H, W]."""
        raise NotImplementedError

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        raise NotImplementedError

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: float) -> Tensor:
        raise NotImplementedError

    # --- several of them in one, for a backend whose calls cost more than what they do on small tensors ---

    def normalize(
        self, y: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        coef = self.coefficients(stats[0], stats[1], weight, bias, None, eps)
        return self.norm_act(Operand(y, None, coef, act, slope)), coef

    def normalize_backward(
        self, da: Tensor, y: Tensor, coef: Tensor, count: int, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        sums = self.norm_act_reduce(da, y, coef, act, slope)
        return self.norm_act(Operand(da, y, self.grad_coefficients(sums, coef, count), act, slope)), sums

    def bias_coefficients(self, like: Tensor, bias: Tensor | None, channels: int) -> Tensor:
        dtype = stat_dtype(like)
        shift = like.new_zeros(channels, dtype=dtype) if bias is None else bias.to(dtype)
        return torch.stack([torch.ones_like(shift), shift])[:, None]

    def update_all_running(self, first: Tensor, updates: Sequence[Update]) -> None:
        for u in updates:
            self.update_running(*u)

    # --- in place, for a backend that gains by it ---

    def norm_act_(self, a: Operand) -> Tensor:
        """`norm_act`, which may take the place of `a.x`."""
        return self.norm_act(a)

    def normalize_backward_(
        self, da: Tensor, y: Tensor, coef: Tensor, count: int, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        """`normalize_backward`, whose dy may take the place of `da`."""
        return self.normalize_backward(da, y, coef, count, act, slope)

    # --- contractions by way of PyTorch's own ---

    def conv(self, a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
        g = geometry
        acc = torch.ops.aten.convolution(
            self.finished(a), weight, _bias(epilogue, weight), g.stride, g.padding, g.dilation, False, [0, 0], g.groups
        )
        return self.apply_epilogue(acc, epilogue)

    def conv_transpose(
        self, a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor]:
        g = geometry
        extra = g.output_padding(a.x.shape[2], a.x.shape[3], output_size)
        acc = torch.ops.aten.convolution(
            self.finished(a), weight, _bias(epilogue, weight), g.stride, g.padding, g.dilation, True, extra, g.groups
        )
        return self.apply_epilogue(acc, epilogue)

    def weight_grad(self, gathered: Operand, linear: Operand, geometry: Geometry) -> Tensor:
        g = geometry
        x, dy = self.finished(gathered), self.finished(linear)
        shape = (dy.shape[1], x.shape[1] // g.groups, *g.kernel)
        # Only its shape and strides are read.
        weight = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, [False, True, False]
        )[1]

    def finished(self, a: Operand) -> Tensor:
        """The operand as a plain tensor."""
        return a.x if a.coef is None else self.norm_act(a)

    def apply_epilogue(self, acc: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
        """What `ops.Epilogue` says, as separate passes over the stored accumulator."""
        e = epilogue
        nothing = acc.new_empty((0,), dtype=stat_dtype(acc))
        if e.kind in ("none", "bias"):  # PyTorch's convolution has added the bias
            return acc, nothing
        if e.kind == "stats" and acc.shape[0] == 0:  # one process's share of a synchronised batch
            return acc, nothing.new_zeros((3, e.stat_groups, acc.shape[1]))
        if e.kind == "stats":
            return acc, self.batch_stats(acc, e.stat_groups)
        assert e.coef is not None
        if e.kind == "activate":
            return self.norm_act_(Operand(acc, None, e.coef, e.act, e.slope)), nothing
        assert e.kind == "grad_stats" and e.y is not None
        return self.grad_stats(acc, e.y, e.coef, e.act, e.slope)

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        """In place, for each statistics group in order: `running = momentum*batch + (1 - momentum)*running`.

        `shift` [C] is a conv bias that the raw output, and so `stats`, lacks; `factor` [stat_groups], where given,
        takes the place of `momentum` (a cumulative average). The same roundings as PyTorch's, so the same bits.
        """
        rounded = float(torch.tensor(momentum, dtype=stats.dtype))
        for group in range(stats.shape[1]):
            weight = rounded if factor is None else factor[group]
            batch_mean = stats[0, group] if shift is None else stats[0, group] + shift
            mean.copy_(weight * batch_mean + (1 - weight) * mean.to(stats.dtype))
            # PyTorch's CPU kernel has the batch's variance in double here, and the running one not.
            var.copy_(weight * stats[2, group].double() + (1 - weight) * var.to(stats.dtype))


def _bias(epilogue: Epilogue, weight: Tensor) -> Tensor | None:
    if epilogue.kind != "bias":
        return None
    assert epilogue.coef is not None
    return epilogue.coef.to(weight.dtype)
