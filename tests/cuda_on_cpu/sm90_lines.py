"""The cases of the contractions for sm_90a, as contraction_lines.py has those of the others."""

from __future__ import annotations

import itertools

from tests.cuda_on_cpu.contraction_lines import EPILOGUES, GEOMETRIES, LEAKY, PROLOGUES

HALVED = GEOMETRIES[0]
DENSE = ("h=4 w=4 kh=4 kw=4", "h=5 w=4 kh=3 kw=3 ph=1 pw=1", "h=5 w=5 kh=3 kw=3 dh=2 dw=2 ph=2 pw=2")


def convs() -> list[str]:
    """Every prologue and epilogue."""
    lines = []
    for i, (left, epilogue) in enumerate(itertools.product(PROLOGUES, EPILOGUES)):
        # A stride wants channels in multiples of 64, and an image in multiples of the stride.
        geometry = (HALVED, *DENSE)[i % 4]
        channels = "ci=64 co=37" if i % 4 == 0 else ("ci=40 co=24", "ci=72 co=72", "ci=8 co=133")[i % 3]
        kind = ("bf16", "fp16")[i % 2]
        lines.append(f"op=conv type={kind} n=3 {channels} {geometry} left={left} epilogue={epilogue} {LEAKY}")
    return lines


def conv_transposes() -> list[str]:
    """Every prologue, epilogue and geometry."""
    lines = []
    for i, (left, epilogue) in enumerate(itertools.product(PROLOGUES, EPILOGUES)):
        geometry, channels = GEOMETRIES[i % 7], ("ci=40 co=24", "ci=72 co=72", "ci=8 co=136")[i % 3]
        kind = ("bf16", "fp16")[i % 2]
        lines.append(f"op=conv_transpose type={kind} n=3 {channels} {geometry} left={left} epilogue={epilogue} {LEAKY}")
    return lines


def weight_grads() -> list[str]:
    """Geometries, without prologues."""
    geometries = (
        "h=8 w=8 kh=4 kw=4 sh=2 sw=2 ph=1 pw=1", "h=1 w=1", "h=16 w=8 kh=3 kw=3 ph=1 pw=1",
        "h=4 w=8 kh=3 kw=3 dh=2 dw=2 ph=2 pw=2", "h=12 w=4 kh=3 kw=2 sh=3 sw=2 ph=1 pw=0",
    )  # fmt: skip
    lines = [
        f"op=weight_grad type={kind} n=5 {channels} {geometry} splits={splits}"
        for geometry, (kind, channels, splits) in itertools.product(
            geometries, [("bf16", "ci=72 co=136", 1), ("fp16", "ci=8 co=8", 3)]
        )
    ]
    return lines


def weight_grad_prologues() -> list[str]:
    """Every prologue of both operands."""
    geometries = (
        "h=8 w=4 kh=4 kw=4 sh=2 sw=2 ph=1 pw=1",
        "h=4 w=8 kh=3 kw=3 ph=1 pw=1",
        "h=1 w=1",
        "h=4 w=4 kh=2 kw=2 sh=2 sw=2",
    )
    lines = []
    for i, (left, right) in enumerate(itertools.product(PROLOGUES, PROLOGUES)):
        channels, act = ("ci=72 co=136", "ci=8 co=40")[i % 2], ("act=2", "act=3", "act=1")[i % 3]
        head = f"op=weight_grad type={('bf16', 'fp16')[i % 2]} n=6 groups={1 + i % 3} splits={1 + i % 2}"
        lines.append(
            f"{head} {channels} {geometries[i % 4]} left={left} right={right} {act} slope=0.2 rows={2 + i % 2 * 2}"
        )
    return lines


def groups_and_parts() -> list[str]:
    """Groups of statistics, and splits of the depth."""
    lines = []
    for splits, groups in ((1, 3), (2, 1), (40, 2)):  # the last are more than there are steps
        head = f"type=bf16 n=6 groups={groups} splits={splits} {LEAKY}"
        for left, epilogue in (("activate", "stats"), ("bn_backward", "grad_stats"), ("none", "bias")):
            lines.append(f"op=conv {head} ci=64 co=40 {HALVED} left={left} epilogue={epilogue}")
            lines.append(f"op=conv_transpose {head} ci=72 co=24 {HALVED} left={left} epilogue={epilogue}")
    return lines


