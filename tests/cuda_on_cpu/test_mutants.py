"""The mutation run itself: what it changes, and that it tells what is noticed from what is not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu import host_programs, mutant_programs, mutants
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.cuda_on_cpu.mutant_programs import Program, Switched

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


def test_lines_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cuh"
    path.write_text(KERNEL)
    last = list(mutants.mutants_of(path))[-1]
    assert (last.line, last.before.strip()) == (6, "__syncthreads();")


@needs_compiler
def test_every_kernel_file_has_a_program() -> None:
    paths = sorted(mutants.CUDA.rglob("*.cuh"))
    assert paths and all(mutants.programs_of(paths).values())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for kernels, and one for their only program, small_tests.cpp."""
    for module, name, value in (
        (mutants, "CUDA", tmp_path / "cuda"),
        (mutants, "PROGRAMS", (SMALL,)),
        (mutant_programs, "CUDA", tmp_path / "cuda"),
        (mutant_programs, "HERE", tmp_path / "programs"),
        (mutant_programs, "BUILD", tmp_path / "build"),
        (mutant_programs, "includes", lambda: [f"-I{tmp_path}"]),
    ):
        monkeypatch.setattr(module, name, value)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "programs").mkdir()
    return tmp_path


SMALL = Program("small_tests", modes=("plain",))


def run_all(folder: Path, kernel: str, program: str) -> mutants.MutationRun:
    path = folder / "cuda" / "kernel.cuh"
    path.write_text("#pragma once\n" + kernel)
    (folder / "programs" / "small_tests.cpp").write_text('#include "cuda/kernel.cuh"\n' + program)
    assert mutants.programs_of([path]) == mutants.programs_of([path], {"small_tests"}) == {path: [SMALL]}
    assert mutants.programs_of([path], {"others"}) == {path: []}
    done = mutants.MutationRun(list(mutants.mutants_of(path)), {path: [SMALL]}, folder=folder / "build")
    done.run(1, lambda text: None)
    return done


@needs_compiler
def test_what_survives_is_told_from_what_is_noticed(project: Path) -> None:
    kernel = """
inline int sum(int a, int b) { return a + b; }
inline int unused() { return 7; }
template <int n>
inline int times(int a) { return a * n; }
inline int twice(int a) { return times<2>(a); }
inline void endless(int n) { for (volatile int i = n; i != 0; i -= 1) {} }
"""
    program = "int main() { endless(3); if (sum(2, 3) != 5 || twice(4) != 8) return 1; mutant::report(0, 1); }"
    done = run_all(project, kernel, program)
    verdicts = {m.after.split("{ ", 1)[1]: done.noticed.get(m) for m in done.mutants}
    assert verdicts == {
        "return a - b; }": "plain",
        "return (7 + 1); }": None,
        "return (7 - 1); }": None,
        "return a + n; }": "plain",
        "return times<(2 + 1)>(a); }": "plain",
        "return times<(2 - 1)>(a); }": "plain",
        "for (volatile int i = n; i == 0; i -= 1) {} }": None,
        "for (volatile int i = n; i != 0; i += 1) {} }": "plain",
        "for (volatile int i = n; i != 1; i -= 1) {} }": None,
        "for (volatile int i = n; i != 0; i -= (1 + 1)) {} }": "plain",
        "for (volatile int i = n; i != 0; i -= (1 - 1)) {} }": "plain",
    }
    assert {m.after for m in done.mutants if not done.reached(m)} == {
        "inline int unused() { return (7 + 1); }", "inline int unused() { return (7 - 1); }"
    }  # fmt: skip


INTRODUCTION = """#include <cstdio>
#include <iterator>
inline void __syncthreads() { std::printf("barrier "); }
"""
FORMS = """inline long forms(int a, unsigned b, const char* c, float d) {
  bool flag = true, other = false;
  long all = a + b * 10;
  all += c[1] - d / 4;
  if (a < 3) all -= b % 5;
  if (a <= 3) all += a >= 3;
  if ((b > 7u) == flag) all += a != 3 ? -a : 100;
  const char* e = c + 7;
  e += a, e -= b - 6;
  __syncthreads();
  return all * 1000 + std::distance(c, e) + !other;
}
"""
PRINT = """
template <class F>
void print(F forms) {
  for (int a = 2; a < 5; ++a)
    for (unsigned b = 6; b < 9; ++b) std::printf("%ld ", forms(a, b, "abcdefgh", 10.f));
  std::printf("\\n");
}
"""


@needs_compiler
def test_a_change_at_run_time_is_the_change_of_the_text(project: Path) -> None:
    """One form of each, in a program that prints what they give."""
    (project / "cuda" / "kernel.cuh").write_text("#pragma once\n" + FORMS)
    (project / "programs" / "small_tests.cpp").write_text(
        f'{INTRODUCTION}#include "cuda/kernel.cuh"\n{PRINT}int main() {{ print(forms); }}\n'
    )
    changes = list(mutants.mutants_of(project / "cuda" / "kernel.cuh"))
    switched = Switched(dict(enumerate(changes, 1)), project / "all")
    switched.leave_out_what_does_not_compile(SMALL)
    assert not switched.left_out and {m.switch for m in changes} == {*(c[2] for c in mutants.CHANGES)} - {""}
    switched.compile(SMALL, "plain", project / "program")

    # The changed texts, all in one program.
    alone = "".join(
        FORMS.replace(change.before, change.after).replace("forms(", f"forms{number}(")
        for number, change in enumerate(changes, 1)
    )
    calls = "".join(f"  print(forms{number});\n" for number in range(1, len(changes) + 1))
    (project / "alone.cpp").write_text(f"{INTRODUCTION}{alone}{PRINT}int main() {{\n{calls}}}\n")
    compiler = str(host_programs.compiler())
    subprocess.run([compiler, "-std=c++17", "-w", project / "alone.cpp", "-o", project / "alone"], check=True)
    expected = subprocess.run([project / "alone"], capture_output=True, text=True, check=True).stdout.splitlines()

    def printed(number: int) -> str:
        environment = {"MUTANT": str(number)}
        return subprocess.run([project / "program"], env=environment, capture_output=True, text=True, check=True).stdout

    right = printed(0)
    for number, (change, wanted) in enumerate(zip(changes, expected, strict=True), 1):
        assert printed(number) == wanted + "\n" != right, str(change)
