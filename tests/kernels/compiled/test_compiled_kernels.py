"""What the Triton contractions compile to, for GPUs that are not there: no spills, tensor cores, asynchronous copies.

A part of `benchmarks/results/triton_compile.md`; the whole table: `python -m fastdcgan.benchmarks.compile_table`.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from fastdcgan.benchmarks import compile_table  # noqa: E402
from fastdcgan.benchmarks.compile_table import Case, Compiled  # noqa: E402
from fastdcgan.benchmarks.regressions import worse  # noqa: E402
from fastdcgan.benchmarks.shapes import NetShape  # noqa: E402

G2, D2 = NetShape().generator()[2], NetShape().discriminator()[2]
# Each contraction with its prologues and epilogues; for the architectures beside sm_90 those with the most registers.
CASES = [
    Case(90, "bf16", "conv", D2, 128, "activate", "stats"),
    Case(90, "bf16", "conv", D2, 1024, "none", "activate"),
    Case(90, "bf16", "conv", G2, 128, "bn_backward", "grad_stats"),
    Case(90, "bf16", "conv_transpose", G2, 128, "none", "stats"),
    Case(90, "bf16", "conv_transpose", G2, 1024, "activate", "stats"),
    Case(90, "bf16", "conv_transpose", D2, 128, "bn_backward", "grad_stats"),
    Case(90, "bf16", "weight_grad", D2, 128, "activate bn_backward", "none"),
    Case(90, "bf16", "weight_grad", G2, 1024, "none none", "none"),
    Case(90, "fp32", "conv_transpose", D2, 128, "bn_backward", "grad_stats"),
    Case(90, "fp32", "weight_grad", G2, 128, "bn_backward activate", "none"),
    Case(80, "bf16", "conv", G2, 128, "bn_backward", "grad_stats"),
    Case(80, "bf16", "conv_transpose", G2, 128, "activate", "stats"),
    Case(80, "bf16", "weight_grad", D2, 128, "activate bn_backward", "none"),
    Case(100, "bf16", "conv", G2, 128, "bn_backward", "grad_stats"),
    Case(100, "bf16", "conv_transpose", G2, 128, "activate", "stats"),
    Case(100, "bf16", "weight_grad", D2, 128, "activate bn_backward", "none"),
]


@pytest.fixture(scope="module")
def compiled() -> dict[Case, Compiled]:
    return dict(zip(CASES, compile_table.compile_cases(CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_well(case: Case, compiled: dict[Case, Compiled]) -> None:
    assert not compile_table.faults(compiled[case])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_no_worse_than_the_table(case: Case, compiled: dict[Case, Compiled]) -> None:
    version, table = compile_table.read()
    if version != triton.__version__:
        pytest.skip(f"the table is of triton {version}, this is {triton.__version__}")
    row = compiled[case]
    assert row.key in table, "the heuristic has a new tile: python -m fastdcgan.benchmarks.compile_table"
    assert not worse(row, table[row.key])


def test_the_table_is_of_the_tiles_that_are_chosen_and_has_no_faults() -> None:
    _, table = compile_table.read()
    chosen = {compile_table.key(case) for case in compile_table.cases()}
    assert chosen == set(table)
    assert not {key: compile_table.faults(row) for key, row in table.items() if compile_table.faults(row)}


def test_faults_and_regressions_are_seen(compiled: dict[Case, Compiled]) -> None:
    from dataclasses import replace

    row = compiled[CASES[0]]
    assert "3 spills" in compile_table.faults(replace(row, spills=3))
    assert "no wgmma" in compile_table.faults(replace(row, wgmma=0))
    assert "no bulk_copies" in compile_table.faults(replace(row, bulk_copies=0))
    assert any("shared memory" in fault for fault in compile_table.faults(replace(row, shared_memory=240 * 1024)))
    assert worse(replace(row, registers=row.registers + 40), row)
    assert worse(replace(row, instructions=2 * row.instructions), row)
    assert not worse(replace(row, registers=row.registers + 1), row)
