"""Functional forms of the blocks, and the one place where a chain meets autocast, checks and running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan import backends, checks
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import primitives
from fastdcgan.engine import planner
from fastdcgan.engine.autograd import run
from fastdcgan.geometry import Geometry, Pair, pair
from fastdcgan.images import normalize_images as normalize_images
from fastdcgan.losses import bce_with_logits as bce_with_logits
from fastdcgan.spec import Block, BlockTensors, Norm, Running, Update

# Device types without autocast, which raise where they are asked whether it is on. A list, since Dynamo of torch 2.11
# can't trace torch.amp.is_autocast_available.
_NO_AUTOCAST = frozenset({"meta", "lazy", "vulkan", "ve", "opengl", "opencl", "ideep", "hip", "fpga"})


def block_backend(x: Tensor) -> str:
    """The backend that runs a block on `x`, as `backend()`, FASTDCGAN_BACKEND and the machine have it."""
    return backends.select(backends.requested(), x.device.type, compute_dtype(x))


def _autocast(x: Tensor) -> bool:
    return x.device.type not in _NO_AUTOCAST and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of `x` runs in: autocast's where it is on (never for float64), else x's own."""
    if x.dtype != torch.float64 and x.is_floating_point() and _autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _casts_weights(backend: str, x: Tensor, tensors: Sequence[BlockTensors]) -> bool:
    """Whether the backend's contractions get float32 weights under autocast, and cast them: where no gradient needs a
    cast tensor. What a backend makes of a parameter it may keep from call to call, but not of a tensor of one call."""
    if (
        not backends.get(backend).casts_weights
        or x.numel() == 0
        or not primitives.unwatched(x, *(t.weight for t in tensors))
    ):
        return False
    return not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for t in tensors for v in (x, *t))


def run_chain(
    blocks: Sequence[Block],
    x: Tensor,
    tensors: Sequence[BlockTensors],
    running: Sequence[Running | None],
    stat_groups: int = 1,
    boundaries: str = "auto",
) -> Tensor:
    """Run a chain on `x` [N, C, H, W] and update `running`; nothing is written if a check fails.

    Raises TypeError or ValueError (`checks.check_chain`).
    """
    checks.check_boundaries(boundaries)
    casts_weights = False
    if isinstance(x, Tensor):
        dtype = compute_dtype(x)
        if dtype != x.dtype or _autocast(x):
            x = x.to(dtype)
            casts_weights = _casts_weights(blocks[0].backend, x, tensors)
            left = (torch.float64, torch.float32) if casts_weights else (torch.float64,)
            tensors = [t if t.weight.dtype in left else t._replace(weight=t.weight.to(dtype)) for t in tensors]
    flat = [v for t in tensors for v in t]
    checks.check_chain(blocks, stat_groups, x, flat, casts_weights)
    plan = planner.plan(blocks, x, tensors, stat_groups, boundaries)
    alone = all(b.norm is None or b.norm.process_group is None for b in blocks)
    if x.shape[0] == 0 and alone:  # as PyTorch: an empty output, zero gradients, running statistics as they were
        from fastdcgan.engine.double_backward import formula

        for r in running:
            if r is not None and r.num_batches is not None:
                r.num_batches.add_(stat_groups)
        return formula(plan, x, flat)
    out, stats = run(plan, x, flat)
    updates = [
        _update(t, r, s, stat_groups)
        for t, r, s in zip(tensors, running, stats, strict=True)
        if r is not None and s is not None
    ]
    if updates:
        primitives.update_all_running(updates, blocks[0].backend)
    return out


def _update(t: BlockTensors, r: Running, stats: Tensor, stat_groups: int) -> Update:
    """How the running statistics change; counts the batch."""
    factor = None
    if r.num_batches is not None:
        if r.momentum is None:
            steps = torch.arange(1, stat_groups + 1, device=stats.device)
            factor = (1.0 / (r.num_batches + steps).double()).to(stats.dtype)
        r.num_batches.add_(stat_groups)
    bias = None if t.bias is None else t.bias.detach()
    return Update(r.mean, r.var, stats, bias, factor, 0.0 if r.momentum is None else r.momentum)


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
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must be given together, got only one of them")
    batch_stats = training or mean is None
    running = Running(mean, var, momentum) if training and mean is not None and var is not None else None
    return Norm(eps, batch_stats), running
