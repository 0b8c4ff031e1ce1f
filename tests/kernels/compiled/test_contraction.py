"""What the contractions compile to: every tile that the heuristic may choose, with the most that it may have to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from fastdcgan.geometry import Geometry
from fastdcgan.kernels import conv, conv_transpose, tiles, weight_grad
from fastdcgan.kernels.contraction import Contraction
from fastdcgan.kernels.tiles import TileConfig
from fastdcgan.kernels.weight_grad import WeightGradient
from fastdcgan.spec import Call, Epilogue, Operand
from tests.kernels.compiled.compiling import (
    ARCHITECTURES,
    TENSOR_CORES,
    Compiled,
    assert_fits,
    compiled,
    images,
    vectors,
)

K4 = Geometry((4, 4), (2, 2), (1, 1))
BF16, FP32 = torch.bfloat16, torch.float32
PROLOGUES = ("bn_backward", "activate", "none")
# The heaviest epilogues and prologues first; weight_grad has two prologues.
KINDS = {
    "conv": [(p, e) for e in ("grad_stats", "stats") for p in PROLOGUES],
    "conv_transpose": [(p, e) for e in ("grad_stats", "stats") for p in PROLOGUES],
    "weight_grad": [("bn_backward activate", "none"), ("activate bn_backward", "none"), ("none none", "none")],
}


@dataclass(frozen=True)
class Case:
    """A contraction and its tile. Sizes are arguments of a kernel: they are alike in all cases."""

    arch: int
    dtype: torch.dtype
    op: str
    prologue: str  # of weight_grad's two operands, joined by a space
    epilogue: str
    tile: TileConfig | None = None
    channels: int = 512

    @property
    def name(self) -> str:
        t, dtype = self.tile, str(self.dtype).removeprefix("torch.")
        tile = "" if t is None else f"{t.block_m}x{t.block_n}x{t.block_k} w{t.num_warps}"
        return f"sm_{self.arch} {self.op} {dtype} {self.prologue} {self.epilogue} {self.channels} {tile}"

    def call(self) -> Call:
        large, small = 32, 16

        def operand(prologue: str, size: int) -> Operand:
            x = images(128, self.channels, size, self.dtype)
            if prologue == "none":
                return Operand(x)
            return Operand(x, x if prologue == "bn_backward" else None, vectors(4, self.channels), "leaky_relu", 0.2)

        if self.op == "weight_grad":
            left, right = self.prologue.split()
            return Call(self.op, operand(left, large), operand(right, small), K4, K4.kernel)
        size, out = (large, small) if self.op == "conv" else (small, large)
        y = images(128, self.channels, out, self.dtype)
        epilogue = {
            "stats": Epilogue("stats"),
            "grad_stats": Epilogue("grad_stats", y, vectors(4, self.channels), "leaky_relu", 0.2),
        }[self.epilogue]
        weight = images(self.channels, self.channels, 4, self.dtype)
        return Call(self.op, operand(self.prologue, size), weight, K4, (out, out), epilogue)

    def work(self) -> Contraction | WeightGradient:
        find: Callable = {
            "conv": conv.contraction, "conv_transpose": conv_transpose.contraction, "weight_grad": weight_grad.gradient
        }[self.op]  # fmt: skip
        return find(self.call())

    def space(self) -> list[TileConfig]:
        return tiles.search_space(self.work().problem, tiles.KNOWN[self.arch])


def _shipped() -> Iterator[Case]:
    """Each tile of each architecture once, by a contraction in turn, as heavy as it may be with that tile."""
    for arch in ARCHITECTURES:
        spaces = {
            (op, kind): [config for config in Case(arch, BF16, op, *kind).space() if config.splits == 1]
            for op, kinds in KINDS.items()
            for kind in kinds
        }
        every = dict.fromkeys(config for space in spaces.values() for config in space)
        for i, tile in enumerate(every):
            ops = list(KINDS)[i % 3 :] + list(KINDS)[: i % 3]
            yield next(
                Case(arch, BF16, op, *kind, tile) for op in ops for kind in KINDS[op] if tile in spaces[op, kind]
            )


def _float32() -> Iterator[Case]:
    """In float32 the largest tile of each contraction; and a sum in parts, whose epilogue has a kernel of its own."""
    for arch in ARCHITECTURES:
        for op, kinds in KINDS.items():
            case = Case(arch, FP32, op, *kinds[0])
            tile = max(case.space(), key=lambda config: (config.block_m * config.block_n, -config.splits))
            yield replace(case, tile=replace(tile, splits=2) if op == "conv" else tile)


# Rows of 500 channels are no multiple of 16 bytes, so that pointers read the values one by one.
UNALIGNED = [
    Case(arch, BF16, op, *kind, channels=500)
    for arch in ARCHITECTURES
    for op, kind in (("conv", ("bn_backward", "grad_stats")), ("conv_transpose", ("activate", "stats")))
]
CASES = [*_shipped(), *_float32(), *UNALIGNED]


def compile_case(case: Case) -> list[Compiled]:
    return compiled(lambda: case.work().run(case.tile), case.arch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_tile_compiles_well(case: Case) -> None:
    kernels = compile_case(case)
    for kernel in kernels:
        assert_fits(kernel, case.arch)
    contraction = kernels[0]
    assert contraction.count(TENSOR_CORES[case.arch])
    if contraction.arguments["PROLOGUE"].form == "pointer":
        assert contraction.count(r"cp\.async\.c[ag]") or case in UNALIGNED
    else:
        assert contraction.count(r"cp\.async\.bulk\.tensor")
        assert case.arch != 90 or case.dtype == FP32 or contraction.count(r"wgmma\.mma_async")


def test_the_rule_on_registers_keeps_out_what_spills() -> None:
    case = Case(90, BF16, "conv", "bn_backward", "grad_stats")
    tile = TileConfig(128, 256, 64, 8, 3)
    assert tile not in case.space()
    assert compile_case(replace(case, tile=tile))[0].stack > 0
