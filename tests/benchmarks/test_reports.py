"""The benchmark suite as a user has it: results files, tables, `fastdcgan bench`, gpu-check without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdcgan.benchmarks import cli, gpu_check, peers, plots, results, tables
from fastdcgan.benchmarks.harness import Summary, Timing
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.results import Case, Results, Row
from fastdcgan.benchmarks.shapes import Block, NetShape
from tests.benchmarks.broken_peers import change_fused, scale_a_weight

CPU = torch.device("cpu")
TINY = NetShape(16, ngf=8, ndf=8)
BLOCK = Block("G1", True, 8, 4, 4, "relu", True)


# --- results and tables ----------------------------------------------------------------------------------------------


def _made_up(device: str = "Imaginary", device_type: str = "cpu", created: str = "2020-01-01", **more) -> Results:
    """Results of a run that never was, for the forms of tables."""
    rows = [
        Row(
            "eager",
            "PyTorch eager, NCHW",
            "fp32",
            samples_ms=[4.0],
            ms=Summary(4.0, 3.0, 5.0),
            ratio=Summary(2, 1.9, 2.2),
        ),
        Row("compile", "torch.compile", "fp32", "failed", "InvalidCxxCompiler: no compiler\n| found"),
        Row("fused", "fastdcgan", "fp32", samples_ms=[2.0], ms=Summary(2.0, 2.0, 2.0), ratio=Summary(1, 1, 1)),
    ]
    environment = {
        "device": device,
        "device_type": device_type,
        "created": created,
        "threads": 2,
        "torch": "9.9",
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "driver": "1.2",
        "cuda": "13",
    }
    cases = [
        Case("step", "64x64", "step", 8, "fp32", "fused", rows),
        Case("blocks", "G1 8->4 4->8", "forward", 8, "fp32", "fused", rows),
    ]
    return Results("bench", environment, cases, **more)


def test_results_round_trip(tmp_path):
    before = _made_up(extra={"ceilings": {"a": 1.0}})
    before.write(tmp_path / "new" / "r.json")
    assert Results.read(tmp_path / "new" / "r.json") == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has schema None: expected 1"),
        ('{"schema": 99}', "has schema 99: expected 1"),
        ('{"schema": 1, "cases": [{"suite": "step"}]}', "is not a results file"),
        ('{"schema": 1, "cases": [], "surprise": 1}', "is not a results file"),
    ],
)
def test_what_is_no_results_file_is_rejected(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Results.read(path)


def test_environment_names_the_machine_and_versions():
    found = results.environment(CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert "available" in found["backends"].values()
    json.dumps(found)


def test_tables_show_every_peer_and_why_one_has_no_time():
    step = tables.markdown(_made_up(), "step").splitlines()
    assert len(step) == 2 + 3
    assert step[2].split(" | ")[4:7] == ["4.00", "2.00x (1.90-2.20)", "2000"]
    assert "failed: InvalidCxxCompiler: no compiler \\| found" in step[3]
    assert "reference" in step[4]
    (block,) = tables.markdown(_made_up(), "blocks").splitlines()[2:]
    assert "2.00 (fastdcgan)" in block


def test_noise_is_marked():
    assert tables.format_ratio(Summary(1.01, 0.9, 1.2)) == "1.01x (0.90-1.20) ~"


README = """before
<!-- begin:cpu -->
old
<!-- end:cpu -->
<!-- begin:gpu -->
<!-- end:gpu -->
<!-- begin:demo -->
kept
"""


def test_readme_tables_come_from_results_alone(tmp_path):
    _made_up(created="2020-01-01").write(tmp_path / "a.json")
    _made_up(created="2020-02-02").write(tmp_path / "b.json")
    _made_up("Dry", created="2020-03-03", dry=True).write(tmp_path / "c.json")
    text = tables.render(README, results.load(tmp_path), tmp_path)
    assert "old" not in text
    assert "kept" in text
    assert "Imaginary, 2 threads, torch 9.9, commit 0123456789, 2020-02-02" in text
    assert "2020-01-01" not in text
    assert "Dry" not in text
    assert f"<!-- begin:gpu -->\n\n{tables.NOT_MEASURED}\n\n<!-- end:gpu -->" in text
    assert tables.render(text, results.load(tmp_path), tmp_path) == text


def test_readme_has_a_table_per_gpu(tmp_path):
    for device in ("GPU A", "GPU B"):
        _made_up(device, "cuda").write(tmp_path / f"{device}.json")
    text = tables.measured("cuda", results.load(tmp_path), tmp_path)
    assert text.index("GPU A, driver 1.2, CUDA 13") < text.index("GPU B, driver")
    assert text.count("Training step") == text.count("Blocks") == 2


def test_headline_ranges_over_the_cases_of_the_newest_results(tmp_path):
    def steps(created, *ratios):
        found = _made_up(created=created)
        rows = found.cases[0].rows
        found.cases = [
            Case("step", "64x64", "step", n, "fp32", "fused", [replace(rows[0], ratio=Summary(r, r, r)), *rows[1:]])
            for n, r in enumerate(ratios, 1)
        ]
        return found

    text = tables.headline([steps("2020-01-01", 9.0), steps("2020-02-02", 1.25, 2.5)])
    assert "a training step is 1.25 to 2.50 times as fast" in text
    assert "Imaginary, 2 threads, torch 9.9, commit 0123456789, 2020-02-02" in text
    assert text.splitlines()[1:] == [f"- On a GPU: {tables.NOT_MEASURED}."]


def test_plots_are_linked_from_where_the_document_lies(tmp_path):
    found = _made_up(plot=tmp_path / "results" / "a.png")
    assert "![Training step](../results/a.png)" in tables.measured("cpu", [found], tmp_path / "docs")


def test_a_marker_without_end_is_an_error():
    with pytest.raises(ValueError, match="begin:gpu --> has no <!-- end:gpu -->"):
        tables.render("<!-- begin:gpu -->", [], Path())


def test_tables_command_checks_and_writes(tmp_path, capsys):
    document = tmp_path / "README.md"
    document.write_text(README)
    arguments = [str(document), "--results", str(tmp_path)]
    assert tables.main([*arguments, "--check"]) == 1
    assert document.read_text() == README
    assert "out of date" in capsys.readouterr().err
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    assert document.read_text().count(tables.NOT_MEASURED) == 2


def test_plot_is_drawn(tmp_path):
    plots.plot_steps(_made_up(), {8: {"full": 1.0}}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no training step"):
        plots.plot_steps(Results("bench", {}, []), {}, tmp_path / "q.png")


# --- fastdcgan bench -------------------------------------------------------------------------------------------------


def _bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))


QUICK = ("--quick", "--device", "cpu", "--batch", "2", "--rounds", "2")


@pytest.fixture
def tiny_plan(monkeypatch):
    timing = Timing(2, 1e-4)
    monkeypatch.setattr(cli, "_QUICK", cli.Plan(TINY, 2, timing, timing, all_blocks=False))


def test_bench_from_end_to_end(tiny_plan, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert _bench(*QUICK, "--peers", "eager", "eager-nhwc", "graph", "fused", "--json", str(file)) == 0
    found = Results.read(file)
    assert [case.name for case in found.cases if case.suite == "step"] == [
        "16x16",
        "16x16 from JPEG",
        "pix2pix 16x16",
    ]
    assert [case.batch for case in found.cases if case.suite == "generate"] == [2]
    assert {case.part for case in found.cases} == {"step", "eval", "forward", "backward"}
    for case in found.cases:
        expected = ["ok", "ok"] if "JPEG" in case.name else ["ok", "ok", "unavailable", "ok"]
        assert [row.status for row in case.rows] == expected
    shown = capsys.readouterr().out
    for text in (
        "Training step",
        "Generation",
        "Blocks",
        "PyTorch eager, NCHW",
        "needs a CUDA device",
        "~ where the spread",
    ):
        assert text in shown


def test_bench_warns_on_a_busy_machine(tiny_plan, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    assert _bench(*QUICK, "--suite", "step", "--peers", "eager") == 0
    assert "load 1000.0 on" in capsys.readouterr().err


def test_bench_fails_if_ours_is_wrong(tiny_plan, monkeypatch, capsys):
    change_fused(monkeypatch, scale_a_weight)
    assert _bench(*QUICK, "--suite", "step", "--peers", "eager", "fused") == 1
    assert "wrong: 16x16 step, batch 2, fastdcgan in fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "--batch has to be at least 1, not 0"),
        (("--rounds", "-1"), "--rounds has to be at least 1, not -1"),
    ],
)
def test_bench_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        _bench("--device", "cpu", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_on_a_missing_gpu():
    with pytest.raises(ValueError, match="finds no GPU"):
        _bench("--device", "cuda")


def test_the_documents_show_the_committed_results():
    assert tables.main(["--check"]) == 0


# --- gpu-check -------------------------------------------------------------------------------------------------------


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


def test_gpu_check_runs_the_tests_that_ask_for_the_device():
    names = {path.relative_to(gpu_check.ROOT / "tests").as_posix() for path in gpu_check.device_tests()}
    assert {"test_ops.py", "test_chain.py", "test_graphs.py", "test_optim.py"} <= names
    assert "triton/interpreter/test_contractions.py" in names
    assert not {name for name in names if name.startswith(("cpu/", "cuda_on_cpu/", "dcgan/", "test_cpu_"))}


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
