"""The CUDA contractions on the CPU, against float64 (`contraction_cases.h`): every prologue, epilogue and geometry."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from host_programs import BUILD, FLAGS, HERE, MODES, ROOT, build, compiled, includes, needs_compiler, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytestmark = needs_compiler

PROLOGUES = ("none", "activate", "bn_backward")
EPILOGUES = ("none", "bias", "activate", "stats", "grad_stats")
TYPES = ("bf16", "fp16", "tf32", "fp32")
# The last two: a phase without taps, and phases with one tap more than others.
GEOMETRIES = (
    "h=4 w=6 kh=4 kw=4 sh=2 sw=2 ph=1 pw=1",
    "h=4 w=4 kh=4 kw=4",
    "h=5 w=4 kh=3 kw=3 ph=1 pw=1",
    "h=5 w=5 kh=3 kw=3 dh=2 dw=2 ph=2 pw=2",
    "h=5 w=6 kh=5 kw=5 sh=2 sw=2 ph=2 pw=2 oh=1 ow=1",
    "h=3 w=5 kh=2 kw=1 sh=3 sw=2",
    "h=5 w=7 kh=3 kw=4 sh=1 sw=3 ph=2 pw=0 dh=1 dw=2",
)
LEAKY = "act=2 slope=0.2"


def check(program: str, lines: list[str], mode: str = "plain") -> None:
    code, output = run(build(program, mode), *lines)
    failed = "\n".join(line for line in output.splitlines() if not line.startswith("ok "))
    assert code == 0 and output.count("ok ") >= len(lines), f"{program} ({mode}) exited with {code}:\n{failed}"


@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
def test_every_prologue_epilogue_and_geometry(op: str) -> None:
    lines = []
    for left, epilogue, (i, geometry) in itertools.product(PROLOGUES, EPILOGUES, enumerate(GEOMETRIES)):
        # Rows of whole vectors or not, one tile or several, by turns.
        channels = ("ci=40 co=40", "ci=7 co=5", "ci=8 co=33")[i % 3]
        lines.append(f"op={op} type=bf16 n=2 {channels} {geometry} left={left} epilogue={epilogue} {LEAKY}")
    check("contraction_types", lines)


def test_weight_grad_with_every_prologue_and_geometry() -> None:
    lines = []
    for left, right, (i, geometry) in itertools.product(PROLOGUES, PROLOGUES, enumerate(GEOMETRIES)):
        channels = ("ci=40 co=8", "ci=7 co=5", "ci=8 co=33")[i % 3]
        lines.append(f"op=weight_grad type=bf16 n=2 {channels} {geometry} left={left} right={right} {LEAKY}")
    check("contraction_types", lines)


@pytest.mark.parametrize("kind", TYPES)
def test_types(kind: str) -> None:
    heads = [f"op={op} type={kind} n=2 ci=40 co=36 {GEOMETRIES[0]} {LEAKY}" for op in ("conv", "conv_transpose")]
    lines = [
        f"{head} left={left} epilogue={epilogue}"
        for head, (left, epilogue) in itertools.product(
            heads, [("none", "none"), ("activate", "stats"), ("bn_backward", "grad_stats"), ("none", "bias")]
        )
    ]
    lines += [
        f"op=weight_grad type={kind} n=2 ci=20 co=12 {GEOMETRIES[0]} {LEAKY} left={left} right={right}"
        for left, right in [("none", "none"), ("activate", "bn_backward"), ("bn_backward", "activate")]
    ]
    check("contraction_types", lines)


@pytest.mark.parametrize("act", range(8))
def test_activations(act: int) -> None:
    slope = "slope=0.2" if act == 2 else "slope=1"
    head = f"type=fp16 n=2 ci=9 co=10 {GEOMETRIES[0]} act={act} {slope}"
    lines = [
        f"op=conv {head} left=activate epilogue=activate",
        f"op=conv {head} left=bn_backward epilogue=grad_stats",
        f"op=conv_transpose {head} left=bn_backward rows=2 epilogue=grad_stats",
        f"op=weight_grad {head} left=activate right=bn_backward",
        f"op=weight_grad {head} left=bn_backward right=activate rows=2",
    ]
    check("contraction_types", lines)


def test_statistics_groups() -> None:
    lines = [
        f"op={op} type=bf16 n=6 groups={groups} ci=24 co=40 {GEOMETRIES[0]} left={left} epilogue={epilogue} {LEAKY}"
        for op, groups, (left, epilogue) in itertools.product(
            ("conv", "conv_transpose"),
            (2, 3),
            [("none", "stats"), ("activate", "stats"), ("bn_backward", "grad_stats")],
        )
    ]
    lines += [
        f"op=weight_grad type=bf16 n=6 groups=3 ci=8 co=16 {GEOMETRIES[0]} left=activate right=bn_backward {LEAKY}"
    ]
    check("contraction_types", lines)


def test_parts() -> None:
    lines = []
    for splits in (2, 3, 7, 40):  # the last are more than there are steps
        head = f"splits={splits} type=bf16 n=4 groups=2 {GEOMETRIES[0]} {LEAKY}"
        for epilogue in EPILOGUES:
            lines.append(f"op=conv {head} ci=72 co=20 left=activate epilogue={epilogue}")
            lines.append(f"op=conv_transpose {head} ci=12 co=72 epilogue={epilogue}")
        lines.append(f"op=weight_grad {head} ci=24 co=7 left=activate right=bn_backward")
    check("contraction_types", lines)


sizes = st.integers(1, 9)


@st.composite
def cases(draw: st.DrawFn) -> str:
    words = {name: draw(sizes) for name in ("h", "w")}
    words |= {name: draw(st.integers(1, 4)) for name in ("kh", "kw", "sh", "sw")}
    words |= {name: draw(st.integers(1, 2)) for name in ("dh", "dw", "groups")}
    words |= {"ph": draw(st.integers(0, 2)), "pw": draw(st.integers(0, 2))}
    words |= {"ci": draw(st.integers(1, 48)), "co": draw(st.integers(1, 48)), "splits": draw(st.integers(1, 3))}
    op = draw(st.sampled_from(["conv", "conv_transpose", "weight_grad"]))
    for size, kernel, stride, padding, dilation in (("h", "kh", "sh", "ph", "dh"), ("w", "kw", "sw", "pw", "dw")):
        reach = words[dilation] * (words[kernel] - 1) + 1
        if op == "conv_transpose":
            assume((words[size] - 1) * words[stride] - 2 * words[padding] + reach > 0)
        else:
            assume(words[size] + 2 * words[padding] >= reach)
    choices = {
        "op": op,
        "type": draw(st.sampled_from(TYPES)),
        "left": draw(st.sampled_from(PROLOGUES)),
        "right": draw(st.sampled_from(PROLOGUES)),
        "epilogue": draw(st.sampled_from(EPILOGUES)),
        "rows": draw(st.sampled_from([2, 4])),
        "act": draw(st.integers(0, 7)),
        "n": words["groups"] * draw(st.integers(1, 2)),
    }
    return " ".join(f"{name}={value}" for name, value in (words | choices).items()) + " slope=0.3"


@given(case=cases())
@settings(max_examples=60)
def test_any_size(case: str) -> None:
    check("contraction_types", [case])


WATCHED = [
    f"op={op} type=bf16 n=2 {channels} {geometry} {LEAKY} left={left} right={right} epilogue={epilogue} splits={splits}"
    for op in ("conv", "conv_transpose", "weight_grad")
    for channels, geometry, left, right, epilogue, splits in (
        ("ci=40 co=36", GEOMETRIES[0], "bn_backward", "activate", "grad_stats", 1),
        ("ci=7 co=9", GEOMETRIES[6], "activate", "bn_backward", "stats", 1),
        ("ci=48 co=16", GEOMETRIES[4], "none", "none", "stats", 2),
    )
]


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"plain"}))
def test_under_a_sanitizer(mode: str) -> None:
    check("contraction_watched", WATCHED, mode)


REST = {
    "conv": "left=activate epilogue=stats",
    "conv_transpose": "left=bn_backward epilogue=grad_stats",
    "weight_grad": "left=activate right=bn_backward splits=2",
}


@pytest.mark.parametrize("tile", range(7))
def test_the_tiles_of_gpus(tile: int) -> None:
    op = list(REST)[tile % 3]  # as in contraction_tiles.cpp
    head = f"tile={tile} op={op} n=3 h=6 w=8 kh=3 kw=3 sh=2 sw=2 ph=1 pw=1 oh=1 ow=1"
    check("contraction_tiles", [f"{head} ci={ci} co={co} {LEAKY} {REST[op]}" for ci, co in ((136, 72), (70, 137))])


# --- planted bugs ----------------------------------------------------------------------------------------------------

RACE = "ThreadSanitizer: data race"
WRONG = r"is -?[\dnaife.+-]+, not"
# name -> (file, what is there, what is put there, mode, what is said about it)
PLANTED = {
    "a_wait_too_few": ("contraction.cuh", "copy_async_wait<kAhead - 1>", "copy_async_wait<kAhead>", "plain", WRONG),
    "a_stage_too_early": ("contraction.cuh", "load(shared, free,", "load(shared, next(slot),", "plain", WRONG),
    "no_barrier_in_the_loop": ("contraction.cuh", "__syncthreads();  // the step", "// the step", "thread", RACE),
    "no_barrier_before_the_sums": ("contraction.cuh", "__syncthreads();  // the sums", "// the sums", "thread", RACE),
    "no_barrier_after_the_tile": ("finish.cuh", "Team::sync();               // all", "// all", "thread", RACE),
    "prologue_of_padding": ("gather.cuh", "if (!(valid >> i & 1)) continue;", "", "plain", WRONG),
    "valid_of_another_step": ("contraction.cuh", "valid >> (kAhead - 1) * kBits", "valid", "plain", WRONG),
    "last_channels": ("gather.cuh", "inside ? a.channels - channel : 0", "inside ? 8 : 0", "plain", "past its end"),
}  # fmt: skip


def planted(name: str | None, mode: str) -> Path:
    """The program with the bug `name` in its kernels, or without any."""
    if name is None:
        return build("contraction_planted", mode)
    file, right, wrong, *_ = PLANTED[name]
    folder = BUILD / "planted" / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "csrc" / "cuda").glob("*.cuh"):
        text = path.read_text()
        if path.name == file:
            assert right in text, f"{file} has no {right!r} any more"
            text = text.replace(right, wrong, 1)
        if not (folder / path.name).exists() or (folder / path.name).read_text() != text:
            (folder / path.name).write_text(text)
    source = HERE / "contraction_planted.cpp"
    flags = [
        *FLAGS,
        "-Wno-unused-variable",
        "-Wno-unused-parameter",
        *MODES[mode],
        f"-I{folder}",
        f"-I{HERE}",
        *includes(),
    ]
    return compiled(folder / f"program-{mode}", [source], flags)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_caught(name: str) -> None:
    *_, mode, said = PLANTED[name]
    # Asynchronous copies want rows of whole vectors.
    channels = "ci=100" if name == "last_channels" else "ci=104"
    case = f"op=conv n=2 {channels} co=40 {GEOMETRIES[2]} left=activate epilogue=stats act=3"
    code, output = run(planted(None, mode), case)
    assert code == 0, f"said to be wrong where it is right:\n{output}"
    code, output = run(planted(name, mode), case)
    assert code != 0 and re.search(said, output), f"{name} was not caught by {mode}:\n{output}"
