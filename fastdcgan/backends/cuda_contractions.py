"""The tensor-core contractions of the CUDA backend (csrc/cuda/gemm): from operands to an operator's call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cuda_tiles, cuda_tma
from fastdcgan.backends.cuda_facts import EPILOGUES, MOST_GEOMETRY, MOST_PIXELS
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Call, Operand, flat, flat_epilogue, flat_operand, in_format_of_torch, memory_format

KIND = "cuda tiles"


def _unfit(geometry: Geometry, tensors: tuple[Tensor, ...], shapes: tuple[tuple[int, ...], ...]) -> str | None:
    g = geometry
    if g.groups != 1:
        return f"{g.groups} groups"
    if len({t.dtype for t in tensors}) > 1:
        return "tensors of several dtypes"
    for shape in shapes:
        if math.prod(shape) == 0:
            return "no element"
        if math.prod(shape) // shape[1] >= MOST_PIXELS or shape[1] >= MOST_PIXELS:
            return f"a tensor {list(shape)} of {MOST_PIXELS} pixels or more"
    reach = max(k * d for k, d in zip(g.kernel, g.dilation, strict=True))
    if max(reach, *g.stride, *g.padding) >= MOST_GEOMETRY:
        return f"kernel, stride or padding of {MOST_GEOMETRY} or more"
    return None


def _groups(*counts: int) -> int | None:
    """The statistics groups of a call, or None where vectors have different numbers of them, none of them 1."""
    several = {count for count in counts if count != 1}
    return max(counts) if len(several) <= 1 else None


def _coef_groups(coef: Tensor | None) -> int:
    return 1 if coef is None or coef.dim() == 1 else coef.shape[1]


def why_not(call: Call) -> str | None:
    """Why the tensor-core contractions can't run a call, or None."""
    a, b, e = call.a, call.b, call.epilogue
    if call.op == "weight_grad":
        groups = _groups(_coef_groups(a.coef), _coef_groups(b.coef))
        tensors, shapes = (a.x, b.x), (a.x.shape, b.x.shape)
    else:
        groups = _groups(_coef_groups(a.coef), _coef_groups(e.coef), e.stat_groups)
        out = (a.x.shape[0], b.shape[1 if call.op == "conv_transpose" else 0], *call.size)
        tensors, shapes = (a.x, b), (a.x.shape, b.shape, out)  # type: ignore[assignment]
    if groups is None:
        return "vectors of several numbers of statistics groups"
    return _unfit(call.geometry, tensors, shapes)


def exact(dtype: torch.dtype) -> bool:
    """Whether float32 has to be float32: PyTorch's convolutions may not use TF32."""
    return dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]


class _Contraction:
    """A call as the operators take it, where kernels that are as large as their image became one matrix product."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.a, self.b, self.g, self.size = call.a, call.b, call.geometry, call.size
        self.e, self.fold = call.epilogue, 1  # `fold`: channels of the output became (tap, channel)
        g = call.geometry
        if call.op == "conv_transpose":
            if call.a.x.shape[2:] == (1, 1) and g.spans(*call.size):
                self.fold = call.size[0] * call.size[1]
                self.b, self.e = flat(call.b), flat_epilogue(call.epilogue, self.fold)
                self.g, self.size = Geometry((1, 1)), (1, 1)
        elif g.spans(*call.a.x.shape[2:]):
            self.a, self.g = flat_operand(call.a), Geometry((1, 1))
            self.b = flat(call.b) if call.op == "conv" else call.b
        b = self.b.coef if call.op == "weight_grad" else self.e.coef
        groups = _groups(_coef_groups(self.a.coef), _coef_groups(b), self.e.stat_groups)
        assert groups is not None
        self.groups = groups

    def problem(self) -> cuda_tiles.Problem:
        a, b, g = self.a, self.b, self.g
        images = a.x.shape[0]
        if self.call.op == "weight_grad":
            return cuda_tiles.Problem(
                b.x.shape[1],
                a.x.shape[1],
                images * math.prod(b.x.shape[2:]),
                math.prod(g.kernel),
                b.x.element_size(),
                b.y is not None,
                a.y is not None,
                -(-b.x.shape[1] // cuda_tma.ROWS) if cuda_tma.weight_grad_fits(a, b, g) else 0,
                a.coef is not None or b.coef is not None,
            )
        transposed = self.call.op == "conv_transpose"
        phases = math.prod(g.stride) if transposed else 1
        height, width = (
            -(-side // step) if transposed else side for side, step in zip(self.size, g.stride, strict=True)
        )
        fits = cuda_tma.conv_transpose_fits(a, b) if transposed else cuda_tma.conv_fits(a, b, g)
        return cuda_tiles.Problem(
            images * height * width,
            b.shape[1 if transposed else 0],
            round(a.x.shape[1] * math.prod(g.kernel) / phases),
            phases,
            a.x.element_size(),
            a.y is not None,
            tma_tiles=self.groups * cuda_tma.pixel_tiles(images // self.groups, height, width) if fits else 0,
            prologue=a.coef is not None,
        )

    def run(self, ops: Any, choice: cuda_tiles.Choice) -> Any:
        call, g = self.call, self.g
        if call.op == "weight_grad":
            dw = ops.contract_weight_grad(
                *_operand(self.a), *_operand(self.b), g.kernel, g.stride, g.padding, g.dilation, self.groups,
                choice.number, choice.splits, exact(self.a.x.dtype),
            )  # fmt: skip
            if g is not call.geometry:
                dw = dw.view(-1, *call.geometry.kernel, call.a.x.shape[1]).permute(0, 3, 1, 2)
            return dw.contiguous(memory_format=memory_format(call.a.x))
        asked, e = call.epilogue, self.e
        stat_groups = asked.stat_groups if asked.kind == "stats" else _coef_groups(asked.coef)
        if asked.kind not in ("stats", "grad_stats"):
            stat_groups = 1
        out, vectors = ops.contract(
            *_operand(self.a), self.b, call.op == "conv_transpose", g.stride, g.padding, g.dilation, self.size,
            EPILOGUES[e.kind], e.y, e.coef, ACTIVATIONS[e.act].id, e.slope, self.groups, stat_groups, self.fold,
            choice.number, choice.splits, exact(self.a.x.dtype),
        )  # fmt: skip
        if self.fold > 1:
            out = out.view(-1, *call.size, call.b.shape[1]).permute(0, 3, 1, 2)
        return in_format_of_torch(out, call.a.x, call.b), vectors


def problem(call: Call) -> cuda_tiles.Problem:
    """The matrix products that a call is."""
    return _Contraction(call).problem()


def tiles(call: Call) -> list[cuda_tiles.Choice]:
    """The tiles that tuning compares for a call."""
    return cuda_tiles.shortlist(problem(call), cuda_tiles.device_of(call.a.x.device))


def run(ops: Any, call: Call, tile: cuda_tiles.Choice | None = None) -> Any:
    """The contraction with this tile, or with that of the rule in `cuda_tiles`. Returns as `Call` says."""
    made = _Contraction(call)
    return made.run(ops, tile or cuda_tiles.choose(made.problem(), cuda_tiles.device_of(call.a.x.device)))


def _operand(a: Operand) -> tuple:
    return (a.x, a.y, a.coef, ACTIVATIONS[a.act].id, a.slope)
