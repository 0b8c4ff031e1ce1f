"""What a run leaves behind: results files, tables, the plot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdcgan.benchmarks import plots, results, tables
from fastdcgan.benchmarks.harness import Summary
from fastdcgan.benchmarks.results import Case, Results, Row

CPU = torch.device("cpu")


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
        "cpu_capability": "AVX2",
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


def test_a_wrong_result_does_not_lose_the_run(tmp_path):
    results = _made_up(extra={"error": math.inf})
    results.cases[0].rows[0].error = math.nan
    results.write(tmp_path / "r.json")
    found = Results.read(tmp_path / "r.json")
    assert (found.cases[0].rows[0].error, found.extra["error"]) == (None, None)


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


def test_a_processor_that_was_capped_is_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for cap in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(cap, raising=False)
    whole = results.environment(CPU)["device"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert results.environment(CPU)["device"] == f"{whole}, ONEDNN_MAX_CPU_ISA=AVX2"


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
    assert "Imaginary, AVX2, 2 threads, torch 9.9, commit 0123456789, 2020-02-02" in text
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
    def steps(created, **ratios):
        found = _made_up(created=created)
        rows = found.cases[0].rows
        found.cases = [
            Case("step", "64x64", "step", n, dtype, "fused", [replace(rows[0], ratio=Summary(r, r, r)), *rows[1:]])
            for dtype, of in ratios.items()
            for n, r in enumerate(of, 1)
        ]
        return found

    text = tables.headline([steps("2020-01-01", fp32=[9.0]), steps("2020-02-02", fp32=[1.25, 2.5], bf16=[3.0])])
    assert "a training step is 1.25 to 2.50 times (in float32) and 3.00 times (in bfloat16) as fast" in text
    assert "Imaginary, AVX2, 2 threads, torch 9.9, commit 0123456789, 2020-02-02" in text
    assert text.splitlines()[1:] == [f"- On a GPU: {tables.NOT_MEASURED}."]


def test_headline_of_one_case_has_one_figure() -> None:
    assert "a training step is 2.00 times (in float32) as fast" in tables.headline([_made_up()])


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


def test_the_documents_show_the_committed_results():
    assert tables.main(["--check"]) == 0
