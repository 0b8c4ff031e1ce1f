"""Whether somebody may still ask for what a forward keeps in a variable.

A forward that gives every intermediate a name of its own keeps them all until it returns, but reads most of them once.
CPython counts references: where all of them are variables of functions that run now, and by their bytecode none of
these is read any more before it is written to, nobody asks for it again.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

COUNTS_ALL = sys.version_info < (3, 14)  # from then on what an expression has loaded isn't counted while it waits

_MOST_PLACES = 4096
# Whether a variable may be read after an instruction of a function. Who keeps its code keeps the code's id.
_read: dict[tuple[int, int, str], tuple[CodeType, bool]] = {}
_SHOW_VARIABLES = {"locals", "vars", "dir", "eval", "exec", "f_locals"}
_NEVER_GO_ON = {"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD"}


def is_dead(reference: Callable[[], Any], outermost: int) -> bool:
    """Whether what a weak reference gives is only in variables that are read no more: of the functions that run now,
    up to the frame with the id `outermost`."""
    if not COUNTS_ALL or sys.gettrace() is not None:  # a debugger reads variables, and may write to all of them
        return False
    held = reference()
    others, frame = sys.getrefcount(held) - 2, inspect.currentframe()  # 2: `held` and the argument
    while others and frame is not None and id(frame) != outermost:
        for name in _variables(frame, held):
            if _is_read(frame.f_code, frame.f_lasti, name):
                return False
            others -= 1
        frame = frame.f_back
    return not others


def _variables(frame: FrameType, held: Any) -> list[str]:
    """Those of a function, if it is somebody's own, that are `held`."""
    code = frame.f_code
    if str(frame.f_globals.get("__name__")).startswith(("torch.", "fastdcgan.engine.")):
        return []
    if not code.co_flags & inspect.CO_OPTIMIZED or not _SHOW_VARIABLES.isdisjoint(code.co_names):
        return []
    found = frame.f_locals
    names = [name for name, value in found.items() if value is held]
    if sys.version_info < (3, 13):  # a copy, which the frame keeps and all that is in it
        found.clear()
    return names


def _is_read(code: CodeType, at: int, name: str) -> bool:
    found = _read.get((id(code), at, name))
    if found is None:
        if len(_read) >= _MOST_PLACES:
            _read.clear()
        found = _read[id(code), at, name] = (code, may_read(code, at, name))
    return found[1]


def may_read(code: CodeType, at: int, name: str) -> bool:
    """Whether a function may read a variable after the instruction at the offset `at`, before it writes to it."""
    if name in code.co_cellvars or name in code.co_freevars:
        return True
    instructions = list(dis.get_instructions(code))
    numbers = {instruction.offset: i for i, instruction in enumerate(instructions)}
    after = [i for offset, i in numbers.items() if offset > at]
    reached = after if code.co_exceptiontable else after[:1]  # what handles an exception comes behind what raises it
    seen = {len(instructions)}
    while reached:
        i = reached.pop()
        if i in seen:
            continue
        seen.add(i)
        opname, opcode, of = instructions[i].opname, instructions[i].opcode, instructions[i].argval
        names = of if isinstance(of, tuple) else (of,)  # of two instructions in one there are two
        if "FAST" in opname and name in names:
            if names[0] != name or not opname.startswith(("STORE", "DELETE")):
                return True
            continue
        if opcode in dis.hasjrel or opcode in dis.hasjabs:
            reached.append(numbers[of])
        if opname not in _NEVER_GO_ON:
            reached.append(i + 1)
    return False
