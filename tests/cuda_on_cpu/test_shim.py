"""The shim that runs CUDA kernels on the CPU: what it computes, and that it catches what it is there to catch."""

from __future__ import annotations

import re

import pytest

from tests.cuda_on_cpu.host_programs import MODES, assert_passes, build, needs_compiler, run

pytestmark = needs_compiler

RACE = "ThreadSanitizer: data race"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"


def in_every_mode(pattern: str) -> dict[str, str]:
    return dict.fromkeys(MODES, pattern)


# planted bug -> mode -> what is said about it
CAUGHT: dict[str, dict[str, str]] = {
    "missing_barrier": {"plain": "is -1, not 63", "thread": RACE},
    "missing_barrier_before_reuse": {"plain": r"is \d+, not \d+", "thread": RACE},
    "missing_syncwarp": {"plain": "is -1, not 1", "thread": RACE},
    "barrier_in_a_branch": in_every_mode(r"deadlock:\s+40 threads, the first \(0,0,0\), in __syncthreads at .*cpp:\d+"),
    "early_return": in_every_mode(r"deadlock:[^$]*24 threads, the first \(40,0,0\), returned"),
    "barriers_at_two_places": in_every_mode("barriers differ"),
    "shuffle_in_a_branch": in_every_mode(r"deadlock:\s+40 threads, .* in __shfl_xor_sync"),
    "shuffle_from_outside_the_mask": in_every_mode("reads a lane that is not in the mask"),
    "lane_not_in_its_mask": in_every_mode("the calling lane is not in its mask"),
    "shared_memory_nobody_wrote": in_every_mode(r"out\[17\] is -1, not 17"),
    "past_shared_memory": {"plain": "shared memory .* past its end", "address": OVERFLOW},
    "more_shared_memory_than_asked": in_every_mode("uses 260 bytes of shared memory, its launch asked for 256"),
    "copy_used_before_its_wait": in_every_mode(r"out\[0\] is -1, not 0"),
    "copy_never_committed": in_every_mode(r"out\[0\] is -1, not 0"),
    "copy_into_what_is_still_read": {"thread": RACE},
    "read_past_the_end": {"plain": "access to in .* 0 bytes past its end", "address": OVERFLOW},
    "read_before_the_begin": {"plain": "access to in .* 16 bytes before its begin", "address": OVERFLOW},
    "write_past_the_end": {"plain": "access to out .* 0 bytes past its end", "address": OVERFLOW},
    "write_to_an_input": {"plain": "a write, and it is read-only"},
    "misaligned": in_every_mode("misaligned access of 16 bytes"),
    "read_before_waiting_for_kernels": {"plain": "access to in .* before the launch has waited for the kernels before"},
    "thread_that_does_not_wait_for_kernels": in_every_mode("returns without waiting for the kernels before"),
    "blocks_write_the_same": {"thread": RACE},
    "block_reads_anothers_result": {"thread": RACE},
}


@pytest.mark.parametrize("mode", MODES)
def test_built_ins_and_numbers(mode: str) -> None:
    assert_passes("shim_tests", mode)


@pytest.mark.parametrize("mode", MODES)
def test_planted_bugs_are_caught(mode: str) -> None:
    program = build("planted_bugs", mode)
    code, names = run(program)
    assert code == 0 and sorted(names.split()) == sorted(CAUGHT)
    for name, patterns in CAUGHT.items():
        code, output = run(program, name, "right")
        assert code == 0, f"{name} is said to be wrong where it is right:\n{output}"
        if mode in patterns:
            code, output = run(program, name, "wrong")
            assert code != 0 and re.search(patterns[mode], output), f"{name} was not caught by {mode}:\n{output}"


def test_the_place_of_an_error_is_named() -> None:
    _, output = run(build("planted_bugs"), "write_past_the_end", "wrong")
    assert "planted block (0,0,0) thread (63,0,0): access to out (256 bytes)" in output
