"""The numbers of a run: averaged, written to metrics.csv (and TensorBoard), and watched for divergence."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.distributed import Processes
from fastdcgan.dcgan.files import append, write
from fastdcgan.train_step import StepMetrics

COLUMNS = ("step", "epoch", *StepMetrics._fields, "images_per_second")
HEADER = ",".join(COLUMNS)


class Diverged(RuntimeError):
    """A loss or a weight is no longer a finite number; the message says at which step and what to change."""


class MetricsLog:
    """Collects the metrics of steps on the device, and reads and writes their averages every now and then.

    In a run of several processes the averages are over all of them; process 0 writes.
    """

    def __init__(self, run: Path, batch_size: int, processes: Processes, tensorboard: bool = False) -> None:
        self.path = run / "metrics.csv"
        self.batch_size, self.processes = batch_size, processes
        # Since the last line of the file: each step's values, and how many images this process saw in how much time.
        self._values: list[torch.Tensor] = []
        self._images, self._seconds = 0, 0.0
        self._since = time.perf_counter()
        self._summary_writer: Any = None
        self._writer: Any = None
        if tensorboard:  # its package may be missing: then that is said before anything is written
            from torch.utils.tensorboard import SummaryWriter

            self._summary_writer = SummaryWriter

    def start(self, step: int) -> None:
        """Begin to write. An existing file is continued where the values that are not averaged yet begin: rows of later
        steps belong to a run that was killed or went another way, and go."""
        if self.processes.main:
            written = step - len(self._values)
            rows = [row for row in read_metrics(self.path) if row["step"] <= written] if self.path.exists() else []
            write(self.path, "".join([f"{HEADER}\n", *map(_as_line, rows)]))
            if self._summary_writer is not None:
                folder, purge = self.path.parent / "tensorboard", written + 1 if written else None
                self._writer = self._summary_writer(str(folder), purge_step=purge)
        self._since = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        self._values.append(torch.stack(metrics))
        self._images += self.batch_size

    def flush(self, step: int, epoch: int, complete: bool = True) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Write the averages of what was added since the last complete line, up to `step`.

        A line that is not complete is of a run that stops, which may go on: then the line takes its place that has the
        steps to come as well. Returns the row, and the values of each single step. This waits for the device.
        """
        self._count_time()
        values = self._averaged()
        steps = [dict(zip(StepMetrics._fields, row, strict=True)) for row in values.tolist()]
        row: dict[str, Any] = {"step": step, "epoch": epoch}
        row |= dict(zip(StepMetrics._fields, values.double().mean(0).tolist(), strict=True))
        row["images_per_second"] = self._images / self._seconds
        if complete:
            self._values, self._images, self._seconds = [], 0, 0.0
        if self.processes.main:
            append(self.path, _as_line(row))
        if self._writer is not None:
            for key in (*StepMetrics._fields, "images_per_second"):
                self._writer.add_scalar(key, row[key], step)
        return row, steps

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the line to come has so far: each step's values, float32 [steps, values]."""
        return {"values": self._averaged()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from that; from any other state the line to come begins here, since a log never stops a run."""
        values = state.get("values", torch.empty(0))
        fits = values.dim() == 2 and values.shape[1] == len(StepMetrics._fields)
        if fits and not values.is_complex() and values.isfinite().all():
            self._values = list(values.float())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside out of images/s, but not the steps before that the device is still at."""
        if self._values:
            self._values[-1].cpu()
        self._count_time()
        yield
        self._since = time.perf_counter()

    def add_picture(self, name: str, pixels: Any, step: int) -> None:
        """A picture, uint8 [H, W, C] or [H, W], for TensorBoard if it is on."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _averaged(self) -> torch.Tensor:
        """The values over all processes, on the CPU: [steps, values]."""
        if not self._values:
            return torch.empty(0, len(StepMetrics._fields))
        values = self.processes.mean(torch.stack(self._values).cpu())
        self._values = list(values)
        return values

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now


def has_won(values: Mapping[str, float], real_label: float) -> bool:
    """Whether D is sure of real images and of generated ones. With smoothed labels its best answer for a real one is
    the label, not 1."""
    return values["d_real"] > 0.99 * real_label and values["d_fake"] < 0.01


class Watch:
    """Looks at every step's values for a run that has gone wrong."""

    PATIENCE = 300  # steps

    def __init__(self, real_label: float) -> None:
        self._real_label = real_label
        self._streak = 0
        self._said = False

    def look(self, values: dict[str, float], step: int) -> str | None:
        """A warning, the first time that D has won for long. Raises Diverged for a loss that is not finite."""
        for name in ("loss_d", "loss_g"):
            if not math.isfinite(values[name]):
                raise Diverged(f"{name} is {values[name]} at step {step}. {ADVICE_NOT_FINITE}")
        self._streak = self._streak + 1 if has_won(values, self._real_label) else 0
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
    """The rows of a metrics.csv. Lines that a kill cut short or an editor changed are left out, with a word."""
    rows, bad = [], []
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), start=1):
        if line == HEADER:
            continue
        try:
            row = dict(zip(COLUMNS, map(float, line.split(",")), strict=True))
            int(row["step"]), int(row["epoch"])
            rows.append(row)
        except (ValueError, OverflowError):
            bad.append(number)
    if bad:
        say(f"{path}: {len(bad)} lines can't be read and are left out, the first of them line {bad[0]}")
    return rows


def _as_line(row: Mapping[str, float]) -> str:
    texts = (str(int(value)) if key in ("step", "epoch") else f"{value:.6g}" for key, value in row.items())
    return ",".join(texts) + "\n"
