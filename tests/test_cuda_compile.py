"""What the CUDA contractions compile to, for GPUs that are not there: no spills, tensor cores, asynchronous copies.

One file of `benchmarks/results/cuda_compile.md` here; the whole: `python -m fastdcgan.benchmarks.cuda_compile_table`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

pytest.importorskip("triton")  # whose cuobjdump is used

from fastdcgan.backends.cuda_tiles import OF_SIZE, OF_WARPGROUPS
from fastdcgan.benchmarks import cuda_compile_table
from fastdcgan.benchmarks.cuda_compile_table import ARCHITECTURES, CSRC, OPS, Compiled, faults
from fastdcgan.benchmarks.regressions import worse

needs_nvcc = pytest.mark.skipif(cuda_compile_table.nvcc() is None, reason="nvcc compiles them, and it is not on PATH")


@pytest.fixture(scope="module")
def table() -> dict[str, Compiled]:
    return cuda_compile_table.read()[1]


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    """Of the contraction that needs the most registers."""
    return cuda_compile_table.compile_source(CSRC / "cuda" / "contraction_conv_transpose_bf16.cu", 90)


@needs_nvcc
def test_compiles_well_and_no_worse_than_the_table(compiled: list[Compiled], table: dict[str, Compiled]) -> None:
    assert len(compiled) == len(OF_SIZE[2])
    assert not {row.key: faults(row) for row in compiled if faults(row)}
    if cuda_compile_table.read()[0] == cuda_compile_table.version():
        assert not {row.key: worse(row, table[row.key]) for row in compiled if worse(row, table[row.key])}


@needs_nvcc
def test_products_of_warpgroups_compile_well_and_no_worse_than_the_table(table: dict[str, Compiled]) -> None:
    """None of them waits for another, none spills, boxes are copied by UTMALDG."""
    compiled = cuda_compile_table.compile_source(CSRC / "cuda" / "warpgroup_bf16.cu", 90)
    assert len(compiled) == 2 * len(OPS) * len(OF_WARPGROUPS)  # with a prologue and without
    assert not {row.key: faults(row) for row in compiled if faults(row)}
    if cuda_compile_table.read()[0] == cuda_compile_table.version():
        assert not {row.key: worse(row, table[row.key]) for row in compiled if worse(row, table[row.key])}


def test_the_table_has_every_kernel_and_no_faults(table: dict[str, Compiled]) -> None:
    kinds = [(dtype, tile) for dtype in ("bf16", "fp16") for tile in OF_SIZE[2]]
    kinds += [(dtype, tile) for dtype in ("tf32", "fp32") for tile in OF_SIZE[4]]
    wanted = {(arch, op, *kind, True) for arch, op, kind in itertools.product(ARCHITECTURES, OPS, kinds)}
    wanted |= set(itertools.product((90,), OPS, ("bf16", "fp16"), OF_WARPGROUPS, (True, False)))
    assert {(row.arch, row.op, row.dtype, row.tile, row.prologue) for row in table.values()} == wanted
    assert len(table) == len(wanted)
    assert not {key: faults(row) for key, row in table.items() if faults(row)}


def test_faults_and_regressions_are_seen(table: dict[str, Compiled]) -> None:
    row = table["sm_90 conv bf16 tile 0"]
    assert "8 bytes of spills" in faults(replace(row, spills=8))
    assert "no tensor core instruction" in faults(replace(row, tensor_core=0))
    assert "no asynchronous copy" in faults(replace(row, async_copies=0))
    assert "no load of matrices" in faults(replace(row, matrix_loads=0))
    plain = table["sm_90 conv bf16 tile 7 without prologue"]
    assert not faults(plain) and not plain.matrix_loads
    assert "no load of matrices" in faults(replace(table["sm_90 conv bf16 tile 7"], matrix_loads=0))
    assert worse(replace(row, registers=row.registers + 40), row)
    assert worse(replace(row, instructions=2 * row.instructions), row)
    assert not worse(replace(row, registers=row.registers + 1), row)
