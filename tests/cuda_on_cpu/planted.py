"""Kernels with bugs planted in them, to see that the tests would notice.

All bugs are in one copy of the kernels, compiled once for each mode; MUTANT in the environment says which one is made,
by its number from 1 (`mutant_switch.h`), and 0 is the kernel as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.cuda_on_cpu.host_programs import BUILD, FLAGS, HERE, MODES, ROOT, compiled, includes, run


class Bug(NamedTuple):
    """`wrong` where kernel file `file` first has `right`: a statement, which may be followed by the beginning of a
    comment, or an expression."""

    file: str
    right: str
    wrong: str
    mode: str  # that catches it
    said: str  # about it: a regular expression


def with_bugs(right: str, wrongs: Sequence[tuple[int, str]]) -> str:
    """`right`, or what the bug that is chosen puts there."""
    code, comment, rest = right.partition("  //")
    if not code.rstrip().endswith(";"):
        for number, wrong in wrongs:
            code = f"(::mutant::is({number}) ? ({wrong}) : ({code}))"
        return code
    cases = [f"if (::mutant::is({number})) {{ {wrong} }} else " for number, wrong in wrongs]
    return "".join(cases) + f"{{ {code} }}{comment}{rest}"


def program(name: str, bugs: Sequence[Bug], mode: str) -> Path:
    """`name`.cpp of this folder on a copy of the kernels that has all of `bugs`."""
    folder = BUILD / "planted" / name
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for number, bug in enumerate(bugs, 1):
        places[bug.file, bug.right].append((number, bug.wrong))
    csrc = ROOT / "csrc"
    for path in (csrc / "cuda").rglob("*.cuh"):
        text, copy = path.read_text(), folder / path.relative_to(csrc)
        for (file, right), wrongs in places.items():
            if file == path.name:
                assert right in text, f"{file} has no {right!r} any more"
                text = text.replace(right, with_bugs(right, wrongs), 1)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
    flags = [*FLAGS, "-O0", *MODES[mode], f"-include{HERE / 'mutant_switch.h'}", f"-I{folder}", *includes()]
    return compiled(folder / f"program-{mode}", [str(HERE / f"{name}.cpp")], flags)


def assert_caught(name: str, bugs: dict[str, Bug], bug: str, case: str) -> None:
    """Fail unless `case` of program `name` passes on the kernels as they are, and is said to be wrong with `bug`."""
    mode, said = bugs[bug].mode, bugs[bug].said
    path = program(name, list(bugs.values()), mode)
    code, output = run(path, case, MUTANT="0")
    assert code == 0, f"said to be wrong where it is right:\n{output}"
    code, output = run(path, case, MUTANT=str(list(bugs).index(bug) + 1))
    assert code != 0 and re.search(said, output), f"{bug} was not caught by {mode}:\n{output}"
