"""What is printed of the counts, against counts by hand; and one kernel, counted."""

from __future__ import annotations

import sys

import pytest

from fastdcgan.benchmarks import counted
from fastdcgan.benchmarks.counted import GPUS, KINDS, Case, kernel_name, of_blocks, of_passes, row
from tests.csrc.cuda.compiling import needs_nvcc
from tests.cuda_on_cpu.host_programs import needs_compiler

H100 = GPUS["h100"]
NUMBERS = (
    *KINDS,
    *(f"{w}_{part}" for w in ("load", "store") for part in ("requests", "sectors", "least_sectors", "uncoalesced")),
    *(f"shared_{w}_{part}" for w in ("load", "store") for part in ("wavefronts", "phases")),
    *("flops", "local_bytes", "l2_sectors", "read", "written"),
)


class Launch(dict):
    kernel = "_ZN9fastdcgan4cuda11contractionINS0_1CEEEvi"


def launch(**numbers: int) -> Launch:
    return Launch(dict.fromkeys(NUMBERS, 0) | {"blocks": 2 * H100.processors, "blocks_run": 4} | numbers)


@pytest.mark.parametrize(
    ("numbers", "limit", "seconds"),
    [
        ({"read": 2 * 10**7, "written": 10**7}, "mem", 3e7 / H100.memory),
        # Tensors that the second-level cache has no room for
        ({"read": 10**8, "l2_sectors": 10**6}, "mem", 32 * 66 * 10**6 / H100.memory),
        ({"l2_sectors": 10**4}, "L2", 32 * 66 * 10**4 / H100.l2),
        # Four blocks' wavefronts, of which the busiest multiprocessor has two blocks
        ({"shared_load_wavefronts": 3000, "shared_store_wavefronts": 1000}, "smem", 2000 / H100.clock),
        ({"flops": 4 * 10**9}, "tc", 4e9 / 4 * 264 / H100.tensor),
        ({"floating": 4 * 128}, "fp", 2 * 128 / 4 / H100.clock),
        ({"special": 4 * 128}, "sfu", 2 * 128 * 2 / H100.clock),
        ({"integer": 4 * 128}, "int", 2 * 128 / 2 / H100.clock),
        ({"control": 400, "memory": 400}, "issue", 2 * 200 / 4 / H100.clock),
    ],
)
def test_the_least_time_by_each_ceiling(numbers: dict[str, int], limit: str, seconds: float) -> None:
    times = H100.times(launch(**numbers))
    assert times[limit] == pytest.approx(1e6 * seconds)
    assert max(times, key=lambda name: times[name]) == limit


def test_a_row_has_the_grid_and_what_binds() -> None:
    case = Case("a contraction", 1000, 10**9, lambda on: None)
    text = row(case, launch(flops=10**7, tensor=100, load_requests=4, load_uncoalesced=1, read=10**6), H100)
    assert "a contraction" in text and " contraction " in text and "4 of 264" in text and "25%" in text
    assert " 0.66 |" in text and text.split()[-1] == "tc"


def test_names_of_kernels() -> None:
    assert kernel_name(Launch.kernel) == "contraction"
    assert kernel_name("norm_act_kernel") == "norm_act_kernel"


def test_the_rows_are_of_a_training_step() -> None:
    titles = [case.what for case in (*of_passes(2), *of_blocks(2))]
    assert len(titles) == len(set(titles)) == 15 + 2 * 15 - 2 + 3
    assert "G4 64->3 32->64 conv_transpose activate > activate" in titles
    assert "D0 3->64 64->32 weight_grad bn_backward" in titles


@needs_nvcc
@needs_compiler
@pytest.mark.compiles
def test_a_pass_reads_and_writes_each_value_once() -> None:
    (case,) = [case for case in of_passes(2) if case.what == "activate 64x32x32 NHWC"]
    (found,) = counted.launches("cuda", case, H100, sm=80)
    assert kernel_name(found.kernel) == "norm_act" and found["blocks_run"] == found["blocks"]
    values = 2 * 64 * 32 * 32
    assert found["store_bytes"] == 2 * values and found["store_sectors"] == 2 * values / 32
    assert found["read"] == 2 * values + 4 * 4 * 64 and found["written"] == 2 * values


@needs_nvcc
@needs_compiler
@pytest.mark.compiles
def test_no_bank_conflicts_and_whole_sectors() -> None:
    """Where both have been: a block's sums of a gradient, and the parts of a product."""
    (sums,) = [case for case in of_passes(2) if case.what == "grad_stats 64x32x32 NHWC"]
    found = counted.launches("cuda", sums, H100, sm=80)[0]
    assert kernel_name(found.kernel) == "grad_sums" and found["shared_store_phases"]
    for which in ("load", "store"):
        assert found[f"shared_{which}_wavefronts"] == found[f"shared_{which}_phases"]
    (product,) = [case for case in of_blocks(2) if case.what == "D3 256->512 8->4 conv > stats"]
    parts, added, _ = counted.launches("cuda", product, H100, sm=80)
    assert kernel_name(added.kernel) == "reduce_splits"
    for launch in (parts, added):
        assert launch["load_sectors"] == launch["load_least_sectors"]
        assert launch["store_sectors"] == launch["store_least_sectors"]


def test_elsewhere_than_in_a_checkout_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tests.ptx.interpreter", None)
    monkeypatch.setattr(sys, "argv", ["counted"])
    with pytest.raises(SystemExit) as left:
        counted.main()
    said = capsys.readouterr()
    assert left.value.code == 1 and not said.out and said.err.count("\n") == 1
    assert said.err.startswith("counted runs tests/ptx, so from the root of a checkout")
