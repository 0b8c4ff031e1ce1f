"""The chain in differentiable formulas, for gradients of gradients (`create_graph=True`, e.g. WGAN-GP).

The three contractions are each other's adjoints, so they are closed under differentiation: a
gradient of any order is a call of the same three. Normalisation and activation are plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.dispatch import primitives
from fastdcgan.engine.layout import Layout, Strides
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import STORE, Operand, Plan, of_block, stat_dtype, strides_in, with_strides


def requested(ctx, needs: Sequence[bool], given: Sequence[bool]) -> list[bool]:
    """Which gradients this very backward is asked for: `torch.autograd.grad(out, x)` wants no weight's.

    `given` says which of the inputs that `needs` speaks of are tensors.
    """
    wants = list(needs)
    if torch.compiler.is_compiling():
        return wants
    nodes = iter(ctx.next_functions)  # one for each input that is a tensor
    for i in range(len(wants)):
        node = next(nodes)[0] if given[i] else None
        if wants[i] and node is not None:
            try:  # noqa: SIM105  contextlib.suppress costs more than what it surrounds
                wants[i] = torch._C._will_engine_execute_node(node)
            except RuntimeError:  # it refuses to answer for a leaf that autograd.grad asks for: that is wanted
                pass
    return wants


def batched(da: Tensor) -> bool:
    """Whether `da` stands for a batch of gradients, which PyTorch's own functions take and no backend does."""
    if torch.compiler.is_compiling():  # which knows no batches, and can't trace the question
        return False
    return torch._C._functorch.is_legacy_batchedtensor(da) or torch._C._are_functorch_transforms_active()


class _Asked(NamedTuple):
    """Strides of a contraction's result and of the gradients of its operands, where they are asked for."""

    result: Strides | None = None
    first: Strides | None = None
    second: Strides | None = None


_NOTHING = _Asked()


def _laid(found: Tensor, stride: Strides | None) -> Tensor:
    return found if stride is None else with_strides(found, stride)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, geometry: Geometry, backend: str, asked: _Asked = _NOTHING):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.backend, ctx.asked = geometry, backend, asked
        return _laid(primitives.conv(Operand(x), weight, geometry, STORE, backend)[0], asked.result)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x, weight), g, backend, asked = ctx.saved_tensors, ctx.geometry, ctx.backend, ctx.asked
        need = requested(ctx, ctx.needs_input_grad[:2], (True, True))
        dx = (
            _ConvTranspose.apply(dy, weight, g, (x.shape[2], x.shape[3]), backend, _Asked(asked.first))
            if need[0]
            else None
        )
        dw = _WeightGrad.apply(x, dy, g, backend, _Asked(asked.second)) if need[1] else None
        return dx, dw, None, None, None


class _ConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, geometry: Geometry, output_size: Pair, backend: str, asked: _Asked = _NOTHING
    ):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.backend, ctx.asked = geometry, backend, asked
        return _laid(
            primitives.conv_transpose(Operand(x), weight, geometry, output_size, STORE, backend)[0], asked.result
        )

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x, weight), g, backend, asked = ctx.saved_tensors, ctx.geometry, ctx.backend, ctx.asked
        need = requested(ctx, ctx.needs_input_grad[:2], (True, True))
        dx = _Conv.apply(dy, weight, g, backend, _Asked(asked.first)) if need[0] else None
        dw = _WeightGrad.apply(dy, x, g, backend, _Asked(asked.second)) if need[1] else None
        return dx, dw, None, None, None, None


class _WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gathered: Tensor, linear: Tensor, geometry: Geometry, backend: str, asked: _Asked = _NOTHING):
        ctx.save_for_backward(gathered, linear)
        ctx.geometry, ctx.backend, ctx.asked = geometry, backend, asked
        return _laid(primitives.weight_grad(Operand(gathered), Operand(linear), geometry, backend), asked.result)

    @staticmethod
    def backward(ctx, dw: Tensor):
        (gathered, linear), g, backend = ctx.saved_tensors, ctx.geometry, ctx.backend
        need = requested(ctx, ctx.needs_input_grad[:2], (True, True))
        d_gathered = d_linear = None
        if need[0]:
            d_gathered = _ConvTranspose.apply(linear, dw, g, (gathered.shape[2], gathered.shape[3]), backend)
        if need[1]:
            d_linear = _Conv.apply(gathered, dw, g, backend)
        return d_gathered, d_linear, None, None, None


