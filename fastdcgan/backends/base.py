"""What a backend is, and the parts that every backend may share. Its methods are the primitives of
`dispatch/primitives.py`, and it offers its contractions as `Algorithm`s for the router."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Algorithm, Block, Boundaries, Call, Epilogue, Operand, Update, memory_format, stat_dtype


def _image_and_linear(op: str, x: Tensor, other: Tensor, size: Pair) -> tuple[Pair, Pair]:
    """Height and width of the side that the taps of a contraction shift over, and of the other."""
    own = (x.shape[2], x.shape[3])
    if op == "weight_grad":
        return own, (other.shape[2], other.shape[3])
    return (own, size) if op == "conv" else (size, own)


@functools.lru_cache(maxsize=1024)
def _odd(g: Geometry, image: Pair, linear: Pair) -> bool:
    """Whether PyTorch 2.13's convolutions on CPUs may leave values unwritten, count some twice or read outside the
    image: those of 16-bit numbers, and those of float32 in channels_last that add a bias. It is so for taps that read
    padding alone, and for a single column of outputs with a stride (found by trying thousands of geometries on
    processors with AMX and with AVX512_BF16)."""
    return not g.reaches(image, linear) or (linear[1] == 1 and g.stride[1] > 1)


def _pixels_read(x: Tensor, g: Geometry) -> tuple[Tensor, Geometry]:
    """What a 1x1 kernel with a stride reads of an image, and the geometry that is left: where pixels are left over at
    the end, PyTorch 2.13's weight gradient in float32 and channels_last writes outside its buffers (found on AVX2)."""
    if g.kernel != (1, 1) or g.padding != (0, 0) or g.stride == (1, 1):
        return x, g
    read = x[:, :, :: g.stride[0], :: g.stride[1]].contiguous(memory_format=memory_format(x))
    return read, replace(g, stride=(1, 1))


def _rounds_each_tap(x: Tensor, weight: Tensor, g: Geometry, extra: Pair) -> bool:
    """Whether PyTorch's own loops would run a transposed convolution, which add up what each tap gives in the dtype of
    `x`: in 16 bits they err more than a plain convolution of the upsampled `x`."""
    return (
        torch._C._select_conv_backend(
            x, weight.to(x.dtype), None, g.stride, g.padding, g.dilation, True, extra, g.groups, None
        )
        == torch._C._ConvBackend.SlowTranspose2d  # type: ignore[attr-defined]
    )


