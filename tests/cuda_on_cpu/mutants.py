"""How much the tests notice: changes the CUDA kernels in one place at a time and counts what makes a test fail.

    python -m tests.cuda_on_cpu.mutants [FILE.cuh ...] [--programs NAME ...] [--match TEXT] [--sample N] [--seed S]
                                        [--jobs J]

A change is a sign, a bound, a stride, an index, a constant, a condition or a barrier of a kernel file. For each one the
test programs that include the file run on the CPU: plainly, and where that notices nothing, for races and for accesses
out of bounds. What survives is printed: either a test is missing, or the change makes no difference to any result.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_on_cpu.host_programs import BUILD, MODES
from tests.cuda_on_cpu.mutant_programs import (
    CUDA,
    PROGRAMS,
    Build,
    Program,
    Switched,
    dependencies,
    notices_alone,
)

FOLDER = BUILD / "mutants"

# How a change is made at run time (mutant_switch.h). An operator keeps its precedence and its operands.
INFIX = "{text}::mutant::Infix<{n}>(){text}"
ASSIGNED = "{text}::mutant::Assigned<{n}>(){text}"
NEGATED = "::mutant::Negated<{n}>()->*"
CHOSEN = "(::mutant::is({n}) ? {put} : {text})"
OMITTED = "{{ if (!::mutant::is({n})) {text} }}"

# (what is changed, into what, how at run time). A change of a comparison moves a bound by one; of a product, a stride.
CHANGES: tuple[tuple[str, str, str], ...] = (
    (r" \+ (?!=)", " - ", INFIX),
    (r" - (?!=)", " + ", INFIX),
    (r" \* ", " + ", INFIX),
    (r" / ", " * ", INFIX),
    (r" % ", " / ", INFIX),
    (r" < ", " <= ", INFIX),
    (r" <= ", " < ", INFIX),
    (r" > ", " >= ", INFIX),
    (r" >= ", " > ", INFIX),
    (r" == ", " != ", INFIX),
    (r" != ", " == ", INFIX),
    (r" \+= ", " -= ", ASSIGNED),
    (r" -= ", " += ", ASSIGNED),
    (r" && ", " || ", ""),
    (r" \|\| ", " && ", ""),
    (r"\btrue\b", "false", CHOSEN),
    (r"\bfalse\b", "true", CHOSEN),
    (r"(?<![\w.])0(?![\w.])", "1", CHOSEN),
    (r"(?<![\w.])([1-9]\d*)(?![\w.])", r"(\1 + 1)", CHOSEN),
    (r"(?<![\w.])([1-9]\d*)(?![\w.])", r"(\1 - 1)", CHOSEN),
    (r"(?<=[(= ])-(?=[a-z(])", "", NEGATED),
    (r"(__sync(threads|warp)|gpu::(fence_async|wgmma_fence))\(\);", ";", OMITTED),
)  # fmt: skip

# Lines without arithmetic of their own: declarations of templates, constants that choose sizes (and so speed alone, or
# what doesn't compile), shapes that are asserted.
SKIPPED = re.compile(
    r"^\s*(//|#|template\b|static_assert\b|constexpr int k\w+ =|static constexpr int k\w+ =|namespace\b|using\b)"
)


@dataclass(frozen=True)
class Mutant:
    """One change: of `text` from column `start` on of `line` (from 1) of `path` into `put`."""

    path: Path
    line: int
    start: int
    end: int
    put: str
    switch: str
    before: str  # the line

    @property
    def text(self) -> str:
        return self.before[self.start : self.end]

    @property
    def after(self) -> str:
        return self.before[: self.start] + self.put + self.before[self.end :]

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}: {self.before.strip()}  ->  {self.after.strip()}"


def code_length(line: str) -> int:
    """Up to where a line is code: what follows is a comment."""
    at = line.find("//")
    return len(line) if at < 0 else at


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All changes of a file, line by line."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if SKIPPED.match(line):
            continue
        end = code_length(line)
        for pattern, replacement, switch in CHANGES:
            for found in re.finditer(pattern, line[:end]):
                yield Mutant(path, number, found.start(), found.end(), found.expand(replacement), switch, line)


def programs_of(paths: Sequence[Path], names: Container[str] | None = None) -> dict[Path, list[Program]]:
    """The test programs that include each kernel file; of these `names`, or all."""
    files = {program: set(dependencies(program)) for program in PROGRAMS if names is None or program.name in names}
    return {path: [program for program in files if path.resolve() in files[program]] for path in paths}


class MutationRun:
    """Finds what notices the changes `mutants` of kernel files, whose programs are `tested`."""

    def __init__(
        self,
        mutants: Sequence[Mutant],
        tested: dict[Path, list[Program]],
        folder: Path = FOLDER,
    ) -> None:
        self.mutants = mutants
        self.noticed: dict[Mutant, str] = {}
        self._tested = tested
        self._numbers = {mutant: number for number, mutant in enumerate(mutants, 1)}
        self._switched = Switched(dict(enumerate(mutants, 1)), folder)
        self._builds: dict[tuple[Program, str], Build] = {}

    def run(self, jobs: int, say: Callable[[str], None]) -> None:
        used = [program for program in PROGRAMS if any(program in programs for programs in self._tested.values())]
        for program in used:
            self._switched.leave_out_what_does_not_compile(program)
        switched = sum(self.switches(mutant) for mutant in self.mutants)
        say(f"{switched} are chosen at run time, {len(self.mutants) - switched} compiled one by one")
        with ThreadPoolExecutor(jobs) as pool:
            for mode in MODES:
                for program in used:
                    if mode in program.modes:
                        self._step(program, mode, pool, say)

    def switches(self, mutant: Mutant) -> bool:
        """Whether a change is chosen at run time, and not compiled alone."""
        return bool(mutant.switch) and self._numbers[mutant] not in self._switched.left_out

    def _step(self, program: Program, mode: str, pool: ThreadPoolExecutor, say: Callable[[str], None]) -> None:
        left = [m for m in self.mutants if m not in self.noticed and program in self._tested[m.path]]
        if any(map(self.switches, left)):
            self._builds[program, mode] = Build.of(self._switched, program, mode)
        began = time.monotonic()
        found = 0
        for mutant, noticed in zip(left, pool.map(lambda m: self._verdict(m, program, mode), left), strict=True):
            if noticed is not None:
                self.noticed[mutant] = noticed
                found += 1
                say(f"caught ({noticed})  {mutant}")
        say(f"-- {program.label}, {mode}: {found} of {len(left)} in {time.monotonic() - began:.0f} s")

    def _verdict(self, mutant: Mutant, program: Program, mode: str) -> str | None:
        if not self.switches(mutant):
            return notices_alone(mutant, program, mode)
        return mode if self._builds[program, mode].notices(self._numbers[mutant]) else None

    def reached(self, mutant: Mutant) -> bool:
        """Whether any test comes to the place of a change, as far as is known."""
        builds = [build for (program, _), build in self._builds.items() if program in self._tested[mutant.path]]
        if not builds or not self.switches(mutant):
            return True
        return any(build.reached.get(self._numbers[mutant]) for build in builds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE.cuh", help="kernel files (default: all that a program tests)")
    parser.add_argument("--programs", nargs="+", metavar="NAME", help="test programs to run (default: all)")
    parser.add_argument("--match", default="", help="only changes whose description contains this text")
    parser.add_argument("--sample", type=int, help="that many changes, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="changes at a time (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print what is caught too")
    args = parser.parse_args(arguments)

    paths = [path for path in sorted(CUDA.rglob("*.cuh")) if not args.files or path.name in args.files]
    tested = programs_of(paths, args.programs)
    found = [mutant for path in paths for mutant in mutants_of(path) if args.match in str(mutant)]
    drawn = random.Random(args.seed).sample(found, min(args.sample or len(found), len(found)))
    print(f"{len(drawn)} of {len(found)} changes of {len(paths)} files", flush=True)
    if not drawn:
        return 0

    def say(text: str) -> None:
        if args.verbose or not text.startswith("caught"):
            print(text, flush=True)

    began = time.monotonic()
    everything = MutationRun(drawn, tested)
    everything.run(args.jobs, say)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant in drawn:
        for name in (mutant.path.name, "all"):
            counts[name][everything.noticed.get(mutant, "nothing")] += 1
    print(f"\nin {time.monotonic() - began:.0f} s; survivors:")
    for mutant in drawn:
        if mutant not in everything.noticed:
            print(f"  {mutant}" + ("" if everything.reached(mutant) else " (no test reaches it)"))
    columns = ["compiler", *MODES, "nothing"]
    print("\n| file | changes | caught by " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for name, count in counts.items():
        print(f"| {name} | {count.total()} | " + " | ".join(str(count[column]) for column in columns) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
