"""The loss of a GAN's discriminator, with what is monitored about it, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.dispatch import training_ops
from fastdcgan.spec import stat_dtype


def bce_with_logits(logits: Tensor, labels: float | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of `logits` against one label for all, and the mean probability that they stand for:

        mean((1 - label)*x + max(-x, 0) + log(1 + exp(-|x|)))        mean(sigmoid(x))

    The first is `F.binary_cross_entropy_with_logits` against a constant, and can be differentiated to any order; the
    second can't. A label other than 0 and 1 is a smoothed one (Salimans et al., 2016, "Improved Techniques for Training
    GANs", section 3.4). A sequence of k labels is for k equal parts of `logits`, and gives k losses and probabilities:
    with [real; fake] as one batch, `labels=(0.9, 0.0)` is the discriminator's loss in one launch.

    `logits` of any shape and floating dtype; results are float32 (float64 of float64) of shape [] or [k].
    Raises TypeError for logits that are no floating-point tensor and labels that are no numbers, ValueError for labels
    that are not finite, for no logits, or for parts of unequal length.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"expected a floating-point tensor of logits, got {getattr(logits, 'dtype', type(logits))}")
    given = (labels,) if isinstance(labels, int | float) else labels
    if not isinstance(given, tuple | list) or not all(isinstance(label, int | float) for label in given):
        raise TypeError(f"labels must be a number, or a tuple or list of numbers, got {labels!r}")
    each = tuple(map(float, given))
    if not all(map(math.isfinite, each)):
        raise ValueError(f"labels must be finite, got {labels!r}")
    if not each or logits.numel() == 0 or logits.numel() % len(each):
        raise ValueError(f"expected logits in {len(each)} equal parts, got {list(logits.shape)}")
    plain = torch.compiler.is_compiling() or logits.dtype == torch.float64 or training_ops.why_not(logits.device.type)
    losses, probabilities = (_formula if plain else _BCE.apply)(logits, each)
    return (losses[0], probabilities[0]) if isinstance(labels, int | float) else (losses, probabilities)


def _by_part(logits: Tensor, labels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Logits [parts, size] in float32 or float64, and labels [parts, 1], made on the device: copied from the host they
    couldn't be captured in a CUDA graph."""
    x = logits.to(stat_dtype(logits)).reshape(len(labels), -1)
    return x, torch.stack([x.new_full((1,), label) for label in labels])


def _formula(logits: Tensor, labels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    x, y = _by_part(logits, labels)
    losses = F.binary_cross_entropy_with_logits(x, y.expand_as(x), reduction="none").mean(1)
    return losses, x.detach().sigmoid().mean(1)


class _BCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: tuple[float, ...]):
        needed = ctx.needs_input_grad[0]
        losses, probabilities, grad = training_ops.operators(logits.device.type).bce_with_logits(logits, labels, needed)
        ctx.save_for_backward(logits, grad)
        ctx.labels = labels
        ctx.mark_non_differentiable(probabilities)
        return losses, probabilities

    @staticmethod
    def backward(ctx, d_losses: Tensor, _: Tensor):
        logits, grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            x, y = _by_part(logits, ctx.labels)
            scaled = (x.sigmoid() - y) * (d_losses / x.shape[1])[:, None]
        else:  # in float32 up to here: scaled gradients of float16 logits would be lost before they are scaled
            scaled = grad.view(len(ctx.labels), -1) * d_losses[:, None]
        return scaled.to(logits.dtype).reshape(logits.shape), None
