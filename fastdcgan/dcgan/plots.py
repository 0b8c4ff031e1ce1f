"""Plots of a run's metrics, drawn without a display."""

from __future__ import annotations

from pathlib import Path

from fastdcgan.dcgan.files import replacing
from fastdcgan.dcgan.metrics import read_metrics


def plot_losses(csv_path: Path, path: Path) -> None:
    """Losses, and D's mean probabilities for real and generated images, over the steps of a metrics.csv -> PNG."""
    # Here, because it takes long to load and most users of this package never plot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(csv_path)
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, probabilities = figure.subplots(2, 1, sharex=True)
    for key, label in (("loss_d", "discriminator"), ("loss_g", "generator")):
        losses.plot(steps, [row[key] for row in rows], label=label, linewidth=1)
    for key, label in (("d_real", "D(x)"), ("d_fake", "D(G(z))")):
        probabilities.plot(steps, [row[key] for row in rows], label=label, linewidth=1)
    losses.set_ylabel("loss")
    probabilities.set_ylabel("mean probability of real")
    probabilities.set_ylim(0, 1)
    probabilities.set_xlabel("step")
    for axes in (losses, probabilities):
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
