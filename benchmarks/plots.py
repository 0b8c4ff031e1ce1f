"""Plots of results, drawn without a display."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdcgan.benchmarks.harness import Summary
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.results import Results
from fastdcgan.benchmarks.tables import FLOOR_NET, caption
from fastdcgan.dcgan.files import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Both colours are readable on white, which is the plot's ground in a dark page too.
_OURS, _OTHERS = "tab:orange", "tab:blue"


def plot_steps(results: Results, floors_ms: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """A PNG: milliseconds per peer of every training step and every generation, a panel for each net and batch size;
    the floors of the DCGAN that gpu-check trains (batch -> level -> ms) as lines.

    Raises ValueError if `results` has neither.
    """
    cases = [case for case in results.cases if case.suite in ("step", "generate")]
    panels = list(dict.fromkeys((case.suite, case.name, case.batch) for case in cases))
    if not panels:
        raise ValueError("the results have no training step and no generation to plot")
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = _figure(5.5 * across, 0.8 + 2.9 * down)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (suite, name, batch) in zip(grid, panels, strict=False):
        # A peer that stands in several cases has the time of the first.
        times: dict[str, tuple[str, Summary]] = {}
        for case in cases:
            for row in case.rows:
                if (case.suite, case.name, case.batch) == (suite, name, batch) and row.ms is not None:
                    times.setdefault(f"{row.label}, {row.dtype}", (row.peer, row.ms))
        bars = sorted(times.items(), key=lambda item: item[1][1].median)
        medians = [ms.median for _, (_, ms) in bars]
        whiskers = [[ms.median - ms.q1 for _, (_, ms) in bars], [ms.q3 - ms.median for _, (_, ms) in bars]]
        colours = [_OURS if peer in PEERS and PEERS[peer].fused else _OTHERS for _, (peer, _) in bars]
        axes.barh([label for label, _ in bars], medians, xerr=whiskers, color=colours, height=0.6)
        axes.invert_yaxis()
        floors = floors_ms.get(batch, {}) if (suite, name) == ("step", FLOOR_NET) else {}
        for (level, ms), style in zip(floors.items(), ("--", "-.", ":"), strict=False):
            axes.axvline(ms, color="black", linestyle=style, linewidth=1, label=f"floor, {level}")
        if floors:
            axes.legend(fontsize="small")
        axes.set_xlabel(f"ms per {'training step' if suite == 'step' else 'batch'} (median, quartiles)")
        axes.set_title(f"{'' if suite == 'step' else 'generation, '}{name}, batch {batch}")
        axes.grid(axis="x", alpha=0.3)
    _save(figure, textwrap.fill(caption(results), 80 * across), path)


def plot_census(results: Results, gains: Sequence[tuple[str, str, float]], least: float, path: Path) -> None:
    """A PNG: how many times faster networks are fused, the best on top by the median of their rows, with lines at 1 and
    at `least`.

    Args:
        results: says where it was measured.
        gains: (network, dtype, plain over fused) of each row.
        least: what no row should be under.
    """
    of: dict[str, list[float]] = {}
    for name, _, value in gains:
        of.setdefault(name, []).append(value)
    names = sorted(of, key=lambda name: statistics.median(of[name]))
    figure = _figure(8, 1.5 + 0.2 * len(names))
    axes = figure.subplots()
    for dtype, colour in (("fp32", _OTHERS), ("bf16", _OURS)):
        points = [(value, names.index(name)) for name, kind, value in gains if kind == dtype]
        if points:
            axes.scatter([x for x, _ in points], [y for _, y in points], s=14, alpha=0.7, color=colour, label=dtype)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    for at, style in ((least, ":"), (1.0, "-")):
        axes.axvline(at, color="black", linestyle=style, linewidth=1, label=f"{at:g}")
    axes.set_xlabel("plain over fused, a point for each row")
    axes.margins(y=0.01)
    axes.grid(axis="both", alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    _save(figure, textwrap.fill(caption(results), 100), path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write(path, content.getvalue())
