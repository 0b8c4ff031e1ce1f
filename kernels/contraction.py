"""The way of `conv` and `conv_transpose` from tensors to a launch: operands, tiles, output, partial statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Pair
from fastdcgan.kernels import launch, tiles, tuning
from fastdcgan.kernels.epilogues import Sink, finish_kernel
from fastdcgan.kernels.partials import combine_stats, combine_sums
from fastdcgan.kernels.prologues import Source
from fastdcgan.spec import Epilogue, Operand, nhwc

# The tile and launch options of `finish_kernel`. With 32 rows it spills on sm_80 (float32, grad_stats; Triton 3.7.1).
ADD_PARTS = tiles.TileConfig(16, 64, 16, num_warps=4, num_stages=1)


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
            return cls(nhwc(a.x), None, None, "none", 0, False, 1)
        y, coef, act = None if a.y is None else nhwc(a.y), a.coef.contiguous(), ACTIVATIONS[a.act].id
        kind = "activate" if y is None else "bn_backward"
        return cls(nhwc(a.x), y, coef, kind, act, coef.shape[0] == 4, coef.shape[1])

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


class Contraction:
    """One call of `conv` or `conv_transpose`: its tensors, and how they are launched with a given tile."""

    def __init__(
        self, kernel: Any, gather: Gather, a: Operand, weight: Tensor, channels: int, size: Pair, epilogue: Epilogue
    ) -> None:
        """The output is [N, channels, *size] in the weight's dtype, NHWC in memory; `run` writes it."""
        self.kernel, self.gather, self.slope, self.epilogue = kernel, gather, float(a.slope), epilogue
        self.operand, self.weight = Loaded.of(a), nhwc(weight)
        self.channels, self.size = channels, size
        coef = epilogue.coef
        self.e_y = None if epilogue.y is None else nhwc(epilogue.y)
        self.e_coef = None if coef is None else coef.contiguous()
        self.e_groups = 1 if coef is None or coef.dim() == 1 else coef.shape[1]
        self.groups = max(self.operand.groups, epilogue.stat_groups, self.e_groups)
        self.images = self.operand.x.shape[0]
        self.batch = self.images // self.groups
        self.grid = tiles.ceil_div(size[0], gather.phases[0]), tiles.ceil_div(size[1], gather.phases[1])
        self.phases = gather.phases[0] * gather.phases[1]
        self.out = launch.empty_nhwc((self.images, channels, *size), self.operand.x, self.weight.dtype)
        x, y, w = self.operand.x, self.operand.y, self.weight
        self.described = launch.aligned(w, w.shape[1]) and all(launch.fits_view(t, gather.stride) for t in (x, y))

    def problem(self) -> tiles.Problem:
        gather, shape = self.gather, self.operand.x.shape
        return tiles.Problem(
            gather.op,
            self.weight.dtype,
            self.images * self.grid[0] * self.grid[1],
            self.channels,
            round(shape[1] * gather.taps),
            self.phases,
            self.operand.prologue,
            self.epilogue.kind,
            self.described,
            (*shape, self.channels, *self.size, *self.weight.shape[2:], *gather.stride, *gather.phases, self.groups),
        )

    def run(self, config: tiles.TileConfig) -> Tensor | None:
        """Write the output. Returns the epilogue's partials, or None."""
        gather, operand, w = self.gather, self.operand, self.weight
        rows, block_k, block_n = config.block_m, config.block_k, config.block_n
        c_in = operand.x.shape[1]
        box = tiles.box(rows, self.batch, *self.grid) if config.descriptors and self.described else None
        form = "pointer" if box is None else "box"
        # Beyond the last channel lies the next pixel of a view with a stride.
        mask = box is not None and gather.stride[1] > 1 and c_in % block_k != 0
        load = (form, gather.stride, box, rows, block_k)
        block = (block_n, block_k) if gather.op == "conv" else (block_k, block_n)
        if config.splits == 1:
            sink, finish, partials = self._finish(box, rows, block_n, config.descriptors)
        else:
            parts = torch.empty((config.splits, self.out.numel()), dtype=torch.float32, device=self.out.device)
            finish = {"out": parts, "e_y": None, "e_coef": None, "e_slope": 0.0, "e_groups": 1, "partials": None}
            sink = Sink("none", 0, 0, gather.phases, box, rows, block_n, False, part=True)
        tiles_per_group = tiles.tiles(rows, box, self.batch, *self.grid)
        arguments = dict(
            x=launch.tile_argument(operand.x, *load),
            x_y=launch.tile_argument(operand.y, *load),
            x_coef=operand.coef,
            x_slope=self.slope,
            x_groups=operand.groups,
            weight=w if box is None else launch.matrix(w, w.numel() // w.shape[0], block),
            groups=self.groups,
            batch=self.batch,
            tiles_per_group=tiles_per_group,
            splits=config.splits,
            height=operand.x.shape[2],
            width=operand.x.shape[3],
            c_in=c_in,
            out_height=self.size[0],
            out_width=self.size[1],
            c_out=self.channels,
            SOURCE=operand.source(form, gather.stride, gather.lead, rows, block_k, mask),
            SINK=sink,
            GROUP_M=config.group_m,
            PRECISION=launch.dot_precision(w.dtype),
            **finish,
            **gather.constants,
        )
        programs = self.groups * tiles_per_group * self.phases * tiles.ceil_div(self.channels, block_n)
        launch.run(self.kernel, config.splits * programs, arguments, config)
        return partials if config.splits == 1 else self._add_parts(parts)

    def _finish(
        self, box: tiles.Box | None, rows: int, block_n: int, descriptors: bool, phases: Pair | None = None
    ) -> tuple[Sink, dict[str, Any], Tensor | None]:
        """(how tiles are finished, the kernels' arguments for it, the partials that they write)."""
        e, phases = self.epilogue, phases or self.gather.phases
        stored = descriptors and box is not None
        stored = stored and launch.fits_view(self.out, phases) and launch.fits_view(self.e_y, phases)
        # Beyond the last channel lies the next pixel of the view, and beyond a group's last image the next group.
        stored = stored and (phases[1] == 1 or self.channels % block_n == 0)
        stored = stored and (self.groups == 1 or (box is not None and self.batch % box[0] == 0))
        grid = tiles.ceil_div(self.size[0], phases[0]), tiles.ceil_div(self.size[1], phases[1])
        slots = tiles.tiles(rows, box, self.batch, *grid) * phases[0] * phases[1]
        partial_rows = epilogue_rows(e)
        partials = None
        if partial_rows:
            shape = (self.groups, slots, partial_rows, self.channels)
            partials = torch.empty(shape, dtype=torch.float32, device=self.out.device)
        sink = Sink(e.kind, ACTIVATIONS[e.act].id, partial_rows, phases, box, rows, block_n, stored)
        store = ("box" if stored else "pointer", phases, box, rows, block_n)
        arguments = {
            "out": launch.tile_argument(self.out, *store),
            "e_y": launch.tile_argument(self.e_y, *store),
            "e_coef": self.e_coef,
            "e_slope": float(e.slope),
            "e_groups": self.e_groups,
            "partials": partials,
        }
        return sink, arguments, partials

    def _add_parts(self, parts: Tensor) -> Tensor | None:
        """Add up the parts of the output in a fixed order, and finish it. Returns the partials, or None."""
        rows, block_n = ADD_PARTS.block_m, ADD_PARTS.block_n
        sink, finish, partials = self._finish(None, rows, block_n, False, (1, 1))
        tiles_per_group = tiles.tiles(rows, None, self.batch, *self.size)
        arguments = dict(
            parts=parts,
            splits=parts.shape[0],
            values=parts.shape[1],
            batch=self.batch,
            tiles_per_group=tiles_per_group,
            height=self.size[0],
            width=self.size[1],
            channels=self.channels,
            SINK=sink,
            **finish,
        )
        programs = self.groups * tiles_per_group * tiles.ceil_div(self.channels, block_n)
        launch.run(finish_kernel, programs, arguments, ADD_PARTS)
        return partials


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
    """Output [N, channels, *size], NHWC in memory, and the epilogue's partials or None."""
    call = Contraction(kernel, gather, a, weight, channels, size, epilogue)
    if config is None:
        config = tuning.choose(call.problem(), call.out.device, call.run)
    return call.out, call.run(config)


def flat_partials(partials: Tensor | None, taps: int) -> Tensor | None:
    """Of an output with (tap, channel) for channels (`layout.flat_epilogue`): every tap is a slot."""
    if partials is None:
        return None
    groups, slots, rows, values = partials.shape
    apart = partials.view(groups, slots, rows, taps, values // taps)
    return apart.transpose(2, 3).reshape(groups, slots * taps, rows, values // taps).contiguous()


# --- what epilogues return -------------------------------------------------------------------------------------------


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
