"""The programs that a mutation run builds and runs, and what they notice.

Most changes can be chosen while a program runs: all of them are written into one copy of the kernels
(`mutant_switch.h`), which is compiled once for each program, and MUTANT in the environment says which one is made. A
first run without any finds which tests reach which change, so that a change is run against these alone, the quickest
first. A change of what has to be known while compiling (template arguments, sizes of arrays) gets a program of its own.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from tests.cuda_on_cpu import contraction_lines, sm90_lines
from tests.cuda_on_cpu.host_programs import BUILD, HERE, MODES, ROOT, compiler, includes, run

CUDA = ROOT / "csrc" / "cuda"
SWITCH = HERE / "mutant_switch.h"
FLAGS = ["-std=c++17", "-Wno-narrowing", "-Werror=vla", "-DFASTDCGAN_MUTANTS", "-include", str(SWITCH)]
LEVEL = {"plain": "-O0", "thread": "-O1", "address": "-O1"}  # of a program for one change
LEAST_SECONDS = 2  # of processor time that a program may take: a change may make a loop endless
TIMES_SLOWER = 8  # than without a change it may be


class Site(Protocol):
    """Where a change is made: text between two columns of a line (from 1) of a file."""

    @property
    def path(self) -> Path: ...
    @property
    def line(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def text(self) -> str: ...  # what stands there
    @property
    def put(self) -> str: ...  # what is put there
    @property
    def switch(self) -> str: ...  # how it is put there at run time: a format with {n}, {text}, {put}; "" if it can't be
    @property
    def after(self) -> str: ...  # the line with the change


@dataclass(frozen=True)
class Program:
    """NAME.cpp of this folder with options of the compiler, and the arguments that make it run its tests."""

    name: str
    options: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    modes: tuple[str, ...] = tuple(MODES)

    @property
    def source(self) -> Path:
        return HERE / f"{self.name}.cpp"

    @property
    def label(self) -> str:
        return "".join([self.name, *self.options])


def _each_type(name: str) -> list[Program]:
    """First with few kernels, which compile soon; then with those of all types."""
    return [Program(name, ("-DONE_STORAGE_TYPE",)), Program(name, modes=("plain",))]


PROGRAMS = (
    *_each_type("elementwise_tests"),
    *_each_type("image_side_tests"),
    *_each_type("training_tests"),
    Program("contraction_watched", arguments=tuple(contraction_lines.watched())),
    Program("contraction_types", arguments=tuple(contraction_lines.brief()), modes=("plain",)),
    Program(
        "contraction_tiles",
        arguments=tuple(line for tile in range(7) for line in contraction_lines.tiles(tile)),
        modes=("plain",),
    ),
    Program("sm90_watched", arguments=tuple(sm90_lines.watched())),
    Program("sm90_types", arguments=tuple(sm90_lines.everything()), modes=("plain",)),
    Program("sm90_tiles", arguments=tuple(sm90_lines.tiles()), modes=("plain",)),
)


def dependencies(program: Program) -> list[Path]:
    """All files of the project that a program is made of."""
    gxx = compiler()
    assert gxx is not None, "g++ runs CUDA kernels on the CPU, and it is not here"
    command = [gxx, "-MM", *FLAGS, *program.options, *includes(), str(program.source)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(name).resolve() for name in listed.replace("\\\n", " ").split()[1:]]


def _compile(program: Program, mode: str, more: Sequence[str], target: Path | None) -> str:
    """ "" where it compiles, else what g++ says. `target` None: whether it would."""
    gxx = compiler()
    assert gxx is not None
    goal = ["-fsyntax-only"] if target is None else ["-o", str(target)]
    command = [gxx, *FLAGS, *program.options, *MODES[mode], *more, *includes(), str(program.source), *goal]
    done = subprocess.run(command, capture_output=True, text=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"})
    return "" if done.returncode == 0 else done.stderr or "it failed"


def _run(path: Path, program: Program, seconds: float, **environment: object) -> tuple[int, str]:
    words = " ".join(f"{name}={value}" for name, value in environment.items())
    script = f'ulimit -t {max(LEAST_SECONDS, int(seconds) + 1)} && exec env {words} "$0" "$@"'
    return run(Path("/bin/sh"), "-c", script, str(path), *program.arguments, timeout_s=3600)


def _write(folder: Path, path: Path, lines: Sequence[str]) -> None:
    """Put `lines` where an include of the kernel file `path` finds them, with `folder` among those of includes."""
    copy = folder / path.relative_to(CUDA.parent)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text("\n".join(lines) + "\n")


# --- many changes in one program ------------------------------------------------------------------------------------


@dataclass
class Switched:
    """A copy of the kernels with all changes that can be chosen at run time; `sites` by number."""

    sites: dict[int, Site]
    folder: Path
    left_out: set[int] = field(default_factory=set)

    def write(self) -> dict[tuple[str, int], list[tuple[int, int, tuple[int, ...]]]]:
        """Write it; where the changes are now: (file, line) -> (first column from 1, last, numbers)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        of_line: dict[tuple[Path, int], dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, site in self.sites.items():
            if site.switch and number not in self.left_out:
                of_line[site.path, site.line][site.start, site.end].append(number)
        where: dict[tuple[str, int], list[tuple[int, int, tuple[int, ...]]]] = {}
        for path in sorted(CUDA.rglob("*.cuh")):
            lines = path.read_text().splitlines()
            for index, line in enumerate(lines):
                places = of_line.get((path, index + 1), {})
                written, at, spans = "", 0, []
                for (start, end), numbers in sorted(places.items()):
                    text = line[start:end]
                    for number in numbers:  # several changes of a constant are one inside the other
                        text = self.sites[number].switch.format(n=number, text=text, put=self.sites[number].put)
                    written += line[at:start]
                    spans.append((len(written) + 1, len(written) + len(text), tuple(numbers)))
                    written, at = written + text, end
                lines[index] = written + line[at:]
                if spans:
                    where[path.name, index + 1] = spans
            _write(self.folder, path, lines)
        return where

    def leave_out_what_does_not_compile(self, program: Program) -> None:
        """Until the program compiles: leave out changes at the places of errors."""
        while True:
            where = self.write()
            said = _compile(program, "plain", [f"-I{self.folder}", "-fmax-errors=0"], None)
            if not said:
                return
            found: set[int] = set()
            for name, line, column in self._errors(said):
                spans = where.get((name, line), [])
                near = [numbers for first, last, numbers in spans if first - 3 <= column <= last + 3]
                for numbers in near or [numbers for *_, numbers in spans]:
                    found.update(numbers)
            assert found, f"{program.label} doesn't compile, with or without changes:\n{said[-4000:]}"
            self.left_out |= found

    def compile(self, program: Program, mode: str, target: Path) -> None:
        said = _compile(program, mode, ["-O1", f"-I{self.folder}"], target)
        assert not said, f"{program.label} doesn't compile ({mode}):\n{said[-4000:]}"

    def _errors(self, said: str) -> Iterator[tuple[str, int, int]]:
        """(file, line, column) of each error in the kernels, or of what in them made an error elsewhere."""
        pattern = re.compile(r"^(\S+?):(\d+):(\d+): +(error|required from|recursively required|in 'constexpr')", re.M)
        pending: list[tuple[str, int, int]] = []
        for found in pattern.finditer(said):
            path, place = Path(found[1]), (Path(found[1]).name, int(found[2]), int(found[3]))
            inside = self.folder in path.parents
            if found[4] != "error":
                pending += [place] if inside else []
                continue
            if inside:
                yield place
            elif pending:
                yield pending[0]
            pending = []


@dataclass
class Build:
    """A program with all changes of `switched`, and which of its tests reach which."""

    program: Program
    mode: str
    path: Path
    milliseconds: dict[int, float]
    reached: dict[int, set[int]]  # change -> tests

    @classmethod
    def of(cls, switched: Switched, program: Program, mode: str) -> Build:
        path = switched.folder / f"{program.label}-{mode}"
        switched.compile(program, mode, path)
        code, output = _run(path, program, 3600, MUTANT=0, MUTANT_REPORT=1)
        assert code == 0, f"{program.label} fails without a change ({mode}):\n{output[-4000:]}"
        build = cls(program, mode, path, {}, defaultdict(set))
        for line in re.findall(r"^reached (.*)$", output, re.M):
            test, took, *numbers = line.split()
            build.milliseconds[int(test)] = float(took)
            for number in numbers:
                build.reached[int(number)].add(int(test))
        return build

    def notices(self, number: int) -> bool:
        for tests in self._turns(number):
            seconds = TIMES_SLOWER * sum(self.milliseconds[test] for test in tests) / 1000
            chosen = {"MUTANT": number, "MUTANT_CASES": ",".join(map(str, tests))}
            if _run(self.path, self.program, seconds, **chosen)[0] != 0:
                return True
        return False

    def _turns(self, number: int) -> Iterator[list[int]]:
        """The tests that reach a change, quick ones first, in turns that grow."""
        turn: list[int] = []
        budget = 30.0
        for test in sorted(self.reached.get(number, ()), key=self.milliseconds.__getitem__):
            turn.append(test)
            if sum(self.milliseconds[t] for t in turn) > budget:
                yield turn
                turn, budget = [], budget * 8
        if turn:
            yield turn


# --- a program for one change ----------------------------------------------------------------------------------------


def build_alone(site: Site, program: Program, mode: str, folder: Path) -> Path | None:
    """A program in `folder` that has one change and no other; None where it doesn't compile."""
    lines = site.path.read_text().splitlines()
    lines[site.line - 1] = site.after
    _write(folder, site.path, lines)
    target = folder / "program"
    return None if _compile(program, mode, [LEVEL[mode], f"-I{folder}"], target) else target


def notices_alone(site: Site, program: Program, mode: str) -> str | None:
    """What notices a change in a program that has no other: "compiler", `mode`, or None."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=BUILD) as scratch:
        target = build_alone(site, program, mode, Path(scratch))
        if target is None:
            return "compiler"
        return mode if _run(target, program, 60)[0] != 0 else None
