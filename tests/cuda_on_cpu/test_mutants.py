"""The mutation run itself: what it changes, and that it tells what is noticed from what is not."""

from __future__ import annotations

from pathlib import Path

import mutants
import pytest
from host_programs import needs_compiler

KERNEL = """\
// a + b in a comment
constexpr int kThreads = 256;
template <class T, int N = 3>
  if (i >= row) return;  // not i > row
  out[i] = a[2 * i] + b;
  __syncthreads();
"""


def changes(text: str, folder: Path) -> set[str]:
    path = folder / "kernel.cuh"
    path.write_text(text)
    return {mutant.after.strip() for mutant in mutants.mutants_of(path)}


def test_what_is_changed(tmp_path: Path) -> None:
    assert changes(KERNEL, tmp_path) == {
        "if (i > row) return;  // not i > row",
        "out[i] = a[(2 + 1) * i] + b;",
        "out[i] = a[(2 - 1) * i] + b;",
        "out[i] = a[2 + i] + b;",
        "out[i] = a[2 * i] - b;",
        ";",
    }


def test_lines_are_numbered_and_keyed(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cuh"
    path.write_text(KERNEL)
    last = list(mutants.mutants_of(path))[-1]
    assert (last.line, last.before.strip()) == (6, "__syncthreads();")
    assert mutants.key(last) == ("kernel.cuh", "__syncthreads();", ";")


def test_explanations_are_of_changes_that_there_are() -> None:
    """None is left over from a kernel that has changed since."""
    possible = {mutants.key(mutant) for path in mutants.CUDA.glob("*.cuh") for mutant in mutants.mutants_of(path)}
    assert set(mutants.explanations()) <= possible


@needs_compiler
def test_every_kernel_file_has_a_program() -> None:
    paths = sorted(mutants.CUDA.glob("*.cuh"))
    assert paths and all(mutants.programs_of(path, "*.cpp") for path in paths)
    assert {path.name for path in paths if mutants.programs_of(path)} >= {"walk.cuh", "reduce.cuh", "norm_act.cuh"}


@needs_compiler
def test_what_survives_is_told_from_what_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of one line in place of the kernels' tests."""
    here, cuda, common = tmp_path / "tests" / "cuda_on_cpu", tmp_path / "csrc" / "cuda", tmp_path / "csrc" / "common"
    for folder in (here, cuda, common):
        folder.mkdir(parents=True)
    (cuda / "sum.cuh").write_text("inline int sum(int a, int b) { return a + b; }\ninline int unused() { return 7; }\n")
    (here / "sum_tests.cpp").write_text('#include "sum.cuh"\nint main() { return sum(2, 3) != 5; }\n')
    for name, folder in {"ROOT": tmp_path, "HERE": here, "CUDA": cuda, "COMMON": common}.items():
        monkeypatch.setattr(mutants, name, folder)
    monkeypatch.setattr(mutants, "includes", lambda root=tmp_path: [f"-I{root / 'csrc' / 'cuda'}"])
    monkeypatch.setattr(mutants, "STEPS", (("plain", ["-O0"]),))
    assert mutants.programs_of(cuda / "sum.cuh") == ["sum_tests"]
    verdicts = {str(m): mutants.verdict(m, ["sum_tests"]) for m in mutants.mutants_of(cuda / "sum.cuh")}
    assert {text.split("->")[1].split("{ ")[1]: seen for text, seen in verdicts.items()} == {
        "return a - b; }": "plain",
        "return (7 + 1); }": None,
        "return (7 - 1); }": None,
    }
