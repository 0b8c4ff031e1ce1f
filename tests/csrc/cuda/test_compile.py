"""The committed table of what the CUDA contractions compile to; `test_cuda_build.py` holds the built library to it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

pytest.importorskip("triton")  # whose cuobjdump makes the table

from fastdcgan.backends.cuda_tiles import OF_SIZE, OF_WARPGROUPS
from fastdcgan.benchmarks import cuda_compile_table
from fastdcgan.benchmarks.cuda_compile_table import ARCHITECTURES, OPS, Compiled, faults
from fastdcgan.benchmarks.regressions import worse


@pytest.fixture(scope="module")
def table() -> dict[str, Compiled]:
    return cuda_compile_table.read()[1]


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
    assert "8 bytes of stack" in faults(replace(row, stack=8))
    assert "no tensor core instruction" in faults(replace(row, tensor_core=0))
    assert "no asynchronous copy" in faults(replace(row, async_copies=0))
    assert "no load of matrices" in faults(replace(row, matrix_loads=0))
    plain = table["sm_90 conv bf16 tile 7 without prologue"]
    assert not faults(plain) and not plain.matrix_loads
    assert "products that wait for each other" in faults(replace(plain, groups=plain.tensor_core))
    assert "no load of matrices" in faults(replace(table["sm_90 conv bf16 tile 7"], matrix_loads=0))
    assert worse(replace(row, registers=row.registers + 40), row)
    assert worse(replace(row, instructions=2 * row.instructions), row)
    assert not worse(replace(row, registers=row.registers + 1), row)
