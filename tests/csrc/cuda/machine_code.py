"""What can be read from the machine code of a kernel, as cuobjdump prints it: its instructions with their operands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

_FIRST_REGISTER = re.compile(r"[A-Z]\S* R(\d+)")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+)|gdesc)")


def dump(library: Path, *options: str) -> str:
    """What cuobjdump, which comes with Triton, prints of a library."""
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[str, list[str]]:
    """Name -> instructions without their predicates."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            instructions = found.setdefault(function[1], [])
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*?)\s*;", line):
            instructions.append(instruction[1])
    return found


def written(instruction: str) -> set[int]:
    """The numbers of the registers that an instruction writes. Stores and comparisons, which write none, have their
    first register in another place."""
    found = _FIRST_REGISTER.match(instruction)
    if found is None:
        return set()
    words = instruction.split()[0].split(".")
    count = 4 if {"128", "4"} & set(words) else 2 if {"64", "WIDE"} & set(words) else 1
    return {int(found[1]) + i for i in range(count)}


def touched_products(instructions: Sequence[str]) -> Iterator[str]:
    """Instructions between the fence of a group of products and the wait for them that write a register of the sums, or
    of a left factor in registers."""
    ends = [i for i, each in enumerate(instructions) if each.startswith("WARPGROUP.DEPBAR")]
    for fence in (i for i, each in enumerate(instructions) if each.startswith("WARPGROUP.ARRIVE")):
        group = instructions[fence : next(i for i in ends if i > fence)]
        held: set[int] = set()
        for columns, sums, left in (found.groups() for found in map(_PRODUCT.match, group) if found):
            held |= {int(sums) + i for i in range(int(columns) // 2)}
            held |= {int(left) + i for i in range(4)} if left else set()
        yield from (each for each in group if not each.startswith("HGMMA") and written(each) & held)
