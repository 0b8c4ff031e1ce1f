"""The tensor-core contractions of the CUDA backend (csrc/cuda/contraction.cuh): from operands to an operator's call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cuda_boxes, cuda_tiles
from fastdcgan.dispatch import autotune
from fastdcgan.geometry import Geometry, Pair, pair
from fastdcgan.spec import Epilogue, Operand, flat, flat_epilogue, flat_operand, in_format_of_torch, memory_format

MOST_PIXELS = 2**30  # of a tensor, as `kMostPixels` in csrc/cuda/contractions.cu
_MOST_GEOMETRY = 2**20
KIND = "cuda tiles"
_EPILOGUES = {"none": 0, "bias": 1, "activate": 2, "stats": 3, "grad_stats": 4}  # `Epilogue` in csrc/cuda/finish.cuh


def _choices() -> autotune.Choices[cuda_tiles.Choice]:
    return autotune.Choices(KIND, lambda entry: cuda_tiles.Choice(**entry), asdict)


_chosen = _choices()


def _choose(
    op: str,
    problem: cuda_tiles.Problem,
    details: tuple,
    device: torch.device,
    attempt: Callable[[cuda_tiles.Choice], object],
) -> cuda_tiles.Choice:
    """The tile: measured, or by the rule of cuda_tiles.py. `details`: what else the time depends on."""
    on = cuda_tiles.device_of(device)
    return _chosen.choose(
        (op, problem, details),
        lambda: f"{op} {problem} | {details}",
        device,
        lambda: cuda_tiles.choose(problem, on),
        lambda: autotune.fastest(cuda_tiles.shortlist(problem, on), attempt, device),
    )


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
    if max(reach, *g.stride, *g.padding) >= _MOST_GEOMETRY:
        return f"kernel, stride or padding of {_MOST_GEOMETRY} or more"
    return None


def _groups(*counts: int) -> int | None:
    """The statistics groups of a call, or None where vectors have different numbers of them, none of them 1."""
    several = {count for count in counts if count != 1}
    return max(counts) if len(several) <= 1 else None


def _coef_groups(coef: Tensor | None) -> int:
    return 1 if coef is None or coef.dim() == 1 else coef.shape[1]


def why_not_conv(a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """None if `conv` takes this call, else the reason."""
    out = (a.x.shape[0], weight.shape[0], *geometry.conv_size(*a.x.shape[2:]))
    return _why_not(a, weight, geometry, out, epilogue)


def why_not_conv_transpose(
    a: Operand, weight: Tensor, geometry: Geometry, output_size: Pair, epilogue: Epilogue
) -> str | None:
    """None if `conv_transpose` takes this call, else the reason."""
    return _why_not(a, weight, geometry, (a.x.shape[0], weight.shape[1], *output_size), epilogue)


def _why_not(a: Operand, weight: Tensor, geometry: Geometry, out: tuple[int, ...], e: Epilogue) -> str | None:
    if _groups(_coef_groups(a.coef), _coef_groups(e.coef), e.stat_groups) is None:
        return "vectors of several numbers of statistics groups"
    return _unfit(geometry, (a.x, weight), (a.x.shape, weight.shape, out))


def why_not_weight_grad(gathered: Operand, linear: Operand, geometry: Geometry) -> str | None:
    """None if `weight_grad` takes this call, else the reason."""
    if _groups(_coef_groups(gathered.coef), _coef_groups(linear.coef)) is None:
        return "vectors of several numbers of statistics groups"
    return _unfit(geometry, (gathered.x, linear.x), (gathered.x.shape, linear.x.shape))


def exact(dtype: torch.dtype) -> bool:
    """Whether float32 has to be float32: PyTorch's convolutions may not use TF32."""
    return dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]


def conv(
    ops: Any, a: Operand, weight: Tensor, geometry: Geometry, epilogue: Epilogue, tile: cuda_tiles.Choice | None = None
) -> tuple[Tensor, Tensor]:
    """`a` [N, C, H, W], weight [Co, C, kh, kw] -> [N, Co, H', W'] and the epilogue's vectors. `tile`: which one."""
    size = geometry.conv_size(*a.x.shape[2:])
    operand, w, g = a, weight, geometry
    if geometry.spans(*a.x.shape[2:]):
        operand, w, g = flat_operand(a), flat(weight), Geometry((1, 1))
    out, vectors = _contract(ops, operand, w, False, g, size, epilogue, epilogue, tile)
    return in_format_of_torch(out, a.x, weight), vectors


