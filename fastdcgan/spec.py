"""The types that everything above carries: operands and epilogues of contractions, blocks, plans; and memory layout.

The contractions take their activations as an `Operand` (a tensor, or one that is computed on load: the prologue) and
may do more to the accumulator than store it (the `Epilogue`). docs/how-it-works.md has the formulas: `y` is the raw
convolution output, `z = s*y + t` the pre-activation, `xhat = (y - mean)*rstd`, `g = da*act'(z)`.

Per-channel vectors are float32 (float64 for float64 tensors) of shape `[rows, stat_groups, C]`; statistics group `i`
covers the `i`-th of `stat_groups` equal parts of the batch:

    stats       (mean, biased variance, unbiased variance)
    coef        (s, t, mean, rstd)   or (s, t) where nothing is normalised
    grad_coef   (s, t, p, q)         or (s, t) where p = q = 0
    sums        (sum(g), sum(g*xhat)) or (sum(g),) for a coef of two rows

Where the slope of leaky_relu is learned (PReLU), coef and grad_coef have it as one row more, their last, and sums have
its gradient, sum(da*min(z, 0)): in elementwise passes and reductions alone, no contraction takes such a coef.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdcgan.geometry import Geometry, Pair


class Unavailable(RuntimeError):
    """A backend that was asked for can't run here. The message has the reason and the names that can."""


# --- contractions ---


class Operand(NamedTuple):
    """A tensor, or one that is a per-channel map of tensors and is computed while it is loaded.

    coef None         x
    y None            act(s*x + t)                          `coef` (s, t, ...): the block before, not yet activated
    y given           s*act'(s*y + t)*x + p*y + q           `coef` is a grad_coef: the gradient of a raw output
    """

    x: Tensor
    y: Tensor | None = None
    coef: Tensor | None = None
    act: str = "identity"
    slope: float = 0.0


class Epilogue(NamedTuple):
    """What happens to the accumulator `acc` before it is stored.

    none          store acc
    bias          store acc + coef                          `coef` [C]
    activate      store act(s*acc + t)                      `coef` (s, t, ...)
    stats         store acc; return stats
    grad_stats    store g = acc*act'(s*y + t); return sums  `coef` (s, t, mean, rstd) or (s, t), and `y`
    """

    kind: str = "none"
    y: Tensor | None = None
    coef: Tensor | None = None
    act: str = "identity"
    slope: float = 0.0
    stat_groups: int = 1


STORE = Epilogue()


class Call(NamedTuple):
    """One call of a contraction.

    op                     a         b                        size                 returns
    conv, conv_transpose   operand   weight (a tensor)        of the output        output, the epilogue's vectors
    weight_grad            gathered  linear (an Operand)      of the kernel        the weight's gradient

    `stays`: the weight is likely to be the same at the next call. It isn't while anything is trained, so what a backend
    makes of the weight is then made anew at every call. `contiguous`: so is the weight's gradient wanted, whatever the
    operands are; a backend may give it in their format.
    """

    op: str
    a: Operand
    b: Any
    geometry: Geometry
    size: Pair
    epilogue: Epilogue = STORE
    stays: bool = False
    contiguous: bool = False


@dataclass(frozen=True)
class Algorithm:
    """One way to run a contraction, which a backend offers to the router (`dispatch/router.py`).

    `why_not(call)` is None where it can run, else the reason. `run(call, tile)` runs it; tile None is the choice of the
    algorithm's own rule. `tiles(call)` are those that tuning compares: instances of the frozen dataclass `tile_type`.
    `why_last(call)` is None, or the reason why another is likely to be faster: it then runs where it was measured to be
    the fastest, or where no other can. `least_ms(call)` are milliseconds that it takes at least, 0 where nobody knows.
    """

    name: str
    why_not: Callable[[Call], str | None]
    run: Callable[[Call, Any], Any]
    tiles: Callable[[Call], Sequence[Any]] | None = None
    tile_type: type | None = None
    why_last: Callable[[Call], str | None] = lambda call: None
    least_ms: Callable[[Call], float] = lambda call: 0.0


class Update(NamedTuple):
    """The arguments of `Backend.update_running`."""

    mean: Tensor
    var: Tensor
    stats: Tensor
    shift: Tensor | None
    factor: Tensor | None
    momentum: float


class Boundaries(NamedTuple):
    """The choices of a chain's plan that change speed and memory, but no result beyond rounding."""

    deferred: tuple[bool, ...]  # per boundary: pass (y, coef) on, not the finished a
    epilogue_sums: tuple[bool, ...]  # per boundary: grad_stats is the epilogue of the contraction that gives da
    lazy_grad: tuple[bool, ...]  # per block: dy is computed where it is loaded, and never stored


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics, coefficients and activations of `x` are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- blocks and chains ---


@dataclass(frozen=True)
class Norm:
    """A normalisation per channel: by the batch's own statistics, or by running ones."""

    eps: float
    batch_stats: bool
    process_group: Any = None  # statistics are shared over it (SyncBatchNorm)
    instance: bool = False  # each image has statistics of its own (InstanceNorm)

    def groups(self, stat_groups: int, images: int) -> int:
        """How many parts of a batch of `images` have statistics of their own, in a chain of so many `stat_groups`."""
        return images if self.instance else stat_groups


