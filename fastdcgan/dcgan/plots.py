"""Plots of a run, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdcgan.dcgan.files import replacing
from fastdcgan.dcgan.metrics import read_metrics

if TYPE_CHECKING:
    from fastdcgan.dcgan.evaluation import Evaluation


def plot_losses(csv_path: Path, path: Path) -> None:
    """Losses, and D's mean probabilities for real and generated images, over the steps of a metrics.csv -> PNG."""
    rows = read_metrics(csv_path)
    steps = [row["step"] for row in rows]
    figure, (losses, probabilities) = _two_rows()
    for key, label in (("loss_d", "discriminator"), ("loss_g", "generator")):
        losses.plot(steps, [row[key] for row in rows], label=label, linewidth=1)
    for key, label in (("d_real", "D(x)"), ("d_fake", "D(G(z))")):
        probabilities.plot(steps, [row[key] for row in rows], label=label, linewidth=1)
    losses.set_ylabel("loss")
    probabilities.set_ylabel("mean probability of real")
    probabilities.set_ylim(0, 1)
    probabilities.set_xlabel("step")
    _save(figure, path)


def plot_evaluations(evaluations: Sequence[Evaluation], real: Evaluation, path: Path) -> None:
    """Fréchet distance, precision and recall over the steps, and of real images as lines across -> PNG."""
    steps = [e.step for e in evaluations]
    figure, (distances, shares) = _two_rows()
    distances.plot(steps, [e.frechet for e in evaluations], marker="o", markersize=3, label="generated")
    distances.axhline(real.frechet, color="gray", linestyle="--", label="training images")
    distances.set_yscale("log")
    distances.set_ylabel("Fréchet distance")
    for key, color in (("precision", "C0"), ("recall", "C1")):
        shares.plot(steps, [getattr(e, key) for e in evaluations], marker="o", markersize=3, color=color, label=key)
        shares.axhline(getattr(real, key), color=color, linestyle="--", linewidth=1)
    shares.set_ylabel("share (dashed: training images)")
    shares.set_ylim(0, 1)
    shares.set_xlabel("step")
    _save(figure, path)


def _two_rows() -> tuple[Any, Any]:
    # Here, because it takes long to load and most users of this package never plot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(2, 1, sharex=True)


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
