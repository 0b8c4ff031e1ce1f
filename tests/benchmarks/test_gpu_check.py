"""gpu-check without a GPU: its visits and parts, and parts that go wrong."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from fastdcgan.backends import cuda_tiles
from fastdcgan.benchmarks import gpu_check, gpu_worker, peers
from fastdcgan.benchmarks.gpu_check import VISITS, Part
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.results import Results
from fastdcgan.benchmarks.suites import Contest


@contextlib.contextmanager
def made(tmp_path: Path, asked: Sequence[str], dry: bool) -> Iterator[gpu_check.Check]:
    """A check that isn't run."""
    check = gpu_check.Check(tmp_path, dry, asked)
    with contextlib.closing(check.log):
        yield check
    check.folder.cleanup()


def chosen(tmp_path: Path, *asked: str) -> dict[str, Part]:
    with made(tmp_path, asked, dry=False) as check:
        return {part.name: part for part in check.chosen}


def words(part: Part) -> list[str]:
    return [word for command in part.commands.values() for word in command]


@pytest.mark.parametrize("visit", VISITS)
def test_the_parts_of_a_visit_fit_into_its_time(visit: str, tmp_path: Path) -> None:
    seconds, names = VISITS[visit]
    parts = chosen(tmp_path, visit)
    assert tuple(parts) == names
    assert sum(part.limit_s for part in parts.values()) + gpu_check.REPORT_S <= seconds
    assert all(part.required and part.limit_s > 0 for part in parts.values())
    assert "build" not in parts


def test_all_parts_run_where_none_are_named(tmp_path: Path) -> None:
    parts = chosen(tmp_path)
    assert {name for _, names in VISITS.values() for name in names} < set(parts)
    assert next(iter(parts)) == "build"
    assert list(chosen(tmp_path, "memcheck", "second", "doctor")) == ["memcheck", *VISITS["second"][1]]


def test_an_unknown_part_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(tmp_path), "--parts", "doctor,racecheck"])
    assert ended.value.code == 2
    assert "there is no part 'racecheck': expected one of first, second, build, doctor" in capsys.readouterr().err


def test_nothing_is_built_where_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, ran in (([], True), (["--no-build"], False)):
        assert gpu_check.main(["--dry", "--parts", "build", "--out", str(tmp_path), *more]) == 0
        assert ("== build: ok" in capsys.readouterr().out) == ran


def test_what_the_parts_run(tmp_path: Path) -> None:
    parts = chosen(tmp_path)
    tiles = parts["tiles"]
    assert len(cuda_tiles.TILES) == gpu_check.TILES
    assert len(tiles.commands) == 2 * gpu_check.TILES and tiles.each_s == 20
    for number in range(gpu_check.TILES):
        for early in ("on", "off"):
            command = list(tiles.commands[f"tile {number}, early launch {early}"])
            assert command[-6:] == ["--backend", "cuda", "--early", early, "--tiles", str(number)]
    assert "memcheck" in words(parts["memcheck"]) and "triton" not in words(parts["memcheck"])
    assert parts["build"].environment == {"FASTDCGAN_BOUNDED_WAITS": "1"}
    for name, part in parts.items():
        if "pytest" in words(part):
            assert "device" in words(part) and "error:fastdcgan:RuntimeWarning" in words(part)
            assert "--collect-only" not in words(part)
        assert "--dry" not in words(part), name
    assert not any(path for path in gpu_check.CAPTURES if not (gpu_check.ROOT / path).exists())


