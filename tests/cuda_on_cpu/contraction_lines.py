"""The cases of the CUDA contractions that `contraction_cases.h` runs, a line each: what tests and mutants share."""

from __future__ import annotations

import itertools

from fastdcgan.activations import ACTIVATIONS

PROLOGUES = ("none", "activate", "bn_backward")
EPILOGUES = ("none", "bias", "activate", "stats", "grad_stats")
TYPES = ("bf16", "fp16", "tf32", "fp32")
# The last two: a phase without taps; every other one without, and phases with one tap more than others.
GEOMETRIES = (
    "h=4 w=6 kh=4 kw=4 sh=2 sw=2 ph=1 pw=1",
    "h=4 w=4 kh=4 kw=4",
    "h=5 w=4 kh=3 kw=3 ph=1 pw=1",
    "h=5 w=5 kh=3 kw=3 dh=2 dw=2 ph=2 pw=2",
    "h=5 w=6 kh=5 kw=5 sh=2 sw=2 ph=2 pw=2 oh=1 ow=1",
    "h=3 w=5 kh=2 kw=1 sh=3 sw=2",
    "h=5 w=7 kh=3 kw=4 sh=2 sw=3 ph=2 pw=0 dh=2 dw=2",
)
LEAKY = "act=2 slope=0.2"


def geometries(op: str) -> list[str]:
    """conv and conv_transpose: every prologue, epilogue and geometry."""
    lines = []
    for left, epilogue, (i, geometry) in itertools.product(PROLOGUES, EPILOGUES, enumerate(GEOMETRIES)):
        # Rows of whole vectors or not, one tile or several, by turns.
        channels = ("ci=40 co=40", "ci=7 co=5", "ci=8 co=33")[i % 3]
        lines.append(f"op={op} type=bf16 n=2 {channels} {geometry} left={left} epilogue={epilogue} {LEAKY}")
    return lines


def weight_grads() -> list[str]:
    """Every prologue of both operands, and every geometry."""
    lines = []
    for left, right, (i, geometry) in itertools.product(PROLOGUES, PROLOGUES, enumerate(GEOMETRIES)):
        channels = ("ci=40 co=8", "ci=7 co=5", "ci=8 co=33")[i % 3]
        lines.append(f"op=weight_grad type=bf16 n=2 {channels} {geometry} left={left} right={right} {LEAKY}")
    return lines


def types(kind: str) -> list[str]:
    heads = [f"op={op} type={kind} n=2 ci=40 co=36 {GEOMETRIES[0]} {LEAKY}" for op in ("conv", "conv_transpose")]
    lines = [
        f"{head} left={left} epilogue={epilogue}"
        for head, (left, epilogue) in itertools.product(
            heads, [("none", "none"), ("activate", "stats"), ("bn_backward", "grad_stats"), ("none", "bias")]
        )
    ]
    return lines + [
        f"op=weight_grad type={kind} n=2 ci=20 co=12 {GEOMETRIES[0]} {LEAKY} left={left} right={right}"
        for left, right in [("none", "none"), ("activate", "bn_backward"), ("bn_backward", "activate")]
    ]


def activations(act: int) -> list[str]:
    slope = "slope=0.2" if act == 2 else "slope=1"
    head = f"type=fp16 n=2 ci=9 co=10 {GEOMETRIES[0]} act={act} {slope}"
    return [
        f"op=conv {head} left=activate epilogue=activate",
        f"op=conv {head} left=bn_backward epilogue=grad_stats",
        f"op=conv_transpose {head} left=bn_backward rows=2 epilogue=grad_stats",
        f"op=weight_grad {head} left=activate right=bn_backward",
        f"op=weight_grad {head} left=bn_backward right=activate rows=2",
    ]


def statistics_groups() -> list[str]:
    lines = [
        f"op={op} type=bf16 n=6 groups={groups} ci=24 co=40 {GEOMETRIES[0]} left={left} epilogue={epilogue} {LEAKY}"
        for op, groups, (left, epilogue) in itertools.product(
            ("conv", "conv_transpose"),
            (2, 3),
            [("none", "stats"), ("activate", "stats"), ("bn_backward", "grad_stats")],
        )
    ]
    head = f"op=weight_grad type=bf16 n=6 groups=3 ci=8 co=16 {GEOMETRIES[0]} {LEAKY}"
    return [*lines, f"{head} left=activate right=bn_backward"]


def parts() -> list[str]:
    lines = []
    for splits in (2, 3, 7, 40):  # the last are more than there are steps
        head = f"splits={splits} type=bf16 groups=2 {GEOMETRIES[0]} {LEAKY}"
        for epilogue in EPILOGUES:
            lines.append(f"op=conv {head} n=4 ci=72 co=20 left=activate epilogue={epilogue}")
            lines.append(f"op=conv_transpose {head} n=4 ci=12 co=72 epilogue={epilogue}")
        # Three steps to a group.
        lines.append(f"op=weight_grad {head} n=24 ci=24 co=7 left=activate right=bn_backward")
    return lines


def watched() -> list[str]:
    """For the sanitizers: one of the contractions in float."""
    return [
        f"op={op} type={kind} n=2 {channels} {geometry} {LEAKY} left={left} right={right} epilogue={epilogue} "
        f"splits={splits}"
        for op, kind in (("conv", "bf16"), ("conv_transpose", "fp32"), ("weight_grad", "bf16"))
        for channels, geometry, left, right, epilogue, splits in (
            ("ci=40 co=36", GEOMETRIES[0], "bn_backward", "activate", "grad_stats", 1),
            ("ci=7 co=9", GEOMETRIES[6], "activate", "bn_backward", "stats", 1),
            ("ci=48 co=16", GEOMETRIES[4], "none", "none", "stats", 2),
        )
    ]


def tiles(tile: int) -> list[str]:
    """With a tile of GPUs, by its number, and the contraction that contraction_tiles.cpp has for it."""
    op = list(REST)[tile % 3]
    head = f"tile={tile} op={op} n=3 h=6 w=8 kh=3 kw=3 sh=2 sw=2 ph=1 pw=1 oh=1 ow=1"
    return [f"{head} ci={ci} co={co} {LEAKY} {REST[op]}" for ci, co in ((136, 72), (70, 137))]


REST = {
    "conv": "left=activate epilogue=stats",
    "conv_transpose": "left=bn_backward epilogue=grad_stats",
    "weight_grad": "left=activate right=bn_backward splits=2",
}


def brief() -> list[str]:
    """A third of the lines of contraction_types.cpp, with every type, geometry, prologue, epilogue and activation."""
    # Each fourth of what is combined of 3 prologues, 5 epilogues and 7 geometries, or of 11 cases of 4 splits.
    combined = (geometries("conv"), geometries("conv_transpose"), weight_grads(), parts())
    lines = [line for lines in combined for line in lines[::4]] + statistics_groups()
    lines += [line for kind in TYPES for line in types(kind)]
    return lines + [line for row in ACTIVATIONS.values() for line in activations(row.id)]
