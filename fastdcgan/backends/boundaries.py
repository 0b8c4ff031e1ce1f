"""Which boundaries of a chain GPU kernels with prologues defer, by a rule, where nothing was measured.

A prologue costs no bytes, but it is computed again wherever its operand is loaded: for every tap, and for every tile of
the other side's channels. A pass over memory is computed once and costs bytes. The rule counts both, as if the
arithmetic of prologues were never hidden behind the tensor cores: deferring is chosen where it pays even then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Boundaries

if TYPE_CHECKING:
    from fastdcgan.spec import Block

_TILE = 128  # channels
_NARROW = 4  # channels of the image-side kernels, which load the wide operand once
# Instructions in the time of one byte: 132 multiprocessors x 128 lanes x 1.755 GHz against the 3.0 TB/s of an H100.
_PER_BYTE = 10
ACTIVATE, BN_BACKWARD = 9, 15  # instructions a value: of leaky ReLU, and affine, as nvcc 13.0 compiles csrc/cuda


def loads(op: str, operand: str, geometry: Geometry, size: Pair, channels: int, own: int) -> float:
    """How often a contraction loads each value of an operand.

    op        "conv", "conv_transpose" or "weight_grad"
    operand   of weight_grad: "gathered" or "linear"; of the others "gathered" is conv's, "linear" conv_transpose's
    size      of the gathered side's image
    channels  of the other side (output, or the other operand), `own` of this one
    """
    taps = geometry.kernel[0] * geometry.kernel[1]
    if geometry.spans(*size):  # one matrix product: taps are channels of the gathered side
        across = channels * taps if operand == "linear" else channels
        return float(-(-across // _TILE))
    if operand == "linear" and channels <= _NARROW:
        return 1.0
    if operand == "gathered" and (op == "weight_grad" or own <= _NARROW or channels > _NARROW):
        taps_each = taps / (geometry.stride[0] * geometry.stride[1])
    else:
        taps_each = float(taps)
    return taps_each * -(-channels // _TILE)


def boundaries(
    blocks: Sequence[Block], weights: Sequence[Tensor | None], size: Pair, needs: Sequence[bool]
) -> Boundaries:
    """`Backend.boundaries` by the rule above."""
    sizes = [size]
    for block in blocks:
        sizes.append(block.output_size(*sizes[-1]))
    reached = [any(needs[: i + 1]) for i in range(len(blocks))]  # does block i pass a gradient on?
    needs = needs[1:]
    deferred, lazy = [], []
    for i, (block, w) in enumerate(zip(blocks, weights, strict=True)):
        if w is None:  # it reads and writes tensors: there is nothing to choose
            deferred += [False] * (i > 0)
            lazy.append(False)
            continue
        c_in, c_out = (w.shape[0], w.shape[1]) if block.transposed else (w.shape[1], w.shape[0])
        geometry, value = block.geometry, _PER_BYTE * w.element_size()
        image = sizes[i + 1] if block.transposed else sizes[i]  # the gathered side
        forward, mine, its = ("conv_transpose", "linear", "gathered") if block.transposed else (
            "conv", "gathered", "linear"
        )  # fmt: skip
        adjoint = "conv" if block.transposed else "conv_transpose"
        if i:
            cost = loads(forward, mine, geometry, image, c_out, c_in)
            cost += needs[i] * loads("weight_grad", mine, geometry, image, c_out, c_in)
            deferred.append(ACTIVATE * cost < 2 * value)  # spares writing a, and reading y for that
        cost = needs[i] * loads("weight_grad", its, geometry, image, c_in, c_out)
        cost += reached[i] * loads(adjoint, its, geometry, image, c_in, c_out)
        readers = needs[i] + reached[i]
        # Stored: da and y are read, dy is written, and each contraction reads it; lazy: each reads da and y.
        lazy.append(readers > 0 and BN_BACKWARD * cost < (3 - readers) * value)
    # The epilogue reads y and spares the pass that reads da and y.
    return Boundaries(tuple(deferred), (True,) * (len(blocks) - 1), tuple(lazy))
