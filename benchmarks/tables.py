"""Tables of results, and the documents that show them.

    python -m fastdcgan.benchmarks.tables             writes what README.md and docs/benchmarks.md show of results anew
    python -m fastdcgan.benchmarks.tables --check     exits with 1 if they don't show what the results say

What is generated stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`; the names are in `SECTIONS`. No figure
gets into a document in any other way.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from fastdcgan.benchmarks.harness import Summary, is_noisy
from fastdcgan.benchmarks.peers import DTYPES, PEERS
from fastdcgan.benchmarks.results import RESULTS, Results, Row, load

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")

NOT_MEASURED = "not measured yet"
_MOST_WITH_QUARTILES = 4  # columns of the census
FLOOR_NET = "64x64"  # the net whose floors gpu-check computes


def format_ratio(summary: Summary | None) -> str:
    """Median and quartiles; "~" where the spread is larger than the difference."""
    if summary is None:
        return "-"
    noise = " ~" if is_noisy(summary) else ""
    return f"{summary.median:.2f}x ({summary.q1:.2f}-{summary.q3:.2f}){noise}"


def format_ms(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    digits = 3 if summary.median < 1 else 2 if summary.median < 100 else 0
    return f"{summary.median:.{digits}f}"


def format_bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def reason(row: Row) -> str:
    """Why a row has no time, in a line."""
    return textwrap.shorten(f"{row.status}: {row.detail}", 160, placeholder=" ...") if row.detail else row.status


Cells = tuple[Sequence[str], list[Sequence[str]]]  # header, lines


def step_cells(results: Results, suite: str = "step") -> Cells:
    """One line per net, batch, dtype and peer."""
    header = ["net", "batch", "dtype", "peer", "ms", "time over reference's", "images/s", "saved MiB", "peak MiB"]
    on_gpu = any(row.kernels is not None for case in results.cases for row in case.rows if case.suite == suite)
    header += ["kernels", "host ms", "of the floor"] if on_gpu else []
    floors = results.extra.get("floors_ms", {})
    lines: list[Sequence[str]] = []
    for case in (case for case in results.cases if case.suite == suite):
        for row in case.rows:
            rate = f"{case.batch / row.ms.median * 1e3:.0f}" if row.ms else "-"
            over = format_ratio(row.ratio) if row.peer != case.reference else "reference"
            values = (format_ms(row.ms), over, rate) if row.ms else (reason(row), "-", "-")
            memory = (format_bytes(row.saved_bytes), format_bytes(row.peak_bytes))
            more: tuple[str, ...] = ()
            if on_gpu:
                floor = floors.get(str(case.batch), {}).get("full") if case.name == FLOOR_NET else None
                share = f"{100 * floor / row.ms.median:.0f} %" if floor and row.ms else "-"
                host = "-" if row.host_ms is None else f"{row.host_ms:.2f}"
                more = ("-" if row.kernels is None else str(row.kernels), host, share)
            lines.append((case.name, str(case.batch), case.dtype, row.label, *values, *memory, *more))
    return header, lines


def block_cells(results: Results, suite: str = "blocks") -> Cells:
    """One line per block, part and dtype: the reference's time, and every other peer's over it."""
    cases = [case for case in results.cases if case.suite == suite]
    labels = list(dict.fromkeys(row.label for case in cases for row in case.rows if row.peer != case.reference))
    lines: list[Sequence[str]] = []
    for case in cases:
        rows = {row.label: row for row in case.rows}
        reference = next(row for row in case.rows if row.peer == case.reference)
        own = format_ms(reference.ms) if reference.ms else reason(reference)
        cells = [_ratio_cell(rows.get(label), reference) for label in labels]
        lines.append((case.name, case.part, str(case.batch), case.dtype, f"{own} ({reference.label})", *cells))
    return ("block", "part", "batch", "dtype", "reference ms", *labels), lines


def _ratio_cell(row: Row | None, reference: Row) -> str:
    if row is None:
        return "-"
    if row is reference:
        return "reference"
    return format_ratio(row.ratio) if row.ratio else reason(row)


def caption(results: Results) -> str:
    """One line: where and with what it was measured."""
    e = results.environment
    parts = [str(e["device"])]
    if e["device_type"] == "cpu":
        # Processors of several generations go by one name.
        parts += [str(e["cpu_capability"]), f"{e['threads']} threads"]
    else:
        parts.append(f"driver {e['driver']}, CUDA {e['cuda']}")
    parts.append(f"torch {e['torch']}")
    if e["commit"]:
        parts.append(f"commit {e['commit'][:10]}" + (" with changes" if e["uncommitted_changes"] else ""))
    parts.append(str(e["created"])[:10])
    return "Measured on " + ", ".join(parts) + "."


NOTE = "Medians of interleaved rounds; in brackets the quartiles; ~ where the spread is larger than the difference."


def generate_cells(results: Results) -> Cells:
    """As `step_cells`, of generators in eval mode."""
    return step_cells(results, "generate")


def contraction_cells(results: Results) -> Cells:
    """As `block_cells`, of the bare contractions."""
    return block_cells(results, "contractions")


def host_cells(results: Results) -> Cells:
    """One line per net, memory format and part: microseconds of the plain modules and of ours, and their ratio."""
    lines: list[Sequence[str]] = []
    for case in (case for case in results.cases if case.suite == "host"):
        plain = next(row for row in case.rows if row.peer == case.reference)
        fused = next(row for row in case.rows if row is not plain)
        times = (f"{1e3 * row.ms.median:.0f}" if row.ms else reason(row) for row in (plain, fused))
        lines.append((case.name, case.part, str(case.batch), case.dtype, *times, format_ratio(fused.ratio)))
    return ("net", "part", "batch", "dtype", "plain modules, us", "fused, us", "fused over plain"), lines


def census_cells(results: Results) -> Cells:
    """One line per network: plain over fused in each dtype, memory format, mode and batch, without quartiles where
    these are many; and at the end the median and the lowest of all networks."""
    cases = [case for case in results.cases if case.suite == "census"]
    columns = list(dict.fromkeys((case.dtype, case.part, case.batch) for case in cases))
    gains: dict[tuple, list[float]] = {column: [] for column in columns}
    lines: list[Sequence[str]] = []
    for name in dict.fromkeys(case.name for case in cases):
        of = {(c.dtype, c.part, c.batch): c for c in cases if c.name == name}
        there, fused = results.extra["blocks"][name]
        found = [next((r for r in of[c].rows if r.peer != of[c].reference), None) if c in of else None for c in columns]
        for column, row in zip(columns, found, strict=True):
            if row is not None and row.ratio is not None:
                gains[column].append(row.ratio.median)
        cells = [_gain_cell(row, len(columns) <= _MOST_WITH_QUARTILES) for row in found]
        lines.append((name, f"{fused} of {there}", *cells))
    for what, of_all in (("median", statistics.median), ("lowest", min)) if cases else ():
        lines.append((f"**{what}**", "", *(f"**{of_all(found):.2f}x**" if found else "-" for found in gains.values())))
    return ("network", "blocks fused", *(f"{dtype}, {part}, batch {batch}" for dtype, part, batch in columns)), lines


def _gain_cell(row: Row | None, quartiles: bool) -> str:
    if row is None or row.ratio is None:
        return "-" if row is None else reason(row)
    noise = " ~" if is_noisy(row.ratio) else ""
    return format_ratio(row.ratio) if quartiles else f"{row.ratio.median:.2f}x{noise}"


CELLS: dict[str, Callable[[Results], Cells]] = {
    "step": step_cells,
    "generate": generate_cells,
    "blocks": block_cells,
    "contractions": contraction_cells,
    "host": host_cells,
    "census": census_cells,
}
TITLES = {
    "step": "Training step",
    "generate": "Generation",
    "blocks": "Blocks",
    "contractions": "Contractions alone",
    "host": "Host time of tiny nets on one thread",
    "census": "Networks as people write them, forward and backward: plain over fused",
}


def markdown(results: Results, suite: str) -> str:
    """One suite's table, or "" where nothing of it was measured."""
    header, lines = CELLS[suite](results)
    return _markdown(header, lines) if lines else ""


