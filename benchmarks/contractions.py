"""The bare contractions, without prologue or epilogue: every algorithm of the backends against PyTorch's (cuDNN's).

Forward, input gradient and weight gradient of one layer, channels_last, each call with a cold second-level cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastdcgan import backends, spec
from fastdcgan.benchmarks import harness, peers
from fastdcgan.benchmarks.results import Case, Row
from fastdcgan.benchmarks.shapes import Block
from fastdcgan.benchmarks.suites import device_settings
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Operand

LIBRARY = "pytorch"
PARTS = ("forward", "input gradient", "weight gradient")
Call = Callable[[], Tensor]


def run_layer(block: Block, batch: int, device: torch.device, dtype: str, timing: harness.Timing) -> list[Case]:
    """A case for each part: a row for PyTorch's, and one for each algorithm of a backend that can run it."""
    x, w, dy = tensors(block, batch, device, dtype)
    with device_settings(device):
        return [_case(block, part, x, w, dy, dtype, timing) for part in PARTS]


def tensors(block: Block, batch: int, device: torch.device, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random input, weight and gradient of the output, channels_last."""
    torch.manual_seed(0)
    shapes = (
        (batch, block.in_channels, block.in_size, block.in_size),
        (block.in_channels, block.out_channels, block.kernel, block.kernel),
        (batch, block.out_channels, block.out_size, block.out_size),
    )
    if not block.transposed:
        shapes = (shapes[0], (block.out_channels, block.in_channels, *shapes[1][2:]), shapes[2])
    x, w, dy = (
        torch.randn(shape).to(device, peers.DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
        for shape in shapes
    )
    return x, w, dy


def _case(block: Block, part: str, x: Tensor, w: Tensor, dy: Tensor, dtype: str, timing: harness.Timing) -> Case:
    library = _library(block, part, x, w, dy)
    with device_settings(x.device, search=False):
        exact = _library(block, part, x.double(), w.double(), dy.double())()
    allowed = peers.tolerance(peers.distance([library().double()], [exact]), x.dtype, 0)
    rows, calls = [Row(LIBRARY, "PyTorch's", dtype)], {LIBRARY: library}
    for name, call in _own(call_of(block, part, x, w, dy)).items():
        row = Row(name, name, dtype, tolerance=allowed)
        rows.append(row)
        try:
            row.error = peers.distance([call().double()], [exact])
        # Any error of a kernel is a fact to report, and the others go on.
        except Exception as error:
            row.status, row.detail = "failed", f"{type(error).__name__}: {error}"
            continue
        if row.error <= allowed:
            calls[name] = call
        else:
            row.status, row.detail = "wrong", f"{row.error:.2e} from float64, expected at most {allowed:.2e}"
    reference = next((name for name in calls if name != LIBRARY), LIBRARY)
    segments = {name: (call,) for name, call in calls.items()}
    samples = harness.interleave(segments, harness.timer_for(x.device, cold=True), timing)
    for row in rows:
        if row.peer in samples:
            row.enter(samples[row.peer][0], samples[reference][0])
    return Case("contractions", block.title, part, len(x), dtype, reference, rows)


def _library(block: Block, part: str, x: Tensor, w: Tensor, dy: Tensor) -> Call:
    places = ((block.stride,) * 2, (block.padding,) * 2, (1, 1), block.transposed, (0, 0), 1)
    if part == "forward":
        return functools.partial(torch.ops.aten.convolution, x, w, None, *places)
    mask = [part == "input gradient", part == "weight gradient", False]
    return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *places, mask)[mask.index(True)]


def call_of(block: Block, part: str, x: Tensor, w: Tensor, dy: Tensor) -> spec.Call:
    """One of the `PARTS` as the router gets it."""
    geometry = Geometry((block.kernel,) * 2, (block.stride,) * 2, (block.padding,) * 2)
    if part == "weight gradient":
        gathered, linear = (dy, x) if block.transposed else (x, dy)
        return spec.Call("weight_grad", Operand(gathered), Operand(linear), geometry, geometry.kernel)
    a, out = (x, dy) if part == "forward" else (dy, x)
    op = "conv_transpose" if block.transposed == (part == "forward") else "conv"
    return spec.Call(op, Operand(a), w, geometry, (out.shape[2], out.shape[3]))


def _own(call: spec.Call) -> dict[str, Call]:
    """A call by the name of every algorithm that can run it."""
    x = call.a.x
    able = [name for name, reason in backends.reasons(x.device.type, x.dtype).items() if reason is None]
    own = [algorithm for name in able for algorithm in backends.get(name).algorithms(call.op)]
    return {a.name: functools.partial(_run, a, call) for a in own if a.why_not(call) is None}


def _run(algorithm: spec.Algorithm, call: spec.Call) -> Tensor:
    out = algorithm.run(call, None)
    return out if isinstance(out, Tensor) else out[0]
