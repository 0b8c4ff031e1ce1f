"""The floor: how fast a training step could be at best, from FLOPs, bytes and two measured ceilings.

Every contraction takes at least the larger of FLOPs / peak rate and bytes / bandwidth, where it reads each operand once
and writes its result once; every pass over memory that is not part of a contraction takes its bytes / bandwidth. They
can't overlap (each needs the one before), so times add up. Activations and working weights have 2 bytes, weight
gradients 4, and Adam moves 30 bytes a parameter: it reads weight, gradient and two moments in float32, writes weight
and moments, and the 2-byte working weight.

Three levels, each a bound that no implementation of its kind can beat:

    unfused     statistics, normalisation with activation, and their backward as passes of their own
    epilogues   statistics of forward and backward, and activations without BN, inside the contractions
    full        also no normalised activation and no gradient of a raw output in memory: both computed on load

Per-channel vectors, the loss, and copies of the images are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastdcgan.benchmarks.shapes import Block, NetShape

LEVELS = ("unfused", "epilogues", "full")
ACTIVATION_BYTES = 2
GRADIENT_BYTES = 4
ADAM_BYTES_PER_PARAMETER = 30


@dataclass(frozen=True)
class Work:
    """One contraction (`flops` > 0) or one pass over memory."""

    what: str
    flops: int
    bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def _level(level: str) -> int:
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}: expected one of {', '.join(LEVELS)}")
    return LEVELS.index(level)


def forward(block: Block, batch: int, level: str = "full") -> Iterator[Work]:
    """The work of a block's forward in training mode."""
    fused = _level(level)
    x, y, w = block.inputs(batch), block.outputs(batch), block.weights
    yield Work(f"{block.name} forward", block.flops(batch), ACTIVATION_BYTES * (x + y + w))
    if block.norm:
        if fused < 1:
            yield Work(f"{block.name} statistics", 0, ACTIVATION_BYTES * y)
        if fused < 2:
            yield Work(f"{block.name} normalise", 0, ACTIVATION_BYTES * 2 * y)
    elif block.act != "identity" and fused < 1:
        yield Work(f"{block.name} activation", 0, ACTIVATION_BYTES * 2 * y)


def backward(
    block: Block, batch: int, level: str = "full", input_grad: bool = True, weight_grad: bool = True
) -> Iterator[Work]:
    """The work of a block's backward, with the output's gradient given."""
    fused = _level(level)
    if not (input_grad or weight_grad):
        return
    x, y, w = block.inputs(batch), block.outputs(batch), block.weights
    operands = y  # the values that each contraction reads: dy, or the two tensors that it is computed from
    if block.norm:
        if fused < 1:
            yield Work(f"{block.name} gradient sums", 0, ACTIVATION_BYTES * 2 * y)
        if fused < 2:
            yield Work(f"{block.name} dy", 0, ACTIVATION_BYTES * 3 * y)
        else:
            operands = 2 * y
    elif block.act != "identity" and fused < 1:
        yield Work(f"{block.name} activation backward", 0, ACTIVATION_BYTES * 3 * y)
    if input_grad:
        yield Work(f"{block.name} input gradient", block.flops(batch), ACTIVATION_BYTES * (x + operands + w))
    if weight_grad:
        moved = ACTIVATION_BYTES * (x + operands) + GRADIENT_BYTES * w
        yield Work(f"{block.name} weight gradient", block.flops(batch), moved)


def parameters(shape: NetShape) -> int:
    """Number of trained parameters of both nets."""
    blocks = shape.generator() + shape.discriminator()
    return sum(block.weights + (2 * block.out_channels if block.norm else 0) for block in blocks)


def step(shape: NetShape, batch: int, level: str = "full") -> Iterator[Work]:
    """The work of one training step as `steps.gan_step` runs it: D on real and on fake, G, both Adams.

    D's first input gradient is needed in G's step alone, D's weight gradients in D's step alone, the noise's never.
    """
    generator, discriminator = shape.generator(), shape.discriminator()
    for _ in ("real", "fake"):
        for block in discriminator:
            yield from forward(block, batch, level)
            yield from backward(block, batch, level, input_grad=block is not discriminator[0])
    for block in discriminator:
        yield from forward(block, batch, level)
        yield from backward(block, batch, level, weight_grad=False)
    for block in generator:
        yield from forward(block, batch, level)
        yield from backward(block, batch, level, input_grad=block is not generator[0])
    yield Work("Adam", 0, ADAM_BYTES_PER_PARAMETER * parameters(shape))


def step_flops(shape: NetShape, batch: int) -> int:
    """FLOPs of the contractions of one training step; the same at every level."""
    return sum(work.flops for work in step(shape, batch))


def step_seconds(shape: NetShape, batch: int, level: str, flops_per_s: float, bytes_per_s: float) -> float:
    """The floor of one training step at the given ceilings."""
    for name, value in (("flops_per_s", flops_per_s), ("bytes_per_s", bytes_per_s)):
        if not value > 0:
            raise ValueError(f"{name} has to be positive, not {value}")
    return sum(work.seconds(flops_per_s, bytes_per_s) for work in step(shape, batch, level))
