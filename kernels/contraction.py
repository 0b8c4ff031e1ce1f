"""The way of `conv` and `conv_transpose` from tensors to a launch: operands, tiles, output, partial statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.base import Epilogue, Operand
from fastdcgan.geometry import Pair
from fastdcgan.kernels import launch, tiles, tuning
from fastdcgan.kernels.epilogues import Sink
from fastdcgan.kernels.partials import combine_stats, combine_sums
from fastdcgan.kernels.prologues import Source


@dataclass(frozen=True)
class Loaded:
    """An operand as the kernels take it: NHWC in memory, and which prologue it means."""

    x: Tensor
    y: Tensor | None
    coef: Tensor | None
    prologue: str
    act: int
    affine: bool
    groups: int  # statistics groups of `coef`

    @classmethod
    def of(cls, a: Operand) -> Loaded:
        if a.coef is None:
            return cls(launch.nhwc(a.x), None, None, "none", 0, False, 1)
        y, coef, act = None if a.y is None else launch.nhwc(a.y), a.coef.contiguous(), ACTIVATIONS[a.act].id
        kind = "activate" if y is None else "bn_backward"
        return cls(launch.nhwc(a.x), y, coef, kind, act, coef.shape[0] == 4, coef.shape[1])

    def source(self, form: str, stride: Pair, lead: Pair, rows: int, block_c: int, mask: bool) -> Source:
        affine = self.prologue == "bn_backward" and self.affine
        return Source(form, self.prologue, self.act, affine, stride, lead, rows, block_c, mask)


@dataclass(frozen=True)
class Gather:
    """What sets `conv` and `conv_transpose` apart."""

    op: str
    stride: Pair  # pixels of the input between neighbours of a tile
    lead: Pair  # no shift of the input is below -lead*stride
    phases: Pair  # pixels of the output between neighbours of a tile
    taps: float  # per output pixel, on average
    constants: dict[str, Any]  # further `constexpr` arguments of the kernel


def contract(
    kernel: Any,
    gather: Gather,
    a: Operand,
    weight: Tensor,
    channels: int,
    size: Pair,
    epilogue: Epilogue,
    config: tiles.TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch `kernel`: output [N, channels, *size], NHWC in memory, and the epilogue's partials or None."""
    operand, w = Loaded.of(a), launch.nhwc(weight)
    n, c_in, height, width = operand.x.shape
    e_groups = 1 if epilogue.coef is None or epilogue.coef.dim() == 1 else epilogue.coef.shape[1]
    groups = max(operand.groups, epilogue.stat_groups, e_groups)
    batch = n // groups
    grid = (tiles.ceil_div(size[0], gather.phases[0]), tiles.ceil_div(size[1], gather.phases[1]))
    count = gather.phases[0] * gather.phases[1]
    e_y = None if epilogue.y is None else launch.nhwc(epilogue.y)
    out = launch.empty_nhwc((n, channels, *size), operand.x, w.dtype)

    def attempt(config: tiles.TileConfig) -> Tensor | None:
        rows, block_k, block_n = config.block_m, config.block_k, config.block_n
        viewed = config.descriptors and launch.aligned(w, w.shape[1])
        viewed = viewed and launch.fits_view(operand.x, gather.stride) and launch.fits_view(operand.y, gather.stride)
        box = tiles.box(rows, batch, *grid) if viewed else None
        tiles_per_group = tiles.tiles(rows, box, batch, *grid)
        stored = box is not None and launch.fits_view(out, gather.phases) and launch.fits_view(e_y, gather.phases)
        # Beyond the last channel lies the next pixel of the view, and beyond a group's last image the next group.
        stored = stored and (gather.phases[1] == 1 or channels % block_n == 0)
        stored = stored and (groups == 1 or (box is not None and batch % box[0] == 0))
        mask = gather.stride[1] > 1 and c_in % block_k != 0
        form = "pointer" if box is None else "box"
        load = (form, gather.stride, box, rows, block_k)
        store = ("box" if stored else "pointer", gather.phases, box, rows, block_n)
        source = operand.source(form, gather.stride, gather.lead, rows, block_k, box is not None and mask)
        partial_rows = epilogue_rows(epilogue)
        sink = Sink(
            epilogue.kind, ACTIVATIONS[epilogue.act].id, partial_rows, gather.phases, box, rows, block_n, stored
        )
        partials = None
        if partial_rows:
            shape = (groups, tiles_per_group * count, partial_rows, channels)
            partials = torch.empty(shape, dtype=torch.float32, device=out.device)
        block = (block_n, block_k) if gather.op == "conv" else (block_k, block_n)
        arguments = dict(
            x=launch.tile_argument(operand.x, *load),
            x_y=launch.tile_argument(operand.y, *load),
            x_coef=operand.coef,
            x_slope=float(a.slope),
            x_groups=operand.groups,
            weight=w if box is None else launch.matrix(w, w.numel() // w.shape[0], block),
            out=launch.tile_argument(out, *store),
            e_y=launch.tile_argument(e_y, *store),
            e_coef=None if epilogue.coef is None else epilogue.coef.contiguous(),
            e_slope=float(epilogue.slope),
            e_groups=e_groups,
            partials=partials,
            groups=groups,
            batch=batch,
            tiles_per_group=tiles_per_group,
            height=height,
            width=width,
            c_in=c_in,
            out_height=size[0],
            out_width=size[1],
            c_out=channels,
            SOURCE=source,
            SINK=sink,
            GROUP_M=config.group_m,
            PRECISION=launch.dot_precision(w.dtype),
            **gather.constants,
        )
        programs = groups * tiles_per_group * count * tiles.ceil_div(channels, block_n)
        launch.run(kernel, programs, arguments, config)
        return partials

    if config is None:
        problem = tiles.Problem(
            gather.op,
            w.dtype,
            n * grid[0] * grid[1],
            channels,
            round(c_in * gather.taps),
            count,
            operand.prologue,
            epilogue.kind,
            (n, c_in, height, width, channels, *size, *w.shape[2:], *gather.stride, groups),
        )
        config = tuning.choose(problem, out.device, attempt)
    return out, attempt(config)


def epilogue_rows(epilogue: Epilogue) -> int:
    """Rows of the partials that the epilogue writes (`epilogues.py`), 0 if none."""
    if epilogue.kind == "stats":
        return 3
    if epilogue.kind == "grad_stats":
        assert epilogue.coef is not None
        return epilogue.coef.shape[0] // 2
    return 0


def combined(out: Tensor, partials: Tensor | None, epilogue: Epilogue) -> Tensor:
    """What the epilogue returns beside the output: `stats` or `sums` (`backends/base.py`), or an empty tensor."""
    if partials is None:
        return torch.empty(0, dtype=torch.float32, device=out.device)
    # Groups of a tile may be finer than those asked for: they nest.
    groups = epilogue.stat_groups if epilogue.kind == "stats" else epilogue.coef.shape[1]  # type: ignore[union-attr]
    partials = partials.view(groups, -1, *partials.shape[2:])
    return combine_stats(partials) if epilogue.kind == "stats" else combine_sums(partials)
