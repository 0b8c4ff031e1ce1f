"""The contractions for sm_90a on the CPU, against float64: bulk copies, mbarriers and wgmma as the shim has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.cuda_on_cpu import sm90_lines
from tests.cuda_on_cpu.contraction_lines import EPILOGUES, LEAKY, PROLOGUES
from tests.cuda_on_cpu.host_programs import MODES, needs_compiler
from tests.cuda_on_cpu.planted import Bug, assert_caught
from tests.cuda_on_cpu.sm90_lines import HALVED
from tests.cuda_on_cpu.test_contractions import RACE, WRONG, check

pytestmark = needs_compiler


@pytest.mark.parametrize(
    "lines",
    [
        sm90_lines.convs,
        sm90_lines.conv_transposes,
        sm90_lines.weight_grads,
        sm90_lines.weight_grad_prologues,
        sm90_lines.groups_and_parts,
        sm90_lines.many_tma_tiles,
    ],
)
def test_lines(lines: Callable[[], list[str]]) -> None:
    check("sm90_types", lines())


@st.composite
def cases(draw: st.DrawFn) -> str:
    op = draw(st.sampled_from(["conv", "conv_transpose", "weight_grad"]))
    words = {name: draw(st.integers(1, 4)) for name in ("kh", "kw", "sh", "sw")}
    words |= {name: draw(st.integers(1, 2)) for name in ("dh", "dw", "groups")}
    words |= {"ph": draw(st.integers(0, 2)), "pw": draw(st.integers(0, 2)), "splits": draw(st.integers(1, 3))}
    words |= {"ci": 8 * draw(st.integers(1, 10)), "co": 8 * draw(st.integers(1, 10))}
    if op == "conv":
        words["co"] = draw(st.integers(1, 80))
        words["ci"] = 64 if words["sw"] > 1 else words["ci"]
    for size, kernel, stride, padding, dilation in (("h", "kh", "sh", "ph", "dh"), ("w", "kw", "sw", "pw", "dw")):
        words[size] = draw(st.integers(1, 9)) * (1 if op == "conv_transpose" else words[stride])
        reach = words[dilation] * (words[kernel] - 1) + 1
        if op == "conv_transpose":
            assume((words[size] - 1) * words[stride] - 2 * words[padding] + reach > 0)
        else:
            pixels = (words[size] + 2 * words[padding] - reach) // words[stride] + 1
            assume(pixels > 0 and (op == "conv" or pixels in (1, 2, 4, 8)))
    choices = {
        "op": op,
        "type": draw(st.sampled_from(["bf16", "fp16"])),
        "left": draw(st.sampled_from(PROLOGUES)),
        "right": draw(st.sampled_from(PROLOGUES)),
        "epilogue": draw(st.sampled_from(EPILOGUES)),
        "rows": draw(st.sampled_from([2, 4])),
        "act": draw(st.integers(0, 2)),
        "n": words["groups"] * draw(st.integers(1, 2)),
    }
    return " ".join(f"{name}={value}" for name, value in (words | choices).items()) + " slope=0.3"


@given(case=cases())
@settings(max_examples=25)
def test_any_size(case: str) -> None:
    check("sm90_types", [case])


def test_what_tma_cannot_copy_is_refused() -> None:
    check("sm90_types", sm90_lines.refused())


@pytest.mark.parametrize("case", sm90_lines.tiles())
def test_the_tiles_of_gpus(case: str) -> None:
    check("sm90_tiles", [case])


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"plain"}))
def test_under_a_sanitizer(mode: str) -> None:
    check("sm90_watched", sm90_lines.watched(), mode)


# --- planted bugs ----------------------------------------------------------------------------------------------------

NONE, ACTIVATE = "left=none epilogue=stats", "left=activate epilogue=stats"
WEIGHT_GRAD = "op=weight_grad left=activate right=bn_backward"
FULL = "if (!at.await(shared.full)) break;"
EMPTY = "if (!at.await(shared.empty, 1)) break;"
EXPECT = "gpu::mbarrier_arrive_expect(&shared.full[at.slot], bytes);"
RELEASE = "if (i > 0 && lane == 0) gpu::mbarrier_arrive(&shared.empty[before]);"
WAIT = "gpu::wgmma_wait<0>();"
STEP = "loader.advance(step);\n            gpu::fence_async();"
READ = "gpu::fence_async();  // what was read is copied to next"
LATE = "__syncwarp(); if (lane == 0) gpu::mbarrier_arrive(&shared.empty[at.slot]); gpu::fence_async(); continue;"
UNFENCED_COPY = "a bulk copy to what threads accessed without fence.proxy.async"
UNFENCED_PRODUCT = "a wgmma of what was stored without fence.proxy.async"
# name -> (case, what is there, what is put there, mode, what is said about it)
CASES = {
    "no_wait_for_copies": (ACTIVATE, FULL, "", "plain", "deadlock"),
    "a_stage_too_early": (NONE, EMPTY, "", "plain", "."),
    "another_parity": (NONE, EMPTY, EMPTY.replace(", 1", ""), "plain", "deadlock"),
    "no_expected_bytes": (
        NONE, EXPECT, "gpu::mbarrier_arrive(&shared.full[at.slot]);", "plain", "nobody waited for",
    ),
    "too_many_bytes": (NONE, EXPECT, EXPECT.replace("bytes", "bytes + 16"), "plain", "deadlock"),
    "released_too_early": (
        NONE, RELEASE, "if (lane == 0) gpu::mbarrier_arrive(&shared.empty[at.slot]);", "plain", WRONG,
    ),
    "released_twice": (NONE, RELEASE, RELEASE.replace("lane == 0", "lane < 2"), "plain", "more arrivals|deadlock"),
    "not_released": (
        NONE, RELEASE, RELEASE.replace("lane == 0", "lane == 0 && warpgroup == 0"), "plain", "deadlock",
    ),
    "no_fence": (ACTIVATE, "gpu::wgmma_fence();", "", "plain", "without wgmma.fence"),
    "no_wait_for_the_products": (ACTIVATE, WAIT, "", "plain", "nobody waited for"),
    "a_wait_too_few": (ACTIVATE, WAIT, "gpu::wgmma_wait<1>();", "plain", "."),
    "no_commit": (ACTIVATE, "gpu::wgmma_commit();", "", "plain", "nobody waited for"),
    "no_fence_of_barriers": (NONE, "gpu::mbarrier_init_done();", "", "plain", "may not see yet"),
    "no_barrier_after_them": (NONE, "__syncthreads();", "", "plain", "not initialised"),
    "no_barrier_before_the_sums": (NONE, "Consumers<C>::sync();  // the sums", "", "thread", RACE),
    "no_barrier_of_the_warp": (ACTIVATE, "__syncwarp();", "", "thread", RACE),
    "read_without_a_fence": (ACTIVATE, READ, "", "plain", UNFENCED_COPY),
    "read_with_a_fence_of_one_lane": (ACTIVATE, READ, "if (lane == 0) gpu::fence_async();", "plain", UNFENCED_COPY),
    "read_with_a_fence_too_late": (ACTIVATE, READ, LATE, "plain", UNFENCED_COPY),
    "written_without_a_fence": (WEIGHT_GRAD, STEP, "loader.advance(step);", "plain", UNFENCED_PRODUCT),
    "written_with_a_fence_of_one_lane": (
        WEIGHT_GRAD, STEP, "loader.advance(step); if (lane == 0) gpu::fence_async();", "plain", UNFENCED_PRODUCT,
    ),
    "no_barrier_after_the_prologue": (WEIGHT_GRAD, "Consumers<C>::sync();  // the factors", "", "thread", RACE),
    "a_prologue_of_another_step": (WEIGHT_GRAD, STEP, "gpu::fence_async();", "plain", WRONG),
    "a_prologue_of_padding": (ACTIVATE, "there && (h == 0 ? first_inside : second_inside)", "there", "plain", WRONG),
    "another_step_of_the_depth": (NONE, "k * C::kLeftStep", "k * 64", "plain", WRONG),
}  # fmt: skip
PLANTED = {name: Bug("sm90_contraction.cuh", *bug) for name, (_, *bug) in CASES.items()}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_caught(name: str) -> None:
    words = CASES[name][0]
    case = f"op=conv type=bf16 n=2 ci=64 co=40 {HALVED} {words} {LEAKY}"
    if words == WEIGHT_GRAD:
        case = f"{words} type=bf16 n=6 groups=3 ci=8 co=8 h=8 w=8 kh=3 kw=3 ph=1 pw=1 {LEAKY}"
    assert_caught("sm90_planted", PLANTED, name, case)
