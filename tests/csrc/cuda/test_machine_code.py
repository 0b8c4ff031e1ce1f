"""The readers of machine code, on code that is written here."""

from __future__ import annotations

import pytest

from tests.csrc.cuda import machine_code

GROUP = [
    "F2FP.BF16.F32.PACK_AB R56, R4, R5",
    "WARPGROUP.ARRIVE",
    "IMAD.MOV.U32 R9, RZ, RZ, R56",
    "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8].tnspB, R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "FADD R24, R24, R25",
]


def test_functions() -> None:
    text = """
        Function : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 FADD R0, R2, -R3 ;
        Function : second
        /*0000*/                   EXIT ;
    """
    assert machine_code.functions(text) == {"first": ["LDC R1, c[0x0][0x28]", "FADD R0, R2, -R3"], "second": ["EXIT"]}


def test_what_is_pinned_is_not_touched() -> None:
    assert not list(machine_code.touched_products(GROUP))


@pytest.mark.parametrize(
    "instruction",
    ["F2FP.BF16.F32.PACK_AB R59, R4, R5", "FADD R55, R4, R5", "IMAD.WIDE R54, R4, R5, R6", "LDSM.16.M88.4 R21, [R3]"],
)
@pytest.mark.parametrize("at", [2, 3, 4])
def test_what_touches_it_is_found(instruction: str, at: int) -> None:
    """The left factor is in R56 to R59, the sums in R24 to R55."""
    code = [*GROUP[:at], instruction, *GROUP[at:]]
    assert list(machine_code.touched_products(code)) == [instruction]