def measured(device_type: str, results: Sequence[Results], folder: Path) -> str:
    """Captions, tables and plots: the newest results of each device and suite, or "not measured yet".

    Plots are linked relative to `folder`, in which the document lies.
    """
    newest: dict[tuple[str, str], Results] = {}
    for r in results:
        if r.environment["device_type"] == device_type:
            newest |= {(r.environment["device"], suite): r for suite in CELLS if markdown(r, suite)}
    texts = []
    for (_, suite), r in sorted(newest.items(), key=_place):
        texts.append(f"**{TITLES[suite]}.** {caption(r)} {NOTE}\n\n{markdown(r, suite)}")
        if suite in ("step", "generate", "census") and r.plot is not None:
            texts.append(f"![{TITLES[suite]}]({os.path.relpath(r.plot.resolve(), folder.resolve())})")
    return "\n\n".join(texts) or NOT_MEASURED


def _place(item: tuple[tuple[str, str], Results]) -> tuple[str, int]:
    device, suite = item[0]
    return device, list(CELLS).index(suite)


def headline(results: Sequence[Results]) -> str:
    """Per device in a sentence: PyTorch's fastest way of a training step over ours, from the least to the most gained.

    The range in a dtype is over all nets and batch sizes of the device's newest results that have training steps.
    """
    lines = []
    for label, device_type in (("On a CPU", "cpu"), ("On a GPU", "cuda")):
        gains = {r.environment["device"]: (r, found) for r in results if (found := _gains(r, device_type))}
        lines += [
            f"- {label}, a training step is {' and '.join(itertools.starmap(_range, found.items()))} as fast as the "
            f"fastest that was measured of PyTorch, eager or compiled. {caption(r)}"
            for r, found in gains.values()
        ] or [f"- {label}: {NOT_MEASURED}."]
    return "\n".join(lines)