def many_tma_tiles() -> list[str]:
    """More TMA tiles than one along rows and along columns."""
    return [
        "op=conv type=bf16 n=1 ci=8 co=8 h=3 w=130 kw=3 pw=1 left=activate epilogue=stats " + LEAKY,
        "op=weight_grad type=bf16 n=2 ci=8 co=8 h=2 w=128 kw=3 pw=1 left=activate right=bn_backward " + LEAKY,
    ]


def refused() -> list[str]:
    """What has no TMA tiles, and why."""
    return [
        "op=conv ci=12 refused=whole_vectors",
        "op=conv_transpose ci=8 co=12 refused=whole_vectors",
        "op=conv h=5 w=4 sh=2 sw=2 ci=64 refused=multiple_of_the_stride",
        "op=conv h=4 w=5 sh=2 sw=2 ci=64 refused=multiple_of_the_stride",
        "op=conv h=4 w=4 sh=2 sw=2 ci=72 refused=multiple_of_64",
        "op=conv left=activate act=3 refused=registers",
        "op=weight_grad h=3 w=4 refused=fill_no_TMA_tiles",
        "op=weight_grad h=4 w=3 refused=fill_no_TMA_tiles",
        "op=weight_grad h=3 w=32 refused=fill_no_TMA_tiles",
    ]


def watched() -> list[str]:
    """For the sanitizers: few steps, but more than there are stages."""
    small, even = "h=4 w=6 kh=3 kw=2 sh=2 sw=2 ph=1 pw=0", "h=8 w=4 kh=2 kw=3 sh=2 sw=1 ph=0 pw=1"
    return [
        f"type=bf16 {case}"
        for case in (
            f"op=conv n=2 ci=64 co=72 {small} left=bn_backward epilogue=grad_stats {LEAKY}",
            f"op=conv n=2 ci=64 co=40 {small} epilogue=stats",
            f"op=conv_transpose n=2 ci=136 co=72 {small} left=activate epilogue=stats {LEAKY}",
            f"op=conv_transpose n=2 ci=136 co=8 {small} epilogue=bias splits=2",
            f"op=weight_grad n=6 ci=72 co=40 {even} splits=2 left=activate right=bn_backward {LEAKY}",
        )
    ]


def tiles() -> list[str]:
    """The tiles for sm_90a, each with a contraction that sm90_tiles.cpp has for it."""
    return [
        f"n=2 h=8 w=8 kh=4 kw=4 sh=2 sw=2 ph=1 pw=1 {LEAKY} {case}"
        for case in (
            "tile=7 op=conv type=bf16 ci=128 co=264 left=none epilogue=stats ring=196608",
            "tile=7 op=conv type=bf16 ci=64 co=200 left=bn_backward epilogue=grad_stats ring=196608",
            "tile=7 op=weight_grad type=bf16 ci=264 co=136 left=bn_backward right=activate ring=196608",
            "tile=8 op=conv_transpose type=fp16 ci=136 co=136 left=none epilogue=bias ring=98304",
            "tile=8 op=conv_transpose type=fp16 ci=64 co=72 left=bn_backward epilogue=grad_stats ring=196608",
            "tile=9 op=conv_transpose type=bf16 ci=72 co=64 left=activate epilogue=stats ring=98304",
            # Less blocks than there are multiprocessors, and more steps than the deeper ring has stages.
            "tile=9 op=conv_transpose type=bf16 ci=520 co=64 left=none epilogue=stats ring=196608 sh=1 sw=1 n=1",
        )
    ]


def everything() -> list[str]:
    """All lines of sm90_types.cpp."""
    lines = [*convs(), *conv_transposes(), *weight_grads(), *weight_grad_prologues()]
    return [*lines, *groups_and_parts(), *many_tma_tiles(), *refused()]