@dataclass(frozen=True)
class Block:
    """convolution [+ norm] [+ activation], and the backend that runs it. Without `convolves`, norm [+ activation] of
    what comes in, where they stand in front of a convolution or behind an activation: its `geometry` is `IDENTITY`."""

    transposed: bool
    geometry: Geometry
    output_padding: Pair
    norm: Norm | None
    act: str
    slope: float
    backend: str
    inplace: bool = field(default=False, repr=False, compare=False)  # the activation's module: it decides strides alone
    learns_slope: bool = False  # PReLU: leaky_relu with a slope for each channel, or one for all, in `BlockTensors`
    # It does what nearest upsampling by 2 and a plain convolution do, and a call has that convolution's weight.
    upsamples: bool = field(default=False, repr=False)
    convolves: bool = True

    @property
    def op(self) -> str:
        """The contraction of its forward."""
        return "conv_transpose" if self.transposed else "conv"

    @property
    def adjoint(self) -> str:
        """The contraction that gives its input's gradient."""
        return "conv" if self.transposed else "conv_transpose"

    def output_size(self, height: int, width: int) -> Pair:
        if self.transposed:
            return self.geometry.conv_transpose_size(height, width, self.output_padding)
        return self.geometry.conv_size(height, width)

    def upsampling(self) -> Block:
        """The block that does what nearest upsampling by 2 and this one do; its weight is that of
        `engine/upsampling.py`."""
        geometry = self.geometry.of_upsampled()
        assert geometry is not None and not self.transposed
        return replace(self, transposed=True, geometry=geometry, upsamples=True)

    def after_upsampling(self) -> Block:
        """The block that `upsampling` was asked of."""
        (kh, kw), (ph, pw) = self.geometry.kernel, self.geometry.padding
        geometry = Geometry((kh - 1, kw - 1), padding=(kh - 2 - ph, kw - 2 - pw))
        return replace(self, transposed=False, geometry=geometry, upsamples=False)


class BlockTensors(NamedTuple):
    """What a block reads: convolution weight (None without one) and bias, BN's weight and bias, running mean and
    variance, PReLU's."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    slope: Tensor | None = None


PER_BLOCK = len(BlockTensors._fields)


def of_block(values: Sequence[Any], i: int) -> BlockTensors:
    """The values of block `i` in a sequence that has `PER_BLOCK` of them for each block."""
    return BlockTensors(*values[i * PER_BLOCK : (i + 1) * PER_BLOCK])


@dataclass(frozen=True)
class Plan:
    """What a chain does for one signature of its inputs."""

    blocks: tuple[Block, ...]
    stat_groups: int
    boundaries: Boundaries
    channels_last: bool = False  # between its ends, whatever comes in


class Running(NamedTuple):
    """Running statistics to update after a block in training: `momentum` None means a cumulative average."""

    mean: Tensor
    var: Tensor
    momentum: float | None
    num_batches: Tensor | None = None


# --- memory layout ---


def memory_format(x: Tensor) -> torch.memory_format:
    """`channels_last` for a tensor that PyTorch would call so (strides decide; ambiguous ones count as contiguous)."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def nhwc(x: Tensor) -> Tensor:
    """`x` [N, C, H, W] with its memory in the order N, H, W, C, without gaps; a copy only if it isn't so already."""
    return x.contiguous(memory_format=torch.channels_last)


def strides_in(shape: Sequence[int], layout: torch.memory_format) -> tuple[int, ...]:
    """The strides of [N, C, H, W] without gaps in a memory format, also where sizes of 1 leave a choice."""
    _, channels, height, width = shape
    if layout == torch.channels_last:
        return (height * width * channels, 1, width * channels, channels)
    return (channels * height * width, height * width, width, 1)


def with_strides(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`x` [N, C, H, W], which nobody else holds, with exactly these strides, which are those of a memory format.

    Code around a block may ask for its strides, and takes one channel or one pixel for what they say: so they have to
    be PyTorch's even where others describe the same memory.
    """
    if x.stride() != stride:
        channels_last = stride == strides_in(x.shape, torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if x.stride() != stride:  # in place: a view could not be changed in place behind an autograd.Function
            x.as_strided_(x.shape, stride)
    return x


def format_of_torch(said: bool, weight: Tensor) -> torch.memory_format:
    """The memory format of what PyTorch's convolution with `weight` gives, and of its gradients; `said`: whether its
    input `says_channels_last`."""
    never = weight.is_cuda and weight.dtype == torch.float64
    return torch.channels_last if not never and (said or says_channels_last(weight)) else torch.contiguous_format


def in_format_of_torch(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`out` in the memory format that PyTorch's convolution of `x` and `weight` has; `torch.compile` relies on it."""
    return with_strides(out, strides_in(out.shape, format_of_torch(says_channels_last(x), weight)))


def flat(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H*W*C, 1, 1]; a view where `x` is NHWC in memory."""
    return nhwc(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 1, 1)


def flat_operand(a: Operand) -> Operand:
    taps = a.x.shape[2] * a.x.shape[3]
    return a._replace(
        x=flat(a.x), y=None if a.y is None else flat(a.y), coef=None if a.coef is None else a.coef.repeat(1, 1, taps)
    )


def flat_epilogue(e: Epilogue, taps: int) -> Epilogue:
    """For an output with `taps` times as many channels: (tap, channel)."""
    coef = None if e.coef is None else e.coef.repeat(*[1] * (e.coef.dim() - 1), taps)
    return e._replace(y=None if e.y is None else flat(e.y), coef=coef)


def says_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's convolution takes the strides of `x` [N, C, H, W] for channels_last, also where one channel or
    one pixel makes them ambiguous (`is_channels_last_strides_2d`)."""
    size, stride = x.shape, x.stride()
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(size[d], 1)
    return True
