"""A run as one page: report.html, which needs no server and no network.

    write_report(Path("runs/mine"))

Curves of the losses and of what D thinks, the sample grids under a slider, walks, the settings, the speed, and to
some samples the real images that come nearest among D's features.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image

from fastdcgan.dcgan import checkpoint, interpolation, sampling
from fastdcgan.dcgan.checkpoint import CheckpointError
from fastdcgan.dcgan.config import TrainConfig
from fastdcgan.dcgan.console import say
from fastdcgan.dcgan.data import Labelled, held_out, load_images, load_labelled
from fastdcgan.dcgan.decoding import open_image
from fastdcgan.dcgan.features import FeatureExtractor, extract
from fastdcgan.dcgan.files import write
from fastdcgan.dcgan.images import Sheet, sample_grids, to_pixels
from fastdcgan.dcgan.metrics import has_won, read_metrics
from fastdcgan.dcgan.trained import Trained, load_trained

NAME = "report.html"
_FRAMES = 60  # grids in the page, evenly chosen
_POINTS = 400  # of a curve, each the mean of neighbouring lines
_WALK, _WALK_STEPS = range(5), 8
_SAMPLES, _NEIGHBOURS, _MOST_REAL = 8, 6, 5000
# The size of a chart in its own units, and the margins of what is drawn in it
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 200, 42, 18, 8, 22

Row = dict[str, float]


def write_report(
    place: str | Path,
    path: Path | None = None,
    data: str | None = None,
    device: torch.device | str = "cpu",
    speed: str = "",
) -> Path:
    """Write the page of a run, `place` being its folder, to `path` (default: report.html there), and return that.

    `data` are the run's images, where they are not where they were; `speed` is what else is known of that. Raises
    CheckpointError for what is no run's folder, OSError for one without metrics.csv, and what `load_images` raises for
    `data`.
    """
    run = load_trained(place, device)
    home = checkpoint.run_of(run.path)
    if home is None:
        raise CheckpointError(f"{run.path} is not in its run's folder: expected the folder of a run")
    if run.config.ema:
        run = load_trained(place, device, ema=True)
    rows = read_metrics(home / "metrics.csv")
    if not rows:
        raise ValueError(f"{home / 'metrics.csv'} has no lines yet: expected a run of some steps")
    frames = _frames(home, rows)
    sections = [
        ("Losses, and what the discriminator thinks", _curves(rows, run.config)),
        ("Samples over the run, on the same inputs", _slider(frames)),
        ("Walks from one input to the next", _walks(run)),
        ("Nearest real images", _neighbours(run, data)),
        ("Speed", f"{_speed(rows, run.config)}<p>{escape(speed)}</p>"),
        ("Settings", _settings(run.config)),
    ]
    c = run.config
    page = Template(Path(__file__).with_suffix(".html").read_text()).substitute(
        title=escape(f"{home.resolve().name}: {Path(c.data).name or c.data}"),
        summary=escape(
            f"{run.step} steps of {c.batch_size} images, {c.image_size}x{c.image_size}x{c.channels}"
            f"{f', {len(run.classes)} classes' if run.classes else ''}, {c.precision}"
        ),
        sections="\n".join(f"<section>\n<h2>{title}</h2>\n{body}\n</section>" for title, body in sections),
        frames=json.dumps([dataclasses.asdict(frame) for frame in frames]).replace("<", "\\u003c"),
    )
    path = path or home / NAME
    write(path, page)
    return path


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(rows: Sequence[Row], config: TrainConfig) -> str:
    losses, lowest, highest = ("loss_d", "loss_g"), 0.0, 1.0
    finite = sorted(row[key] for row in rows for key in losses if math.isfinite(row[key]))
    if finite:  # one spike doesn't flatten all the rest
        lowest, highest = min(0.0, finite[0]), max(finite[math.ceil(0.99 * len(finite)) - 1] * 1.1, 0.1)
    bad = [not all(math.isfinite(row[key]) for key in losses) or has_won(row, config.real_label) for row in rows]
    notes = []
    if any(not math.isfinite(row[key]) for row in rows for key in losses):
        notes.append("a loss was no finite number: the run has diverged")
    if any(has_won(row, config.real_label) for row in rows):
        notes.append(
            "the discriminator has won, D(x) near its label and D(G(z)) under 0.01: the generator hardly learns"
        )
    said = f"Marked in red: {'; '.join(notes)}." if notes else "No divergence: nothing is marked."
    probabilities = "D's mean probability of being real. At best neither side wins: both between 0 and 1."
    return (
        '<div class="two">'
        + _chart(rows, losses, ("discriminator", "generator"), bad, (lowest, highest), "Loss.")
        + _chart(rows, ("d_real", "d_fake"), ("D(x)", "D(G(z))"), bad, (0.0, 1.0), probabilities)
        + f'</div>\n<p id="divergence">{escape(said)}</p>'
    )


def _chart(
    rows: Sequence[Row],
    keys: tuple[str, str],
    names: tuple[str, str],
    bad: Sequence[bool],
    limits: tuple[float, float],
    caption: str,
) -> str:
    from matplotlib.ticker import MaxNLocator  # here, because it takes long to load

    low, high = limits

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(" and ".join(names))}">']
    for tick in MaxNLocator(5).tick_values(low, high):
        if low <= tick <= high:
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            )
            parts.append(f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    first, last = rows[0]["step"], rows[-1]["step"]
    for tick in MaxNLocator(4, integer=True).tick_values(first, last):
        if first <= tick <= last:
            x = _x(tick, rows)
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{tick:.0f}</text>')
    start = 0
    for is_bad, group in groupby(bad):
        end = start + len(list(group)) - 1
        if is_bad:
            left, right = _x(rows[start]["step"], rows) - 1, _x(rows[end]["step"], rows) + 1
            height = _HEIGHT - _TOP - _BOTTOM
            parts.append(f'<rect class="bad" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{height}"/>')
        start = end + 1
    for key, colour in zip(keys, ("one", "two-line"), strict=True):
        for is_finite, values in groupby(_thinned(rows, key), key=lambda point: math.isfinite(point[1])):
            if is_finite:
                points = [f"{_x(step, rows):.1f},{y(value):.1f}" for step, value in values]
                # A point by itself is a dot.
                parts.append(f'<polyline class="{colour}" points="{" ".join(points if points[1:] else 2 * points)}"/>')
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" visibility="hidden"/></svg>')
    legend = f'<b class="one">{escape(names[0])}</b> and <b class="two-line">{escape(names[1])}</b>'
    return f"<figure>{''.join(parts)}<figcaption>{legend}. {escape(caption)}</figcaption></figure>"


def _x(step: float, rows: Sequence[Row]) -> float:
    """Where a step is in a chart."""
    first, last = rows[0]["step"], rows[-1]["step"]
    share = (min(max(step, first), last) - first) / max(last - first, 1)
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _thinned(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """(step, value), at most `_POINTS` of them: means over neighbours, so that a value that is not finite stays so."""
    parts = np.array_split(np.array([(row["step"], row[key]) for row in rows]), min(_POINTS, len(rows)))
    return [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """A sample grid: its file as a data URI, what it is of, and where its step is in the charts."""

    picture: str
    text: str
    x: float


def _frames(home: Path, rows: Sequence[Row]) -> list[_Frame]:
    found = sample_grids(home)
    if len(found) > _FRAMES:
        found = [found[i] for i in np.linspace(0, len(found) - 1, _FRAMES).round().astype(int)]
    frames = []
    for step, path in found:
        try:
            with open_image(path) as image:
                picture = _data_uri(image)
        except Exception as error:  # whatever a broken file makes Pillow raise
            say(f"Left out: {path} ({type(error).__name__}: {error})")
            continue
        row = min(rows, key=lambda row: abs(row["step"] - step))
        values = (
            f": loss of D {row['loss_d']:.3f}, of G {row['loss_g']:.3f}, D(x) {row['d_real']:.2f}, "
            f"D(G(z)) {row['d_fake']:.2f}"
        )
        frames.append(_Frame(picture, f"Step {step}{values if step else ''}", round(_x(step, rows), 1)))
    return frames


def _slider(frames: Sequence[_Frame]) -> str:
    last = len(frames) - 1
    if last < 0:
        return '<p class="faint">The run has no sample grids.</p>'
    return (
        f'<figure><input type="range" id="slider" min="0" max="{last}" value="{last}" aria-label="step">'
        '<p id="shown"></p><img id="picture" alt="Samples at this step"></figure>'
    )


def _walks(run: Trained) -> str:
    generator, of = run.generator, ""
    if run.classes:
        generator.label, of = 0, f" of the class {run.classes[0]}"
    picture = interpolation.walk_sheet(generator, interpolation.latents(generator.nz, _WALK), _WALK_STEPS)
    generator.label = None
    return _figure(picture, f"Each row goes from one input{of} to the next, on a great circle.")


def _neighbours(run: Trained, data: str | None) -> str:
    """Samples, and beside each the training images, of its class where there are classes, whose features are nearest;
    or why there are none."""
    try:
        place, c = run.images(data), run.config
        found = (load_labelled if run.classes else load_images)(place, c.image_size, c.channels)
        if isinstance(found, Labelled) and found.classes != [*run.classes]:
            raise ValueError(f"{place} has other classes than the run")
    except (CheckpointError, ValueError, OSError, ModuleNotFoundError) as error:
        if data is not None:
            raise
        return f'<p class="faint">Not shown, for want of the images: {escape(str(error))}</p>'
    images, labels = (found.images, found.labels) if isinstance(found, Labelled) else (found, np.zeros(len(found)))
    pixels, samples = images.array, to_pixels(sampling.sample(run.generator, _SAMPLES))
    classes = np.arange(_SAMPLES) % max(len(run.classes), 1)  # as `sample` takes them in turn
    device, shown = next(run.discriminator.parameters()).device, np.unique(classes)
    sheet, total = Sheet(_SAMPLES * (1 + _NEIGHBOURS), 1 + _NEIGHBOURS), 0
    rows = np.full((_SAMPLES, 1 + _NEIGHBOURS, *pixels.shape[1:]), 255, np.uint8)  # white, where there are too few
    for label in shown:
        run.discriminator.label = int(label) if run.classes else None
        seen = np.flatnonzero(~held_out(len(pixels), c.holdout) & (labels == label))
        seen = seen[np.linspace(0, len(seen) - 1, min(len(seen), _MOST_REAL // len(shown))).round().astype(int)]
        extractor, of_class = FeatureExtractor(run.discriminator), np.flatnonzero(classes == label)
        both = np.concatenate([samples[of_class], pixels[seen]])
        made, real = torch.from_numpy(extract(extractor, both, device)).split([len(of_class), len(seen)])
        nearest = torch.cdist(made, real).topk(min(_NEIGHBOURS, len(seen)), largest=False).indices.numpy()
        rows[of_class, 0], rows[of_class, 1 : 1 + nearest.shape[1]] = samples[of_class], pixels[seen[nearest]]
        total += len(seen)
    run.discriminator.label = None
    sheet.add(rows.reshape(-1, *pixels.shape[1:]))
    alike = ", and of its class" if run.classes else ""
    title = f"Left: samples. Beside each: of {total} training images those that are nearest among D's features{alike}."
    return _figure(sheet.image(), title)


def _figure(picture: Image.Image, caption: str) -> str:
    return (
        f'<figure><img src="{_data_uri(picture)}" width="{2 * picture.width}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _data_uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


# --- words -----------------------------------------------------------------------------------------------------------


def _speed(rows: Sequence[Row], config: TrainConfig) -> str:
    speeds = sorted(row["images_per_second"] for row in rows)
    median = statistics.median(speeds)
    return (
        f'<p id="speed">{median:.1f} images a second in the median of {len(speeds)} lines of the log '
        f"({speeds[0]:.1f} to {speeds[-1]:.1f}), {median / config.batch_size:.2f} steps.</p>"
    )


def _settings(config: TrainConfig) -> str:
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("out", "cache"):  # the checkpoint doesn't know these
            changed = ' class="changed"' if value != field.default else ""
            lines.append(f"<tr{changed}><td>{field.name}</td><td>{escape(str(value))}</td></tr>")
    return (
        '<p class="faint">In bold what is not the default.</p>\n'
        f'<div class="wide"><table>\n{chr(10).join(lines)}\n</table></div>'
    )
