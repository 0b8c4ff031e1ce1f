"""The CUDA contractions on the CPU, against float64 (`contraction_cases.h`): every prologue, epilogue and geometry."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdcgan.activations import ACTIVATIONS
from tests.cuda_on_cpu import contraction_lines
from tests.cuda_on_cpu.contraction_lines import EPILOGUES, GEOMETRIES, PROLOGUES, TYPES
from tests.cuda_on_cpu.host_programs import MODES, build, needs_compiler, run
from tests.cuda_on_cpu.planted import Bug, assert_caught

pytestmark = needs_compiler


def check(program: str, lines: list[str], mode: str = "plain") -> None:
    code, output = run(build(program, mode), *lines)
    failed = "\n".join(line for line in output.splitlines() if not line.startswith("ok "))
    assert code == 0 and output.count("ok ") >= len(lines), f"{program} ({mode}) exited with {code}:\n{failed}"


@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
def test_every_prologue_epilogue_and_geometry(op: str) -> None:
    check("contraction_types", contraction_lines.geometries(op))


def test_weight_grad_with_every_prologue_and_geometry() -> None:
    check("contraction_types", contraction_lines.weight_grads())


@pytest.mark.parametrize("kind", TYPES)
def test_types(kind: str) -> None:
    check("contraction_types", contraction_lines.types(kind))


@pytest.mark.parametrize("act", [row.id for row in ACTIVATIONS.values()])
def test_activations(act: int) -> None:
    check("contraction_types", contraction_lines.activations(act))


def test_statistics_groups() -> None:
    check("contraction_types", contraction_lines.statistics_groups())


def test_parts() -> None:
    check("contraction_types", contraction_lines.parts())


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


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"plain"}))
def test_under_a_sanitizer(mode: str) -> None:
    check("contraction_watched", contraction_lines.watched(), mode)


@pytest.mark.parametrize("tile", range(7))
def test_the_tiles_of_gpus(tile: int) -> None:
    check("contraction_tiles", contraction_lines.tiles(tile))


# --- planted bugs ----------------------------------------------------------------------------------------------------

RACE = "ThreadSanitizer: data race"
WRONG = r"is -?[\dnaife.+-]+, not"
LOAD = "valid |= loader.load(shared, free, ahead);"
PLANTED = {
    "a_wait_too_few": Bug(
        "contraction.cuh", "gpu::copy_async_wait<kAhead - 1>();", "gpu::copy_async_wait<kAhead>();", "plain", WRONG
    ),
    "a_stage_too_early": Bug("contraction.cuh", LOAD, LOAD.replace("free", "next(slot)"), "plain", WRONG),
    "no_barrier_in_the_loop": Bug("contraction.cuh", "__syncthreads();  // the step", "", "thread", RACE),
    "no_barrier_before_the_sums": Bug("contraction.cuh", "__syncthreads();  // the sums", "", "thread", RACE),
    "no_barrier_after_the_tile": Bug("epilogue.cuh", "Team::sync();               // all", "", "thread", RACE),
    "prologue_of_padding": Bug("loaders.cuh", "if (!(valid >> i & 1)) continue;", "", "plain", WRONG),
    "valid_of_another_step": Bug("contraction.cuh", "valid >> (kAhead - 1) * kBits", "valid", "plain", WRONG),
    "last_channels": Bug("loaders.cuh", "inside ? a.channels - channel : 0", "inside ? 8 : 0", "plain", "past its end"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_caught(name: str) -> None:
    # Asynchronous copies want rows of whole vectors.
    channels = "ci=100" if name == "last_channels" else "ci=104"
    case = f"op=conv n=2 {channels} co=40 {GEOMETRIES[2]} left=activate epilogue=stats act=3"
    assert_caught("contraction_planted", PLANTED, name, case)
