"""Contractions with every prologue and epilogue, on 64 to 256 channels, against float64.

So many channels reach what the tests' few don't: the copy engine, and all of a large tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdcgan import backends
from fastdcgan.backends.base import Backend
from fastdcgan.benchmarks import peers
from fastdcgan.geometry import Geometry
from fastdcgan.spec import STORE, Algorithm, Call, Epilogue, Operand

OPS = ("conv", "conv_transpose", "weight_grad")
PROLOGUES = ("none", "activate", "bn_backward")
EPILOGUES = ("none", "bias", "activate", "stats", "grad_stats")
# What runs, and of weight_grad both prologues.
FORMS = [
    (op, first, second) for op in OPS for first in PROLOGUES for second in (PROLOGUES if op == OPS[2] else EPILOGUES)
]
GEOMETRIES = (Geometry((4, 4), (2, 2), (1, 1)), Geometry((3, 3), (1, 1), (1, 1)))
CHANNELS, DRY_CHANNELS = ((64, 128), (128, 256), (256, 64)), ((8, 16),)
# The dtype, and the distance from 1 to the next number that is multiplied; "tf32" is what PyTorch does by default.
PRECISIONS = {
    "bf16": (torch.bfloat16, 2.0**-7),
    "fp32": (torch.float32, 2.0**-23),
    "fp16": (torch.float16, 2.0**-10),
    "tf32": (torch.float32, 2.0**-10),
}
ACT, SLOPE = "leaky_relu", 0.2
GROUPS = 2  # of statistics


@dataclass
class Checked:
    """How many runs were looked at, and what is wrong with which."""

    count: int = 0
    wrong: list[str] = field(default_factory=list)


def check(
    on: Backend,
    device: torch.device,
    tiles: Sequence[int] | None,
    share: tuple[int, int],
    dry: bool,
    say: Callable[[str], None],
) -> Checked:
    """Run a share of all forms by each algorithm of a backend that can.

    With the tile of the algorithm's rule in bf16 and fp32; or in all precisions with each tile that has one of these
    numbers, and each number of parts that tuning compares. `say` hears what is run next: it may never return.
    """
    precisions = list(PRECISIONS)[: 2 if tiles is None else 4]
    found, (first, step) = Checked(), share
    for i, (precision, form) in list(enumerate(itertools.product(precisions, FORMS)))[first::step]:
        # It also sets what it isn't given.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"):
            _check(on, device, tiles, (i, precision, form), dry, say, found)
    return found


def _check(
    on: Backend,
    device: torch.device,
    tiles: Sequence[int] | None,
    run: tuple[int, str, tuple[str, str, str]],
    dry: bool,
    say: Callable[[str], None],
    found: Checked,
) -> None:
    i, precision, form = run
    dtype, eps = PRECISIONS[precision]
    channels = DRY_CHANNELS[0] if dry else CHANNELS[i % 3]
    call = make(form, channels, GEOMETRIES[i % 2], dtype, device)
    runs = [(a, tile) for a in on.algorithms(call.op) if a.why_not(call) is None for tile in _tiles(a, call, tiles)]
    if not runs:
        return
    exact = _results(backends.get("reference").pytorch(wide(call)))
    terms = math.prod(call.size) * 64 if form[0] == OPS[2] else channels[0] * math.prod(call.geometry.kernel)
    # Roundings of both factors and of the result, each by half of eps at most, and those of a sum in float32.
    allowed = eps + math.sqrt(terms) * 2.0**-23
    for algorithm, tile in runs:
        what = f"{algorithm.name} {' '.join(form)} {channels} {precision} {tile or ''}".strip()
        say(what)
        found.count += 1
        try:
            error = peers.distance(_results(algorithm.run(call, tile)), exact)
        # Any error of a kernel is a fact to report, and the others go on, as far as the device does.
        except Exception as failure:
            found.wrong.append(f"{what}: {type(failure).__name__}: {failure}")
            continue
        if not error <= allowed:
            found.wrong.append(f"{what}: {error:.2e} from float64, expected at most {allowed:.2e}")


def _tiles(algorithm: Algorithm, call: Call, numbers: Sequence[int] | None) -> list[Any]:
    if numbers is None or algorithm.tiles is None:
        return [None] if numbers is None else []
    return [tile for tile in algorithm.tiles(call) if tile.number in numbers]


def make(
    form: tuple[str, str, str], channels: tuple[int, int], g: Geometry, dtype: torch.dtype, device: torch.device
) -> Call:
    """A call on 8 images of 16 x 16 pixels with values of one size throughout."""
    op, first, second = form
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = (scale * torch.randn(shape, generator=random)).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def coef(n: int) -> Tensor:
        return (torch.rand(4, GROUPS, n, generator=random) + 0.5).to(device)

    def operand(kind: str, *shape: int) -> Operand:
        x = normal(*shape)
        if kind == "none":
            return Operand(x)
        return Operand(x, normal(*shape) if kind == "bn_backward" else None, coef(shape[1]), ACT, SLOPE)

    inner, outer = channels
    a = operand(first, 8, inner, 16, 16)
    size = g.conv_transpose_size(16, 16, (0, 0)) if op == "conv_transpose" else g.conv_size(16, 16)
    if op == "weight_grad":
        return Call(op, a, operand(second, 8, outer, *size), g, g.kernel)
    weight = normal(*((inner, outer) if op == "conv_transpose" else (outer, inner)), *g.kernel, scale=inner**-0.5 / 4)
    e = {
        "none": STORE,
        "bias": Epilogue("bias", coef=coef(outer)[0, 0].to(dtype)),
        "activate": Epilogue("activate", None, coef(outer), ACT, SLOPE),
        "stats": Epilogue("stats", stat_groups=GROUPS),
        "grad_stats": Epilogue("grad_stats", normal(8, outer, *size), coef(outer), ACT, SLOPE, GROUPS),
    }
    return Call(op, a, weight, g, size, e[second])


def wide(x: Any) -> Any:
    """The same in float64 on the CPU, where nothing of a GPU's is: a tensor, those of an operand, epilogue or call."""
    if isinstance(x, Tensor):
        return x.double().cpu()
    return type(x)(*map(wide, x)) if isinstance(x, (Operand, Epilogue, Call)) else x


def _results(out: Any) -> list[Tensor]:
    """The tensors that a contraction returned, in float64 on the CPU."""
    return [t.double().cpu() for t in (out if isinstance(out, tuple) else (out,)) if t.numel()]
