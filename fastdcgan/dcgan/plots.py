"""Plots of a run, drawn without a display."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fastdcgan.dcgan.files import write
from fastdcgan.dcgan.metrics import read_metrics


def plot_losses(csv_path: Path, path: Path) -> None:
    """Losses, and D's mean probabilities for real and generated images, over the steps of a metrics.csv -> PNG."""
    rows = read_metrics(csv_path)
    steps = [row["step"] for row in rows]
    figure, (losses, probabilities) = two_rows()
    for key, label in (("loss_d", "discriminator"), ("loss_g", "generator")):
        losses.plot(steps, [row[key] for row in rows], label=label, linewidth=1)
    for key, label in (("d_real", "D(x)"), ("d_fake", "D(G(z))")):
        probabilities.plot(steps, [row[key] for row in rows], label=label, linewidth=1)
    losses.set_ylabel("loss")
    probabilities.set_ylabel("mean probability of real")
    probabilities.set_ylim(0, 1)
    probabilities.set_xlabel("step")
    save(figure, path)


def two_rows() -> tuple[Any, Any]:
    """A matplotlib figure, and its two axes one above the other over the same steps."""
    # Here, because it takes long to load and most users of this package never plot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(2, 1, sharex=True)


def save(figure: Any, path: Path) -> None:
    """The figure as a PNG, with a grid and a legend in each of its axes."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write(path, content.getvalue())
