"""How `conv` and `conv_transpose` get from a call to a launch: operands, tiles, output, partial statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Pair
from fastdcgan.kernels import launch, tiles
from fastdcgan.kernels.epilogues import EpilogueTile, epilogue_kernel, epilogue_rows
from fastdcgan.kernels.prologues import PrologueOperand, prologue_of
from fastdcgan.spec import Call, Epilogue, Operand, nhwc

# The tile and launch options of `epilogue_kernel`. With 32 rows it spills on sm_80 (float32, grad_stats; Triton 3.7.1).
ADD_PARTS = tiles.TileConfig(16, 64, 16, num_warps=4, num_stages=1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TOO_MANY = 2**31  # elements for the kernels' 32-bit offsets


def why_not(call: Call) -> str | None:
    """None if the Triton contractions can run this call, else the reason."""
    x, g = call.a.x, call.geometry
    if g.groups != 1:
        return f"the Triton contractions have no groups, and here are {g.groups}"
    if call.op == "weight_grad":
        other, results = call.b.x, []
    else:
        other = call.b
        channels = other.shape[0 if call.op == "conv" else 1]
        results = [(x.shape[0], channels, *call.size)]
    for tensor in (x, other):
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            return f"the Triton contractions take {names}, not {tensor.dtype}"
    for size in (x.shape, other.shape, *results):
        elements = torch.Size(size).numel()
        if not 0 < elements < _TOO_MANY:
            return f"the Triton contractions take 1 to {_TOO_MANY - 1} elements, not {elements}"
    return None


@dataclass(frozen=True)
class ImplicitGemm:
    """How an operator becomes a matrix product of pixels and channels: what sets `conv` and `conv_transpose` apart."""

    kernel: Any
    op: str
    stride: Pair  # pixels of the input between neighbours of a tile
    lead: Pair  # no shift of the input is below -lead*stride
    phases: Pair  # pixels of the output between neighbours of a tile
    taps: float  # per output pixel, on average
    constants: dict[str, Any]  # further `constexpr` arguments of the kernel


class Contraction:
    """One call of `conv` or `conv_transpose` and how it is launched with a given tile; only `run` allocates."""

    def __init__(
        self, gemm: ImplicitGemm, a: Operand, weight: Tensor, channels: int, size: Pair, epilogue: Epilogue
    ) -> None:
        """The output will be [N, channels, *size] in the weight's dtype, NHWC in memory."""
        self.gemm, self.a, self.weight, self.epilogue = gemm, a, weight, epilogue
        self.channels, self.size = channels, size
        self.images = a.x.shape[0]
        coef = epilogue.coef
        self.e_groups = 1 if coef is None or coef.dim() == 1 else coef.shape[1]
        self.groups = max(1 if a.coef is None else a.coef.shape[1], epilogue.stat_groups, self.e_groups)
        self.batch = self.images // self.groups
        self.grid = tiles.ceil_div(size[0], gemm.phases[0]), tiles.ceil_div(size[1], gemm.phases[1])
        self.phases = gemm.phases[0] * gemm.phases[1]
        aligned = [launch.aligned(weight, weight.shape[1]), all(launch.aligned(t, a.x.shape[1]) for t in (a.x, a.y))]
        self.unaligned = aligned.count(False)
        self.described = aligned[0] and all(launch.fits_view(t, gemm.stride) for t in (a.x, a.y))

    @property
    def problem(self) -> tiles.Problem:
        """What the choice of a tile depends on."""
        return tiles.Problem(
            self.gemm.op,
            self.weight.dtype,
            self.images * self.grid[0] * self.grid[1],
            self.channels,
            round(self.a.x.shape[1] * self.gemm.taps),
            self.phases,
            prologue_of(self.a),
            self.epilogue.kind,
            self.described,
            self.unaligned,
        )

    def candidates(self) -> list[tiles.TileConfig]:
        """The tiles that are worth measuring, the heuristic's first."""
        return tiles.shortlist(self.problem, tiles.device_of(self.a.x.device))

    def run(self, tile: tiles.TileConfig | None) -> tuple[Tensor, Tensor | None]:
        """Output [N, channels, *size], NHWC in memory, and the epilogue's partials or None. Without a tile the
        heuristic chooses one."""
        tile = tile or tiles.heuristic(self.problem, tiles.device_of(self.a.x.device))
        gemm, operand, w = self.gemm, PrologueOperand.of(self.a), nhwc(self.weight)
        out = launch.empty_nhwc((self.images, self.channels, *self.size), operand.x, w.dtype)
        rows, block_k, block_n = tile.block_m, tile.block_k, tile.block_n
        c_in = operand.x.shape[1]
        tma_tile = tiles.tma_tile(rows, self.batch, *self.grid) if tile.descriptors and self.described else None
        form = "pointer" if tma_tile is None else "tma"
        # Beyond the last channel lies the next pixel of a view with a stride.
        mask = tma_tile is not None and gemm.stride[1] > 1 and c_in % block_k != 0
        load = (form, gemm.stride, tma_tile, rows, block_k)
        block = (block_n, block_k) if gemm.op == "conv" else (block_k, block_n)
        parts = None
        if tile.splits == 1:
            epilogue_tile, stored, partials = self._epilogue(out, tma_tile, rows, block_n, gemm.phases)
        else:
            parts = torch.empty((tile.splits, out.numel()), dtype=torch.float32, device=out.device)
            stored = {"out": parts, "e_y": None, "e_coef": None, "e_slope": 0.0, "e_groups": 1, "partials": None}
            epilogue_tile = EpilogueTile("none", 0, 0, gemm.phases, tma_tile, rows, block_n, False, part=True)
        tiles_per_group = tiles.tile_count(rows, tma_tile, self.batch, *self.grid)
        arguments = dict(
            x=launch.tile_argument(operand.x, *load),
            x_y=launch.tile_argument(operand.y, *load),
            x_coef=operand.coef,
            x_slope=float(self.a.slope),
            x_groups=operand.groups,
            weight=w if tma_tile is None else launch.matrix(w, w.numel() // w.shape[0], block),
            groups=self.groups,
            batch=self.batch,
            tiles_per_group=tiles_per_group,
            splits=tile.splits,
            height=operand.x.shape[2],
            width=operand.x.shape[3],
            c_in=c_in,
            out_height=self.size[0],
            out_width=self.size[1],
            c_out=self.channels,
            PROLOGUE=operand.tile(form, gemm.stride, gemm.lead, rows, block_k, mask),
            EPILOGUE=epilogue_tile,
            GROUP_M=tile.group_m,
            PRECISION=launch.dot_precision(w.dtype),
            **stored,
            **gemm.constants,
        )
        programs = self.groups * tiles_per_group * self.phases * tiles.ceil_div(self.channels, block_n)
        launch.run(gemm.kernel, tile.splits * programs, arguments, tile)
        return out, partials if parts is None else self._add_parts(out, parts)

    def _epilogue(
        self, out: Tensor, tma_tile: tiles.TmaTile | None, rows: int, block_n: int, phases: Pair
    ) -> tuple[EpilogueTile, dict[str, Any], Tensor | None]:
        """(how tiles are stored, the kernels' arguments for it, the partials that they write)."""
        e = self.epilogue
        y = None if e.y is None else nhwc(e.y)
        described = tma_tile is not None and launch.fits_view(out, phases) and launch.fits_view(y, phases)
        # Beyond the last channel lies the next pixel of the view, and beyond a group's last image the next group.
        described = described and (phases[1] == 1 or self.channels % block_n == 0)
        described = described and (self.groups == 1 or (tma_tile is not None and self.batch % tma_tile[0] == 0))
        grid = tiles.ceil_div(self.size[0], phases[0]), tiles.ceil_div(self.size[1], phases[1])
        slots = tiles.tile_count(rows, tma_tile, self.batch, *grid) * phases[0] * phases[1]
        partial_rows = epilogue_rows(e)
        partials = None
        if partial_rows:
            shape = (self.groups, slots, partial_rows, self.channels)
            partials = torch.empty(shape, dtype=torch.float32, device=out.device)
        act = ACTIVATIONS[e.act].id
        epilogue_tile = EpilogueTile(e.kind, act, partial_rows, phases, tma_tile, rows, block_n, described)
        store = ("tma" if described else "pointer", phases, tma_tile, rows, block_n)
        arguments = {
            "out": launch.tile_argument(out, *store),
            "e_y": launch.tile_argument(y, *store),
            "e_coef": None if e.coef is None else e.coef.contiguous(),
            "e_slope": float(e.slope),
            "e_groups": self.e_groups,
            "partials": partials,
        }
        return epilogue_tile, arguments, partials

    def _add_parts(self, out: Tensor, parts: Tensor) -> Tensor | None:
        """Add up the parts of the output in a fixed order, and apply the epilogue. Returns the partials, or None."""
        rows, block_n = ADD_PARTS.block_m, ADD_PARTS.block_n
        epilogue_tile, stored, partials = self._epilogue(out, None, rows, block_n, (1, 1))
        tiles_per_group = tiles.tile_count(rows, None, self.batch, *self.size)
        arguments = dict(
            parts=parts,
            splits=parts.shape[0],
            values=parts.shape[1],
            batch=self.batch,
            tiles_per_group=tiles_per_group,
            height=self.size[0],
            width=self.size[1],
            channels=self.channels,
            EPILOGUE=epilogue_tile,
            **stored,
        )
        programs = self.groups * tiles_per_group * tiles.ceil_div(self.channels, block_n)
        launch.run(epilogue_kernel, programs, arguments, ADD_PARTS)
        return partials