def _range(dtype: str, found: Sequence[float]) -> str:
    figures = " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(found), max(found))))
    return f"{figures} times (in {str(DTYPES[dtype]).removeprefix('torch.')})"


def _gains(results: Results, device_type: str) -> dict[str, list[float]]:
    """By dtype, of each case of training steps whose ratios are relative to ours: the smallest ratio of a peer of
    PyTorch's."""
    found: dict[str, list[float]] = {}
    if results.environment["device_type"] != device_type:
        return found
    for case in results.cases:
        if case.suite == "step" and PEERS[case.reference].fused:
            ratios = [row.ratio.median for row in case.rows if row.ratio and not PEERS[row.peer].fused]
            if ratios:
                found.setdefault(case.dtype, []).append(min(ratios))
    return found


SECTIONS: dict[str, Callable[[Sequence[Results], Path], str]] = {
    "headline": lambda results, folder: headline(results),
    "cpu": partial(measured, "cpu"),
    "gpu": partial(measured, "cuda"),
}


def render(text: str, results: Sequence[Results], folder: Path) -> str:
    """`text` of a document in `folder`, with all of `SECTIONS` that it has markers for made anew; other markers are
    left alone.

    Raises ValueError for a marker that begins and doesn't end.
    """
    for name, made in SECTIONS.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        if begin not in text:
            continue
        head, rest = text.split(begin, 1)
        if end not in rest:
            raise ValueError(f"{begin} has no {end} after it")
        text = f"{head}{begin}\n\n{made(results, folder)}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdcgan.benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("documents", type=Path, nargs="*", default=DOCUMENTS, help="Markdown files with markers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a document is out of date")
    args = parser.parse_args(arguments)
    results, outdated = load(args.results), False
    for document in args.documents:
        before = document.read_text()
        after = render(before, results, document.parent)
        if after == before:
            continue
        outdated = True
        if args.check:
            print(f"{document}: what it shows of results is out of date", file=sys.stderr)
        else:
            document.write_text(after)
    return int(args.check and outdated)


if __name__ == "__main__":
    sys.exit(main())
