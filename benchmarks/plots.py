"""Plots of results, drawn without a display."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from fastdcgan.benchmarks.harness import Summary
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.results import Results
from fastdcgan.benchmarks.tables import caption


def plot_steps(results: Results, floors_ms: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """A PNG: milliseconds of a training step per peer, a panel per batch size, floors (level -> ms) as lines.

    Raises ValueError if `results` has no training step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case for case in results.cases if case.suite == "step"]
    batches = sorted({case.batch for case in cases})
    if not batches:
        raise ValueError("the results have no training step to plot")
    figure = Figure(figsize=(6 * len(batches), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        # A peer that stands in several cases has the time of the first.
        times: dict[str, tuple[str, Summary]] = {}
        for case in cases:
            for row in case.rows:
                if case.batch == batch and row.ms is not None:
                    times.setdefault(f"{row.label}, {row.dtype}", (row.peer, row.ms))
        bars = sorted(times.items(), key=lambda item: item[1][1].median)
        medians = [ms.median for _, (_, ms) in bars]
        whiskers = [[ms.median - ms.q1 for _, (_, ms) in bars], [ms.q3 - ms.median for _, (_, ms) in bars]]
        colours = ["tab:orange" if peer in PEERS and PEERS[peer].fused else "tab:blue" for _, (peer, _) in bars]
        axes.barh([label for label, _ in bars], medians, xerr=whiskers, color=colours, height=0.6)
        axes.invert_yaxis()
        for (level, ms), style in zip(floors_ms.get(batch, {}).items(), ("--", "-.", ":"), strict=False):
            axes.axvline(ms, color="black", linestyle=style, linewidth=1, label=f"floor, {level}")
        if batch in floors_ms:
            axes.legend(fontsize="small")
        axes.set_xlabel("ms per training step (median, quartiles)")
        axes.set_title(f"batch {batch}")
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(textwrap.fill(caption(results), 80 * len(batches)), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