class Composites:
    """Several primitives in one, for a backend whose calls cost more than what they do on small tensors, and results
    that may take the place of an argument, for one that gains by it. Here they are what they are made of."""

    def norm_act(self, a: Operand) -> Tensor:
        raise NotImplementedError

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        raise NotImplementedError

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        raise NotImplementedError

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: int) -> Tensor:
        raise NotImplementedError

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        raise NotImplementedError

    def normalize(
        self, y: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        """`act(s*y + t)` and the coef of `y` with the batch's `stats`: `coefficients`, then `norm_act`."""
        coef = self.coefficients(stats[0], stats[1], weight, bias, None, eps)
        return self.norm_act(Operand(y, None, coef, act, slope)), coef

    def normalize_backward(
        self, da: Tensor, y: Tensor, coef: Tensor, count: int, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        """`dy` and `sums`: `norm_act_reduce`, `grad_coefficients` over `count` values, then `norm_act`."""
        sums = self.norm_act_reduce(da, y, coef, act, slope)
        return self.norm_act(Operand(da, y, self.grad_coefficients(sums, coef, count), act, slope)), sums

    def bias_coefficients(self, like: Tensor, bias: Tensor | None, channels: int) -> Tensor:
        """`coef` (1, bias) [2, 1, C] of a block without normalisation, in the `stat_dtype` of `like`."""
        dtype = stat_dtype(like)
        shift = like.new_zeros(channels, dtype=dtype) if bias is None else bias.to(dtype)
        return torch.stack([torch.ones_like(shift), shift])[:, None]

    def update_all_running(self, updates: Sequence[Update]) -> None:
        """`update_running` for several normalisations."""
        for u in updates:
            self.update_running(*u)

    def norm_act_(self, a: Operand) -> Tensor:
        """`norm_act`, which may take the place of `a.x`: then nobody else may hold it."""
        return self.norm_act(a)

    def normalize_backward_(
        self, da: Tensor, y: Tensor, coef: Tensor, count: int, act: str, slope: float
    ) -> tuple[Tensor, Tensor]:
        """`normalize_backward`, whose dy may take the place of `da`: then nobody else may hold it."""
        return self.normalize_backward(da, y, coef, count, act, slope)


class Backend(Composites):
    """The primitives. PyTorch's own convolutions run with the prologue and the epilogue as passes of their own, so a
    backend may bring as few as those and no algorithm."""

    name: str
    chooses_boundaries = False  # whether `boundaries` may say anything but no
    compiles = False  # whether kernels are compiled when they are first used, which takes seconds each
    casts_weights = False  # whether its contractions take float32 weights with 16-bit activations

    def require(self) -> None:
        """Raise Unavailable, with the original error, if this backend can't run on this machine."""

    def compiling_ahead(self) -> contextlib.AbstractContextManager[None]:
        """Inside a `with`, kernels are compiled side by side instead of run: results are no numbers."""
        return contextlib.nullcontext()

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """None if blocks of this device and dtype run here, else the reason."""
        raise NotImplementedError

    def algorithms(self, op: str) -> Sequence[Algorithm]:
        """The ways to run a contraction, in the order in which they are tried where nothing was measured."""
        return ()

    def settings(self) -> tuple:
        """What of PyTorch's global settings the choice of an algorithm depends on."""
        return ()

    def boundaries(
        self, blocks: Sequence[Block], weights: Sequence[Tensor | None], size: Pair, needs: Sequence[bool]
    ) -> Boundaries:
        """What a chain does where nothing was measured: `blocks` on an input image of `size`, with these weights (None
        of a block without a convolution).

        `needs`: whether the input, and then each of the weights, needs a gradient.
        """
        n = len(blocks)
        return Boundaries((False,) * (n - 1), (False,) * (n - 1), (False,) * n)

    def prefers_channels_last(self, blocks: Sequence[Block], weights: Sequence[Tensor], x: Tensor) -> bool:
        """Whether a chain of contiguous tensors is faster in channels_last, with its input and output converted."""
        return False

    def grad_stats(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        """`g = da*act'(s*y + t)`, stored, and its `sums`."""
        raise NotImplementedError

    def grad_stats_(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        """`grad_stats`, whose g may take the place of `da`: then nobody else may hold it."""
        return self.grad_stats(da, y, coef, act, slope)

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        """`stats` [3, stat_groups, C] of a raw output [N, C, H, W]."""
        raise NotImplementedError

    # --- contractions by way of PyTorch's own ---

    def direct_ms(self, call: Call) -> float:
        """Milliseconds that the products of a direct convolution, as PyTorch's own is, take at least on this machine; 0
        where that isn't known."""
        return 0.0

    def pytorch(self, call: Call, tile: None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The contraction as PyTorch's convolution between this backend's passes."""
        g, x = call.geometry, self.finished(call.a)
        other = self.finished(call.b) if call.op == "weight_grad" else call.b
        if call.op == "weight_grad" and x.device.type == "cpu":
            x, g = _pixels_read(x, g)
        image, linear = _image_and_linear(call.op, x, other, call.size)
        transposed = call.op == "conv_transpose"
        extra = g.output_padding(x.shape[2], x.shape[3], call.size) if transposed else (0, 0)
        # Where PyTorch gets it wrong, 16 bits are multiplied as float32 and rounded then, and a bias is added after it.
        odd = x.device.type == "cpu" and _odd(g, image, linear)
        wide = x.itemsize == 2 and (
            odd or (x.device.type == "cpu" and transposed and _rounds_each_tap(x, other, g, extra))
        )
        dtype = torch.float32 if wide else x.dtype
        if call.op == "weight_grad":
            # PyTorch reads no more than the shape, dtype and strides of the weight.
            shape = (other.shape[1], x.shape[1] // g.groups, *g.kernel)
            weight = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(x))
            return torch.ops.aten.convolution_backward(
                other.to(dtype), x.to(dtype), weight, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups,
                [False, True, False],
            )[1].to(x.dtype)  # fmt: skip
        e, bias = call.epilogue, None
        if e.kind == "bias":
            assert e.coef is not None
            bias = e.coef.to(x.dtype).to(dtype)
        acc = torch.ops.aten.convolution(
            x.to(dtype), other.to(x.dtype).to(dtype), None if odd else bias, g.stride, g.padding, g.dilation,
            transposed, extra, g.groups,
        )  # fmt: skip
        if odd and bias is not None:
            acc += bias[:, None, None]
        return self.apply_epilogue(acc.to(x.dtype), e)

    def finished(self, a: Operand) -> Tensor:
        """The operand as a plain tensor."""
        return a.x if a.coef is None else self.norm_act(a)

    def apply_epilogue(self, acc: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
        """What the epilogue says, as separate passes over the stored accumulator."""
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
        return self.grad_stats_(acc, e.y, e.coef, e.act, e.slope)

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        """In place, for each statistics group in order: `running = momentum*batch + (1 - momentum)*running`.

        `shift` [C] is a conv bias that the raw output, and so `stats`, lacks; `factor` [stat_groups], where given,
        takes the place of `momentum` (a cumulative average). The same roundings as PyTorch's, so the same bits.
        """
        rounded = momentum if stats.dtype == torch.float64 else ctypes.c_float(momentum).value
        for group in range(stats.shape[1]):
            weight = rounded if factor is None else factor[group]
            batch_mean = stats[0, group] if shift is None else stats[0, group] + shift
            mean.copy_(weight * batch_mean + (1 - weight) * mean.to(stats.dtype))
            # PyTorch's CPU kernel has the batch's variance in double here, and the running one not.
            var.copy_(weight * stats[2, group].double() + (1 - weight) * var.to(stats.dtype))
