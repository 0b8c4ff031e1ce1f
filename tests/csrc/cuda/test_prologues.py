"""What a prologue costs, counted in its machine code: the rule of fastdcgan/backends/boundaries.py charges as much."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdcgan.backends import boundaries
from tests.csrc.cuda import machine_code
from tests.csrc.cuda.compiling import needs_nvcc, nvcc

VALUES = 8

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], float]:
    """(where, which prologue) -> instructions a value."""
    cubin = tmp_path_factory.mktemp("prologues") / "prologues.cubin"
    nvcc(cubin, "-O3", "-arch=sm_90a", "-cubin", Path(__file__).with_name("prologues.cu"))
    found: dict[tuple[str, int], int] = {}
    for name, code in machine_code.functions(machine_code.dump(cubin, "-sass")).items():
        where = "in_registers" if "in_registers" in name else "in_shared_memory"
        which = next(i for i in range(3) if f"ILi{i}E" in name)
        found[where, which] = sum(not each.startswith(("NOP", "BRA", "EXIT")) for each in code)
    return {(where, which): (n - found[where, 0]) / VALUES for (where, which), n in found.items() if which}


@pytest.mark.parametrize(("which", "charged"), [(1, boundaries.ACTIVATE), (2, boundaries.BN_BACKWARD)])
def test_the_rule_charges_what_the_code_has(counts: dict[tuple[str, int], float], which: int, charged: int) -> None:
    """The more of the two ways; another nvcc may need one instruction more or less."""
    assert abs(max(counts["in_registers", which], counts["in_shared_memory", which]) - charged) < 1
