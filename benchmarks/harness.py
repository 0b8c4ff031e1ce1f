"""Timing and statistics: interleaved rounds in one process, medians of per-round ratios, and their spread.

Speed drifts (clock frequency, other processes), and by more than what is to be told apart; but it drifts for all peers
alike. So every round times each peer once, in an order that alternates, and what is reported is the median over rounds
of the ratio of two times taken in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Segments = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Summary:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @property
    def spread(self) -> float:
        """The interquartile range."""
        return self.q3 - self.q1


def summarise(samples: Sequence[float]) -> Summary:
    """Median and quartiles (linear interpolation). Raises ValueError for no samples or one that isn't finite."""
    values = np.asarray(samples, dtype=float)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected a non-empty list of finite samples, got {samples!r}")
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return Summary(float(median), float(q1), float(q3))


def ratio(samples: Sequence[float], reference: Sequence[float]) -> Summary:
    """The summary of `samples[i] / reference[i]`: how many times longer than the reference, round by round."""
    if len(samples) != len(reference):
        raise ValueError(f"expected as many samples as the reference has ({len(reference)}), got {len(samples)}")
    summarise(samples)
    if min(reference, default=0.0) <= 0:
        raise ValueError(f"expected positive reference samples, got {reference!r}")
    return summarise([a / b for a, b in zip(samples, reference, strict=True)])


def is_noisy(summary: Summary) -> bool:
    """Whether the spread of a ratio is larger than its distance from 1, so that it tells nothing."""
    return summary.spread > abs(summary.median - 1)


# --- timers ----------------------------------------------------------------------------------------------------------
# `timer(segments, calls)` runs all segments in order `calls` times; gives seconds per call of each segment.


class CPUTimer:
    """A clock around every segment: by default the time that passes, else say `time.process_time`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, segments: Segments, calls: int) -> list[float]:
        totals = [0.0] * len(segments)
        for _ in range(calls):
            before = self.clock()
            for i, segment in enumerate(segments):
                segment()
                after = self.clock()
                totals[i] += after - before
                before = after
        return [total / calls for total in totals]


class CUDATimer:
    """CUDA events around all calls of a single segment together: throughput, with whatever launch gaps it has."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, segments: Segments, calls: int) -> list[float]:
        if len(segments) != 1:
            raise ValueError(f"expected one segment, got {len(segments)}: ColdCUDATimer takes several")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(calls):
            segments[0]()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1e3 / calls]


class ColdCUDATimer:
    """CUDA events around every segment, each with an L2 cache that holds none of its data.

    Before a segment a buffer of several times the L2 cache is written; that also keeps the GPU busy while the host
    enqueues the segment, so that launch latency stays out as far as it can.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, segments: Segments, calls: int) -> list[float]:
        events = [
            [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in segments] for _ in range(calls)
        ]
        torch.cuda.synchronize(self.device)
        for row in events:
            for segment, (start, end) in zip(segments, row, strict=True):
                self.buffer.zero_()
                start.record()
                segment()
                end.record()
        torch.cuda.synchronize(self.device)
        per_segment = zip(*([start.elapsed_time(end) / 1e3 for start, end in row] for row in events), strict=True)
        return [sum(times) / calls for times in per_segment]


Timer = Callable[[Segments, int], list[float]]


def timer_for(device: torch.device, cold: bool) -> Timer:
    """The timer of a device; `cold` asks for an L2-cold one where there is such."""
    if device.type == "cpu":
        return CPUTimer()
    if device.type == "cuda":
        return ColdCUDATimer(device) if cold else CUDATimer(device)
    raise ValueError(f"unknown device type {device.type!r}: expected 'cpu' or 'cuda'")


# --- rounds ----------------------------------------------------------------------------------------------------------


def calls_per_round(timer: Timer, segments: Segments, seconds: float, most: int = 1000) -> int:
    """How many calls take about `seconds`; warms up on the way."""
    timer(segments, 1)
    once = sum(timer(segments, 1))
    return max(1, min(most, round(seconds / max(once, 1e-9))))


@dataclass(frozen=True)
class Timing:
    """How long to measure.

    Args:
        rounds: how many; fewer if `budget_s` seconds are used up, but no fewer than `least_rounds`.
        seconds_per_round: a candidate is called in a round about as often as fits into this, at least once.
    """

    rounds: int
    seconds_per_round: float = 0.02
    budget_s: float = float("inf")
    least_rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds has to be at least 1, not {self.rounds}")


def interleave(
    candidates: Mapping[str, Segments], timer: Timer, timing: Timing, clock: Callable[[], float] = time.monotonic
) -> dict[str, list[list[float]]]:
    """Times all candidates in every round, in an order that is reversed each time.

    Args:
        candidates: name -> the segments of one call.
        timer, timing: see above.

    Returns:
        name -> per segment, the seconds per call in each round.
    """
    if not candidates:
        raise ValueError("there is nothing to time")
    began = clock()
    calls = {name: calls_per_round(timer, segments, timing.seconds_per_round) for name, segments in candidates.items()}
    samples: dict[str, list[list[float]]] = {name: [[] for _ in segments] for name, segments in candidates.items()}
    order = list(candidates)
    for done in range(timing.rounds):
        if done >= timing.least_rounds and clock() - began > timing.budget_s:
            break
        for name in order:
            for series, value in zip(samples[name], timer(candidates[name], calls[name]), strict=True):
                series.append(value)
        order.reverse()
    return samples
