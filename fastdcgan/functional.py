"""Functional forms of the blocks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastdcgan import checks
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.engine.planned import block_backend, run_chain
from fastdcgan.geometry import Geometry, Pair, pair
from fastdcgan.images import normalize_images
from fastdcgan.losses import bce_with_logits
from fastdcgan.spec import Block, BlockTensors, Norm, Running

__all__ = [
    "bce_with_logits",
    "conv_act",
    "conv_bn_act",
    "conv_transpose_act",
    "conv_transpose_bn_act",
    "normalize_images",
]


def _single(
    transposed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Pair,
    padding: int | Pair,
    output_padding: int | Pair,
    dilation: int | Pair,
    groups: int,
    norm: Norm | None,
    norm_tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    running: Running | None,
    activation: str,
    slope: float | None,
    stat_groups: int,
) -> Tensor:
    checks.check_activation(activation)
    if slope is not None:
        checks.FINITE.check("slope", slope)
    checks.check_weight(weight, groups, transposed)
    checks.check_stat_groups(stat_groups)
    for name, value, minimum in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("output_padding", output_padding, 0),
        ("dilation", dilation, 1),
    ):
        checks.check_pair(name, value, minimum)
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor as input, got {type(x).__name__}")
    geometry = Geometry(pair(tuple(weight.shape[2:])), pair(stride), pair(padding), pair(dilation), groups)
    checks.check_output_padding(pair(output_padding), geometry)
    beyond = tuple(extra // stride for extra, stride in zip(pair(output_padding), geometry.stride, strict=True))
    if any(beyond) and x.dim() == 4:  # more than a stride (under a larger dilation): as pixels of zeros in the input
        x = F.pad(x, (0, beyond[1], 0, beyond[0]))
        output_padding = (pair(output_padding)[0] % geometry.stride[0], pair(output_padding)[1] % geometry.stride[1])
    chosen = ACTIVATIONS[activation].default_slope if slope is None else slope
    block = Block(transposed, geometry, pair(output_padding), norm, activation, chosen, block_backend(x))
    return run_chain([block], x, [BlockTensors(weight, bias, *norm_tensors)], [running], stat_groups)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str = "leaky_relu",
    slope: float | None = None,
    stat_groups: int = 1,
) -> Tensor:
    """`act(batch_norm(conv2d(x)))` as one block: DCGAN's discriminator block (Radford et al., 2015, section 3).

    `x` [N, Ci, H, W], contiguous or channels_last, in any floating dtype; `weight` [Co, Ci/groups, kh, kw] of the same
    dtype (under autocast both are cast); the vectors [Co] are the arguments of `F.conv2d` and `F.batch_norm`. With
    `training`, or without running statistics, the batch's own are used, over each of `stat_groups` equal parts of the
    batch, and the running ones, if given, are updated in place, once per part. `slope` is leaky_relu's negative slope
    (default 0.2) or elu's alpha (default 1). Returns [N, Co, H', W'] in PyTorch's dtype and memory format.
    Raises TypeError or ValueError for arguments that don't fit; nothing is written then.
    """
    norm, running = _norm(training, running_mean, running_var, momentum, eps)
    vectors = (bn_weight, bn_bias, running_mean, running_var)
    return _single(
        False, x, weight, bias, stride, padding, 0, dilation, groups, norm, vectors, running, activation, slope,
        stat_groups,
    )  # fmt: skip


def conv_transpose_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    output_padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str = "relu",
    slope: float | None = None,
    stat_groups: int = 1,
) -> Tensor:
    """`act(batch_norm(conv_transpose2d(x)))` as one block: DCGAN's generator block (Radford et al., 2015, section 3).

    `weight` [Ci, Co/groups, kh, kw]; `output_padding` as in `F.conv_transpose2d`; all else as in `conv_bn_act`.
    """
    norm, running = _norm(training, running_mean, running_var, momentum, eps)
    vectors = (bn_weight, bn_bias, running_mean, running_var)
    return _single(
        True, x, weight, bias, stride, padding, output_padding, dilation, groups, norm, vectors, running, activation,
        slope, stat_groups,
    )  # fmt: skip


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str = "leaky_relu",
    slope: float | None = None,
) -> Tensor:
    """`act(conv2d(x) + bias)` as one block: the discriminator's first layer. Arguments as in `conv_bn_act`."""
    return _single(
        False, x, weight, bias, stride, padding, 0, dilation, groups, None, (None,) * 4, None, activation, slope, 1
    )


def conv_transpose_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    output_padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str = "tanh",
    slope: float | None = None,
) -> Tensor:
    """`act(conv_transpose2d(x) + bias)` as one block: the generator's last layer. As in `conv_transpose_bn_act`."""
    return _single(
        True, x, weight, bias, stride, padding, output_padding, dilation, groups, None, (None,) * 4, None, activation,
        slope, 1,
    )  # fmt: skip


def _norm(
    training: bool, mean: Tensor | None, var: Tensor | None, momentum: float, eps: float
) -> tuple[Norm, Running | None]:
    checks.check_norm(eps, momentum)
    if not isinstance(training, bool):
        raise TypeError(f"training must be True or False, got {training!r}")
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must be given together, got only one of them")
    batch_stats = training or mean is None
    running = Running(mean, var, momentum) if training and mean is not None and var is not None else None
    return Norm(eps, batch_stats), running
