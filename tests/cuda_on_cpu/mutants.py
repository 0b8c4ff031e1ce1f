"""How much the tests notice: changes the CUDA kernels in one place at a time and counts what makes a test fail.

    python tests/cuda_on_cpu/mutants.py [FILE.cuh ...] [--match TEXT] [--sample N] [--seed S] [--jobs J]

A change is a sign, a bound, a stride, an index, a constant, a condition or a barrier of a kernel file. For each one the
test programs that include the file are built and run on the CPU: plainly, and where that notices nothing, for races and
for accesses out of bounds. What survives is listed; `survivors.toml` says of which that it changes no result.
Exits with 1 if any other survives.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from host_programs import HERE, MODES, ROOT, compiler, includes, run

CUDA = ROOT / "csrc" / "cuda"
COMMON = ROOT / "csrc" / "common"
EXPLAINED = HERE / "survivors.toml"
CPU_SECONDS = 40  # of a test program: a change may make a loop endless
# Plain programs are compiled for speed of compilation; the others as in the tests.
STEPS = (("plain", ["-O0", "-DONE_STORAGE_TYPE"]), ("thread", ["-O1"]), ("address", ["-O1"]))

# (what is changed, into what). A change of a comparison moves a bound by one; of a product, a stride.
CHANGES: tuple[tuple[str, str], ...] = (
    (r" \+ (?!=)", " - "),
    (r" - (?!=)", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" % ", " / "),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" \+= ", " -= "),
    (r" -= ", " += "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"),
    (r"(?<![\w.])0(?![\w.])", "1"),
    (r"(?<![\w.])([1-9]\d*)(?![\w.])", r"(\1 + 1)"),
    (r"(?<![\w.])([1-9]\d*)(?![\w.])", r"(\1 - 1)"),
    (r"(?<=[(= ])-(?=[a-z(])", ""),
    (r"__sync(threads|warp)\(\);", ";"),
)  # fmt: skip

# Lines without arithmetic of their own: declarations of templates, constants that choose sizes (and so speed alone, or
# what doesn't compile), shapes that are asserted.
SKIPPED = re.compile(
    r"^\s*(//|#|template\b|static_assert\b|constexpr int k\w+ =|static constexpr int k\w+ =|namespace\b|using\b)"
)


@dataclass(frozen=True)
class Mutant:
    """One change: `line` (from 1) of `path` becomes `after`."""

    path: Path
    line: int
    before: str
    after: str

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
        for pattern, replacement in CHANGES:
            for found in re.finditer(pattern, line[:end]):
                after = line[: found.start()] + found.expand(replacement) + line[found.end() :]
                yield Mutant(path, number, line, after)


def programs_of(path: Path, pattern: str = "*_tests.cpp") -> list[str]:
    """The test programs that include a kernel file, by name: those that run all their cases by themselves."""
    gxx = compiler()
    assert gxx is not None, "g++ runs CUDA kernels on the CPU, and it is not here"
    found = []
    for source in sorted(HERE.glob(pattern)):
        listed = subprocess.run(
            [gxx, "-std=c++17", "-MM", *includes(), str(source)], capture_output=True, text=True, check=True
        )
        if path.name in {Path(name).name for name in listed.stdout.split()}:
            found.append(source.stem)
    return found


def verdict(mutant: Mutant, programs: Sequence[str]) -> str | None:
    """What noticed the change ("compiler", "plain", "thread" or "address"), or None."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for folder in (CUDA, COMMON, HERE):
            shutil.copytree(folder, tree / folder.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"))
        changed = tree / mutant.path.relative_to(ROOT)
        lines = changed.read_text().splitlines()
        assert lines[mutant.line - 1] == mutant.before
        lines[mutant.line - 1] = mutant.after
        changed.write_text("\n".join(lines) + "\n")
        for mode, options in STEPS:
            for program in programs:
                if (seen := _notices(tree, program, mode, options)) is not None:
                    return seen
    return None


def _notices(tree: Path, program: str, mode: str, options: Sequence[str]) -> str | None:
    gxx = compiler()
    assert gxx is not None
    target = tree / f"{program}-{mode}"
    source = tree / HERE.relative_to(ROOT) / f"{program}.cpp"
    command = [gxx, "-std=c++17", "-w", *options, *MODES[mode], *includes(tree), str(source), "-o", str(target)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return "compiler"
    limited = ["-c", f'ulimit -t {CPU_SECONDS} && exec "$0" --stop', str(target)]
    code, _ = run(Path("/bin/sh"), *limited, timeout_s=100 * CPU_SECONDS)
    return mode if code != 0 else None


def explanations(path: Path = EXPLAINED) -> dict[tuple[str, str, str], str]:
    """(file, code before, code after) -> why it changes no result."""
    entries = tomllib.loads(path.read_text()).get("survivor", []) if path.exists() else []
    return {(entry["file"], entry["before"], entry["after"]): entry["why"] for entry in entries}


def key(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.path.name, mutant.before.strip(), mutant.after.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE.cuh", help="kernel files (default: all that a program tests)")
    parser.add_argument("--match", default="", help="only changes whose description contains this text")
    parser.add_argument("--sample", type=int, help="that many changes, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="changes at a time (default: %(default)s)")
    args = parser.parse_args(arguments)

    paths = [path for path in sorted(CUDA.glob("*.cuh")) if not args.files or path.name in args.files]
    tested = {path: programs_of(path) for path in paths}
    for path in (path for path, programs in tested.items() if not programs):
        print(f"{path.name}: left out, no program that runs all its cases by itself includes it")
    found = [mutant for path, programs in tested.items() if programs for mutant in mutants_of(path)]
    found = [mutant for mutant in found if args.match in str(mutant)]
    drawn = random.Random(args.seed).sample(found, min(args.sample or len(found), len(found)))
    print(f"{len(drawn)} of {len(found)} changes of {sum(map(bool, tested.values()))} files", flush=True)

    why = explanations()
    seen: Counter[str] = Counter()
    survivors: list[Mutant] = []
    began = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        verdicts = pool.map(lambda mutant: verdict(mutant, tested[mutant.path]), drawn)
        for number, (mutant, noticed) in enumerate(zip(drawn, verdicts, strict=True), 1):
            seen[noticed or "nothing"] += 1
            if noticed is None:
                survivors.append(mutant)
            print(f"[{number}] {f'caught ({noticed})' if noticed else 'SURVIVES'}  {mutant}", flush=True)
    unexplained = [mutant for mutant in survivors if key(mutant) not in why]
    if not drawn:
        return 0
    caught = len(drawn) - len(survivors)
    counts = ", ".join(f"{name} {count}" for name, count in seen.most_common())
    print(
        f"\n{caught} of {len(drawn)} caught ({caught / len(drawn):.1%}) in {time.monotonic() - began:.0f} s: {counts}"
    )
    print(f"{len(survivors) - len(unexplained)} survivors change no result, {len(unexplained)} are not explained")
    for mutant in survivors:
        print(f"  {mutant}\n      {why.get(key(mutant), 'NOT EXPLAINED')}")
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