class _Entered(torch.autograd.Function):
    """x as it is, its gradient with the strides that are asked for."""

    @staticmethod
    def forward(ctx, x: Tensor, stride: Strides):
        ctx.stride = stride
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor):
        if dx.stride() != ctx.stride:
            channels_last = ctx.stride == strides_in(dx.shape, torch.channels_last)
            format = torch.channels_last if channels_last else torch.contiguous_format
            dx = dx.contiguous(memory_format=format).as_strided(dx.shape, ctx.stride)
        return dx, None


def formula(plan: Plan, x: Tensor, tensors: Sequence[Tensor | None], layout: Layout | None) -> Tensor:
    """The chain's output as a differentiable function, to any order, of `x` and `tensors`.

    Without a `layout` the convolutions are PyTorch's own, which take batches of gradients too.
    """
    for i, block in enumerate(plan.blocks):
        t, g = of_block(tensors, i), block.geometry
        asked = _NOTHING if layout is None else _Asked(None, None if i else layout.input_grad, layout.weight_grads[i])
        if t.weight is None:
            y = x if i or layout is None else _Entered.apply(x, layout.input_grad)
        elif layout is None:
            extra = block.output_padding if block.transposed else (0, 0)
            y = torch.convolution(x, t.weight, None, g.stride, g.padding, g.dilation, block.transposed, extra, g.groups)
        elif block.transposed:
            size = block.output_size(x.shape[2], x.shape[3])
            y = _ConvTranspose.apply(x, t.weight, block.geometry, size, block.backend, asked)
        else:
            y = _Conv.apply(x, t.weight, block.geometry, block.backend, asked)
        z = y.to(stat_dtype(y))
        if t.bias is not None:
            z = z + t.bias.to(z.dtype)[:, None, None]
        if block.norm is not None and z.shape[0] == 0:  # nothing to normalise; weight and bias get zero gradients
            z = z * _vector(t.bn_weight, z, 1.0) + _vector(t.bn_bias, z, 0.0)
        elif block.norm is not None:
            groups = block.norm.groups(plan.stat_groups, z.shape[0]) if block.norm.batch_stats else 1
            z = z.reshape(groups, -1, *z.shape[1:])
            if block.norm.batch_stats:
                if block.norm.process_group is not None:
                    raise RuntimeError("create_graph=True is not supported through SyncBatchNorm: use nn.BatchNorm2d")
                var, mean = torch.var_mean(z, dim=(1, 3, 4), correction=0, keepdim=True)
            else:
                assert t.running_mean is not None and t.running_var is not None
                mean, var = (v.to(z.dtype)[:, None, None] for v in (t.running_mean, t.running_var))
            z = ((z - mean) * torch.rsqrt(var + block.norm.eps)).flatten(0, 1)
            z = z * _vector(t.bn_weight, z, 1.0) + _vector(t.bn_bias, z, 0.0)
        if t.slope is not None:
            x = F.prelu(z, t.slope.to(z.dtype)).to(y.dtype)
        else:
            x = ACTIVATIONS[block.act].forward(z, block.slope).to(y.dtype)
    return x


def _vector(v: Tensor | None, z: Tensor, default: float) -> Tensor | float:
    return default if v is None else v.to(z.dtype)[:, None, None]


def gradients(
    plan: Plan, layout: Layout | None, inputs: Sequence[Tensor | None], needs: Sequence[bool], da: Tensor
) -> list[Tensor | None]:
    """Gradients of (x, *tensors), themselves differentiable with respect to `inputs` and `da` in grad mode."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that differentiation stops here even where one input is a function of another.
        views = [
            torch.ops.aten.alias(t) if need and t is not None else t for t, need in zip(inputs, needs, strict=True)
        ]
        assert views[0] is not None
        out = formula(plan, views[0], views[1:], layout)
        asked = [v for v, need in zip(views, needs, strict=True) if need and v is not None]
        found = iter(torch.autograd.grad(out, asked, da, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