def conv_transpose(
    ops: Any,
    a: Operand,
    weight: Tensor,
    geometry: Geometry,
    output_size: Pair,
    epilogue: Epilogue,
    tile: cuda_tiles.Choice | None = None,
) -> tuple[Tensor, Tensor]:
    """`a` [N, C, H, W], weight [C, Co, kh, kw] -> [N, Co, *output_size] and the epilogue's vectors."""
    if a.x.shape[2:] == (1, 1) and geometry.spans(*output_size):
        taps = output_size[0] * output_size[1]
        e = flat_epilogue(epilogue, taps)
        out, vectors = _contract(ops, a, flat(weight), True, Geometry((1, 1)), (1, 1), e, epilogue, tile, taps)
        out = out.view(-1, *output_size, weight.shape[1]).permute(0, 3, 1, 2)
    else:
        out, vectors = _contract(ops, a, weight, True, geometry, output_size, epilogue, epilogue, tile)
    return in_format_of_torch(out, a.x, weight), vectors


def weight_grad(
    ops: Any, gathered: Operand, linear: Operand, geometry: Geometry, tile: cuda_tiles.Choice | None = None
) -> Tensor:
    """`gathered` [N, C, H, W], `linear` [N, Cl, H', W'] -> [Cl, C, kh, kw]."""
    operand, g = gathered, geometry
    if geometry.spans(*gathered.x.shape[2:]):
        operand, g = flat_operand(gathered), Geometry((1, 1))
    n, channels = operand.x.shape[:2]
    pixels = n * math.prod(linear.x.shape[2:])
    problem = cuda_tiles.Problem(
        linear.x.shape[1],
        channels,
        pixels,
        math.prod(g.kernel),
        linear.x.element_size(),
        linear.y is not None,
        operand.y is not None,
        -(-linear.x.shape[1] // cuda_boxes.ROWS) if cuda_boxes.weight_grad_fits(operand, linear, g) else 0,
        operand.coef is not None or linear.coef is not None,
    )
    groups = _groups(_coef_groups(operand.coef), _coef_groups(linear.coef))

    def run(choice: cuda_tiles.Choice) -> Tensor:
        return ops.contract_weight_grad(
            *_operand(operand), *_operand(linear), g.kernel, g.stride, g.padding, g.dilation, groups, choice.number,
            choice.splits, exact(operand.x.dtype),
        )  # fmt: skip

    details = (_details(operand), _details(linear), tuple(operand.x.shape), g)
    dw = run(tile or _choose("weight_grad", problem, details, operand.x.device, run))
    if g is not geometry:
        dw = dw.view(-1, *geometry.kernel, gathered.x.shape[1]).permute(0, 3, 1, 2)
    return dw.contiguous(memory_format=memory_format(gathered.x))


def _contract(
    ops: Any,
    a: Operand,
    weight: Tensor,
    transposed: bool,
    g: Geometry,
    size: Pair,
    e: Epilogue,
    asked: Epilogue,
    tile: cuda_tiles.Choice | None,
    fold: int = 1,
) -> tuple[Tensor, Tensor]:
    """`e` is what the operator gets, `asked` the epilogue before channels became (tap, channel)."""
    groups = _groups(_coef_groups(a.coef), _coef_groups(e.coef), e.stat_groups)
    assert groups is not None
    phases = math.prod(g.stride) if transposed else 1
    taps = math.prod(g.kernel) / phases
    height, width = (-(-side // step) if transposed else side for side, step in zip(size, g.stride, strict=True))
    channels = weight.shape[1 if transposed else 0]
    pixels = a.x.shape[0] * height * width
    fits = cuda_boxes.conv_transpose_fits(a, weight) if transposed else cuda_boxes.conv_fits(a, weight, g)
    problem = cuda_tiles.Problem(
        pixels,
        channels,
        round(a.x.shape[1] * taps),
        phases,
        a.x.element_size(),
        a.y is not None,
        box_tiles=groups * cuda_boxes.pixel_tiles(a.x.shape[0] // groups, height, width) if fits else 0,
        prologue=a.coef is not None,
    )
    stat_groups = asked.stat_groups if asked.kind == "stats" else _coef_groups(asked.coef)
    if asked.kind not in ("stats", "grad_stats"):
        stat_groups = 1

    def run(choice: cuda_tiles.Choice) -> tuple[Tensor, Tensor]:
        return ops.contract(
            *_operand(a), weight, transposed, g.stride, g.padding, g.dilation, pair(size), _EPILOGUES[e.kind], e.y,
            e.coef, ACTIVATIONS[e.act].id, e.slope, groups, stat_groups, fold, choice.number, choice.splits,
            exact(a.x.dtype),
        )  # fmt: skip

    details = (_details(a), e.kind, e.act, tuple(a.x.shape), g)
    op = "conv_transpose" if transposed else "conv"
    return run(tile or _choose(op, problem, details, a.x.device, run))


def _details(a: Operand) -> tuple:
    return ("none" if a.coef is None else "activate" if a.y is None else "bn_backward", a.act, a.x.dtype)


def _operand(a: Operand) -> tuple:
    return (a.x, a.y, a.coef, ACTIVATIONS[a.act].id, a.slope)
