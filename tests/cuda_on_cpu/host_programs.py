"""Compiles C++ programs that run CUDA kernels on the CPU, and runs them.

A program is built once for each mode and kept in `build/cuda_on_cpu`; it is compiled again when the command or a file
that it includes has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_on_cpu"

# What is watched: the results and the shim's own checks, accesses out of bounds, data races.
MODES: dict[str, list[str]] = {
    "plain": [],
    "address": ["-fsanitize=address,bounds,signed-integer-overflow,shift", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
RUN = {
    "ASAN_OPTIONS": "detect_leaks=0",  # after an error a block's stacks stay as they are, with what they allocated
    "TSAN_OPTIONS": "atexit_sleep_ms=0",  # it waits a second for other threads' races, and here are none
}


def compiler() -> str | None:
    """The path of g++, or None. Others have no thread sanitizer that knows fibers, or other built-in functions."""
    return shutil.which("g++")


needs_compiler = pytest.mark.skipif(compiler() is None, reason="g++ runs CUDA kernels on the CPU, and it is not here")


def includes(root: Path = ROOT) -> list[str]:
    return [f"-I{root / folder}" for folder in ("tests/cuda_on_cpu/shim", "csrc")]


def _digest(command: list[str], dependencies: Path) -> str:
    """Of the command and of all files that the last compilation read; "" if one of them is gone."""
    found = hashlib.sha256(repr(command).encode())
    names = re.sub(r"\\\n", " ", dependencies.read_text()).split(":", 1)[1].split()
    for name in names:
        if not (path := ROOT / name).exists():
            return ""
        found.update(path.read_bytes())
    return found.hexdigest()


def build(name: str, mode: str = "plain") -> Path:
    """The program of `name`.cpp in this folder, compiled in `mode`."""
    return compiled(BUILD / f"{name}-{mode}", [str(HERE / f"{name}.cpp")], [*FLAGS, *MODES[mode], *includes()])


def compiled(
    target: Path, sources: list[str], flags: list[str], linked: list[str] | None = None, by: str | None = None
) -> Path:
    """`target`, made from `sources` by one call of g++, or of the compiler `by`, where it isn't up to date; fails with
    what that printed.

    Another process that wants it meanwhile waits, and finds it made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _compiled(target, sources, [by or str(compiler()), *flags, *sources, *(linked or [])])


def _compiled(target: Path, sources: list[str], command: list[str]) -> Path:
    dependencies, digest = target.with_suffix(".d"), target.with_suffix(".sha256")
    known = target.exists() and dependencies.exists() and digest.exists()
    if known and digest.read_text() == _digest(command, dependencies):
        return target
    # Of another name until it is whole: a process that runs the old one may go on.
    partial = target.with_suffix(".partial")
    done = subprocess.run(
        [*command, "-MD", "-MF", str(partial) + ".d", "-o", str(partial)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, f"{target.name} doesn't compile:\n{done.stderr}"
    if (included := Path(f"{partial}.d")).exists():
        included.replace(dependencies)
    else:  # nothing was compiled, only linked
        dependencies.write_text(f"{target}: {' '.join(sources)}")
    partial.replace(target)
    digest.write_text(_digest(command, dependencies))
    return target


def run(program: Path, *arguments: str, timeout_s: float = 300, **environment: str) -> tuple[int, str]:
    """(exit code, everything it printed)."""
    done = subprocess.run(
        [str(program), *arguments],
        env=os.environ | RUN | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
    )
    return done.returncode, done.stdout


def assert_passes(name: str, mode: str, *arguments: str) -> None:
    """Fail with everything that `name`, compiled in `mode`, prints, unless it exits with 0."""
    code, output = run(build(name, mode), *arguments)
    assert code == 0, f"{name} ({mode}) exited with {code}:\n{output}"