def test_named_peers_are_there() -> None:
    for name in ("HEADLINE", "STEP", "GRAPHS", "FP32", "COMPILED", "BLOCKS", "DRY_CASE"):
        dtype, *names = getattr(gpu_check, name)
        assert dtype in peers.DTYPES and set(names) <= set(PEERS)


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    """Every part, on a CPU with tiny shapes, in an environment without what conftest.py sets."""
    environment = {name: value for name, value in os.environ.items() if name != "FASTDCGAN_AUTOTUNE"}
    command = [sys.executable, gpu_check.__file__, "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "all required parts passed" in done.stdout
    assert {path.suffix for path in tmp_path.glob("gpu-check*")} == {".json", ".log", ".png"}


def python(code: str) -> dict[str, list[str]]:
    return {"it": [sys.executable, "-c", code]}


class OddCheck(gpu_check.Check):
    """Parts that go wrong in every way, and one real one after them."""

    def parts(self) -> list[Part]:
        (several,) = python("import sys; sys.exit('second' in sys.argv)").values()
        return [
            Part("hangs", 1, python("import time; print('hanging', flush=True); time.sleep(60)")),
            Part("fails", 20, python("print('about to fail'); raise SystemExit(3)")),
            Part("absent", 20, {"it": ["/does/not/exist"]}, required=False),
            Part("several", 20, {"first": several, "second": [*several, "second"]}, each_s=10),
            Part("no time", -60, python("pass")),
            Part("environment", 60, python("import os; print(os.environ['TRITON_CACHE_DIR'])")),
            self._part("doctor", 60, "doctor"),
        ]


def test_parts_that_go_wrong_are_named_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    check = OddCheck(tmp_path, dry=True)
    assert check.run() == 1
    found = {outcome.name: (outcome.status, outcome.detail) for outcome in check.outcomes}
    assert found["hangs"] == ("out of time", "ended after its 1 s; last line: hanging")
    assert found["fails"] == ("failed", "exit code 3; last line: about to fail")
    assert found["absent"][0] == "failed"
    assert found["several"] == ("failed", "second: failed, exit code 1; last line: ")
    assert found["no time"] == ("out of time", "not started")
    assert found["environment"] == ("ok", "kept")
    assert found["doctor"][0] == found["report"][0] == "ok"
    assert "failed: hangs, fails, several, no time\n" in capsys.readouterr().out
    results = Results.read(tmp_path / "gpu-check-dry.json")
    assert results.dry
    assert [part["name"] for part in results.extra["parts"]] == list(found)[:-1]
    assert "about to fail" in (tmp_path / "gpu-check.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check-dry.json", "gpu-check.log"}


def test_what_a_part_leaves_of_its_time_the_next_may_use(tmp_path: Path) -> None:
    class Late(gpu_check.Check):
        def parts(self) -> list[Part]:
            return [Part("quick", 20, python("pass")), Part("slow", 1, python("import time; time.sleep(2)"))]

    check = Late(tmp_path, dry=True)
    assert check.run() == 0
    assert not list(tmp_path.glob("*.json"))  # nothing left results


def test_the_tree_is_the_package_and_the_first_visit_has_no_triton(tmp_path: Path) -> None:
    code = "import fastdcgan.benchmarks, fastdcgan.kernels, triton; print(fastdcgan.__file__)"
    with made(tmp_path, ["first"], dry=True) as check:
        environment = {part.name: part.environment for part in check.parts()}
        assert environment["capture"] == environment["cuda-step"] == environment["cuda-tests"]
        status, last = check._execute([sys.executable, "-c", code], 60, environment["capture"], "")
        assert status == "failed" and "this part does without Triton" in last
        status, last = check._execute([sys.executable, "-c", code], 60, environment["step-128"], "")
        assert status == "ok" and last.startswith(str(check.work))


# --- what runs in processes of its own -------------------------------------------------------------------------------

WORKER = ["--device", "cpu", "--dry"]


def test_without_a_gpu_the_doctor_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_worker.main(["--device", "cuda", "doctor", str(tmp_path / "doctor.json")]) == 1
    assert "finds no GPU" in capsys.readouterr().out


def test_a_step_is_written_before_it_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Contest, case: object) -> None:
        raise RuntimeError("the profiler has gone")

    monkeypatch.setattr(Contest, "profile", broken)
    case = ["--batch", "2", "--seconds", "0.01", "--case", "fp32", "eager-nhwc"]
    with pytest.raises(RuntimeError, match="the profiler has gone"):
        gpu_worker.main([*WORKER, "step", str(tmp_path / "step.json"), *case])
    ((row,),) = [case.rows for case in Results.read(tmp_path / "step.json").cases]
    assert row.ms is not None
