"""gpu-check without a GPU: its parts, and parts that go wrong."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from fastdcgan.benchmarks import gpu_check, peers
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.results import Results


def _parts(tmp_path: Path, dry: bool) -> dict[str, gpu_check.Part]:
    check = gpu_check.Check(tmp_path, dry)
    with contextlib.closing(check.log):
        return {part.name: part for part in check.parts()}


def test_gpu_check_has_its_parts(tmp_path):
    timed = [f"{kind}-{batch}" for kind in ("step", "compiled") for batch in (32, 128, 1024)]
    timed += [f"contractions-{batch}" for batch in (128, 1024)]
    found = _parts(tmp_path, dry=False)
    single = {"build", "environment", "ceilings", "bandwidth", "tests", "memcheck", "racecheck", "blocks"}
    assert set(found) == {*single, *timed}
    assert not any(found[name].required for name in timed if not name.startswith("step"))
    assert all(found[name].required for name in ("build", "environment", "ceilings", "tests", "step-128"))
    assert found["tests"].environment["FASTDCGAN_TEST_DEVICE"] == "cuda"
    command = found["step-1024"].command()
    assert command[command.index("--device") + 1] == "cuda"
    assert "--dry" not in command


@pytest.mark.parametrize("dry", [False, True])
def test_gpu_check_runs_the_tests_that_are_marked_for_the_device(tmp_path, dry):
    command = _parts(tmp_path, dry)["tests"].command()
    assert command[-3:] == ["-m", "device", str(gpu_check.ROOT / "tests")]
    assert ("--collect-only" in command) == dry


def test_gpu_check_names_only_peers_that_are_there():
    for cases in (gpu_check.EAGER, gpu_check.COMPILED, gpu_check.BLOCKS, gpu_check.DRY_EAGER, gpu_check.DRY_COMPILED):
        for dtype, *names in cases:
            assert dtype in peers.DTYPES
            assert set(names) <= set(PEERS)


def test_dry_run_has_the_same_kinds_of_parts(tmp_path):
    kinds = [{name.split("-")[0] for name in _parts(tmp_path, dry)} for dry in (True, False)]
    assert kinds[0] == kinds[1]
    dry = _parts(tmp_path, dry=True)
    assert "--dry-run" in dry["build"].command()
    assert dry["tests"].environment["FASTDCGAN_TEST_DEVICE"] == "cpu"


def test_sanitizer_is_skipped_with_a_reason_where_there_is_nothing_to_check(tmp_path):
    command = _parts(tmp_path, dry=False)["memcheck"].command()
    assert isinstance(command, str)
    assert "no backend with GPU kernels" in command


class OddCheck(gpu_check.Check):
    """Parts that go wrong in every way, and one real one after them."""

    def parts(self):
        def python(code):
            return lambda: [sys.executable, "-c", code]

        return [
            gpu_check.Part("fails", 20, python("print('about to fail'); raise SystemExit(3)")),
            gpu_check.Part("hangs", 1, python("import time; print('hanging', flush=True); time.sleep(60)")),
            gpu_check.Part("absent", 20, lambda: ["/does/not/exist"], required=False),
            gpu_check.Part("pointless", 20, lambda: "there is no need"),
            gpu_check.Part("environment", 60, lambda: self._worker("environment", self._file("environment"))),
        ]


def test_gpu_check_goes_on_after_parts_that_go_wrong(tmp_path, capsys):
    check = OddCheck(tmp_path, dry=True)
    assert check.run() == 1
    by_name = {outcome.name: outcome for outcome in check.outcomes}
    assert [by_name[name].status for name in ("fails", "hangs", "absent", "pointless", "environment", "report")] == [
        "failed",
        "out of time",
        "failed",
        "skipped",
        "ok",
        "ok",
    ]
    assert by_name["fails"].detail == "exit code 3; last line: about to fail"
    assert by_name["hangs"].seconds < 15
    assert "failed: fails, hangs\n" in capsys.readouterr().out
    found = Results.read(tmp_path / "gpu-check-dry.json")
    assert found.dry
    assert [part["name"] for part in found.extra["parts"]] == ["fails", "hangs", "absent", "pointless", "environment"]
    assert "about to fail" in (tmp_path / "gpu-check.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check-dry.json", "gpu-check.log"}


def test_gpu_check_stops_starting_parts_when_its_time_is_up(tmp_path):
    check = OddCheck(tmp_path, dry=True, budget_s=0.0)
    assert check.run() == 1
    assert {outcome.status for outcome in check.outcomes if outcome.name in ("fails", "environment")} == {"out of time"}
    assert not list(tmp_path.glob("*.json"))
