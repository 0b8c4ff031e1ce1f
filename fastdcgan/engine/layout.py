"""The strides that the plain modules give their output and their gradients: those of a chain are the same.

PyTorch's convolution decides on one memory format from the strides of its input and its weight
(`spec.format_of_torch`), for its output and its gradients. Normalisations and activations keep it, and make contiguous
what is both formats at once, unless an activation works in place or is PReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdcgan.engine.reordered import Reordered
from fastdcgan.spec import Block, Plan, format_of_torch, memory_format, of_block, says_channels_last, strides_in

Strides = tuple[int, ...]
_Backend = torch._C._ConvBackend  # type: ignore[attr-defined]
_SLOW = (_Backend.Slow2d, _Backend.SlowTranspose2d)


class Layout(NamedTuple):
    """Strides of a chain's output, of its input's gradient, and of the gradients of its weights."""

    out: Strides
    input_grad: Strides
    weight_grads: tuple[Strides, ...]  # () where a block has none


def layout(plan: Plan, x: Tensor, tensors: Sequence[Tensor | None]) -> Layout:
    """The layout for `x` [N, C, H, W] and the blocks' tensors, one after another."""
    shape: Sequence[int] = x.shape
    entered, input_grad = x, None
    weight_grads: list[Strides] = []
    for i, block in enumerate(plan.blocks):
        weight, said, channels, came = of_block(tensors, i).weight, says_channels_last(entered), shape[1], shape
        if weight is None:
            format = memory_format(entered)
            grad = strides_in(shape, torch.channels_last if said else torch.contiguous_format)
            weight_grads.append(())
        else:
            weight_shape = weight.shape
            if block.upsamples:  # two modules, of which the first keeps the format of what it gets, both ways
                block, shape, weight = _after_upsampling(block, shape, weight)
                said = _says(shape, torch.channels_last if said else torch.contiguous_format)
            format = format_of_torch(said, weight)
            kept = shape is came or format == torch.contiguous_format or _says(shape, format)
            grad = strides_in(came, format if kept else torch.contiguous_format)
            alike = format == torch.channels_last and _keeps_contiguous(block, x, shape, weight)
            weight_grads.append(strides_in(weight_shape, torch.contiguous_format if alike else format))
            channels = weight.shape[1] * block.geometry.groups if block.transposed else weight.shape[0]
        input_grad = grad if input_grad is None else input_grad
        shape = (x.shape[0], channels, *block.output_size(shape[2], shape[3]))
        one_choice = channels > 1 and not (shape[2] == 1 and shape[3] == 1)
        keeps = block.act == "identity" or block.inplace or block.learns_slope
        if not one_choice and (block.norm is not None or not keeps):
            format = torch.contiguous_format
        out = strides_in(shape, format)
        entered = torch.empty_strided(shape, out, device="meta")
    assert input_grad is not None
    if type(x) is Reordered:  # in contiguous networks gradients of weights are that
        weight_grads = [
            strides_in(t.shape, torch.contiguous_format) if t is not None and of else of
            for t, of in zip((of_block(tensors, i).weight for i in range(len(plan.blocks))), weight_grads, strict=True)
        ]
    return Layout(out, input_grad, tuple(weight_grads))


def _says(shape: Sequence[int], format: torch.memory_format) -> bool:
    """Whether a tensor of this shape, with the strides of a format, says that it is channels_last."""
    return says_channels_last(torch.empty_strided(shape, strides_in(shape, format), device="meta"))


def _after_upsampling(block: Block, shape: Sequence[int], weight: Tensor) -> tuple[Block, Sequence[int], Tensor]:
    """The convolution, the shape and a weight like that behind the upsampling that a block stands for."""
    format = torch.channels_last if says_channels_last(weight) else torch.contiguous_format
    block, (inputs, outputs) = block.after_upsampling(), weight.shape[:2]
    stored = (outputs, inputs, *block.geometry.kernel)
    upsampled = (*shape[:2], 2 * shape[2], 2 * shape[3])
    return block, upsampled, weight.new_empty_strided(stored, strides_in(stored, format))


def _keeps_contiguous(block: Block, x: Tensor, shape: Sequence[int], weight: Tensor) -> bool:
    """Whether PyTorch's own loops run the convolution, which go by the weight's strides for its gradient, and those are
    contiguous where both would do."""
    if not weight.is_contiguous() or says_channels_last(weight) or torch.compiler.is_compiling():
        return False
    if not weight.is_contiguous(memory_format=torch.channels_last):
        return False
    g, one = block.geometry, x.new_empty(1).expand(*shape)  # nothing but its shape is read
    return (
        torch._C._select_conv_backend(
            one, weight, None, g.stride, g.padding, g.dilation, block.transposed, block.output_padding, g.groups, None
        )
        in _SLOW
    )
