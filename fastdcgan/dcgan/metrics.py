"""The numbers of a run: averaged, written to metrics.csv (and TensorBoard), and watched for divergence."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import torch

from fastdcgan.dcgan.distributed import Processes
from fastdcgan.dcgan.files import replacing
from fastdcgan.train_step import StepMetrics

COLUMNS = ("step", "epoch", *StepMetrics._fields, "images_per_second")


class Diverged(RuntimeError):
    """A loss or a weight is no longer a finite number; the message says at which step and what to change."""


class MetricsLog:
    """Collects the metrics of steps on the device, and reads and writes their averages every now and then.

    An existing file is continued after `step`: rows of later steps belong to a run that went another way, and go.
    In a run of several processes the averages are over all of them; process 0 writes.
    """

    def __init__(self, run: Path, step: int, batch_size: int, processes: Processes, tensorboard: bool = False) -> None:
        self.path = run / "metrics.csv"
        self.batch_size, self.processes = batch_size, processes
        self._pending: list[torch.Tensor] = []
        self._file = self._tensorboard = None
        if processes.main:
            run.mkdir(parents=True, exist_ok=True)
            rows = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.exists() else []
            _rewrite(self.path, rows)
            self._file = self.path.open("a", newline="")
            self._writer = csv.DictWriter(self._file, COLUMNS)
            self._tensorboard = _summary_writer(run, step) if tensorboard else None
        self._since = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        self._pending.append(torch.stack(metrics))

    def flush(self, step: int, epoch: int) -> tuple[dict[str, float], list[dict[str, float]]] | None:
        """Write the averages of what was added since the last time, up to `step`; None if that is nothing.

        Returns the row, and the values of each single step. This waits for the device.
        """
        if not self._pending:
            return None
        values = self.processes.mean(torch.stack(self._pending).cpu())
        elapsed = time.perf_counter() - self._since
        steps = [dict(zip(StepMetrics._fields, row, strict=True)) for row in values.tolist()]
        row: dict[str, Any] = {"step": step, "epoch": epoch}
        row |= dict(zip(StepMetrics._fields, values.double().mean(0).tolist(), strict=True))
        row["images_per_second"] = len(steps) * self.batch_size / elapsed
        self._pending.clear()
        self._since = time.perf_counter()
        if self._file is not None:
            self._writer.writerow(_as_text(row))
            self._file.flush()
        if self._tensorboard is not None:
            for key in (*StepMetrics._fields, "images_per_second"):
                self._tensorboard.add_scalar(key, row[key], step)
        return row, steps

    def skip_time(self) -> None:
        """Leave the time since the last flush out of images/s; for pauses between a flush and the next step."""
        self._since = time.perf_counter()

    def add_picture(self, name: str, pixels: Any, step: int) -> None:
        """A picture, uint8 [H, W, C] or [H, W], for TensorBoard if it is on."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class Watch:
    """Looks at every step's values for a run that has gone wrong."""

    PATIENCE = 300  # steps

    def __init__(self, real_label: float) -> None:
        # With smoothed labels D's best answer for a real image is the label, not 1.
        self._sure_of_real = 0.99 * real_label
        self._streak = 0
        self._said = False

    def look(self, values: dict[str, float], step: int) -> str | None:
        """A warning, the first time that D has won for long. Raises Diverged for a loss that is not finite."""
        for name in ("loss_d", "loss_g"):
            if not math.isfinite(values[name]):
                raise Diverged(f"{name} is {values[name]} at step {step}. {ADVICE_NOT_FINITE}")
        won = values["d_real"] > self._sure_of_real and values["d_fake"] < 0.01
        self._streak = self._streak + 1 if won else 0
        if self._streak < self.PATIENCE or self._said:
            return None
        self._said = True
        return (
            f"The discriminator has been winning for {self.PATIENCE} steps (D(x) {values['d_real']:.3f}, D(G(z)) "
            f"{values['d_fake']:.4f} at step {step}), so the generator hardly learns. Try a lower --lr-d, a smaller "
            "--ndf, --real-label 0.8 or --gradient-penalty 10 --penalty-kind r1; with few images, --flips."
        )


ADVICE_NOT_FINITE = (
    "The run has diverged: continue from the last checkpoint with lower --lr-g and --lr-d, or with --precision fp32 or "
    "bf16 if it was fp16."
)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv."""
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _rewrite(path: Path, rows: list[dict[str, float]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(_as_text, rows))


def _as_text(row: dict[str, float]) -> dict[str, str]:
    return {key: str(int(value)) if key in ("step", "epoch") else f"{value:.6g}" for key, value in row.items()}


def _summary_writer(run: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
