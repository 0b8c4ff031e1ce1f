"""Decoding in several processes: for a small image Python's part of the work, which one thread at a time can do, takes
longer than Pillow's."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

AT_A_TIME = 32  # decoded images that a process hands over together

Decoded = tuple[int, np.ndarray | str]  # an image's number, and its pixels or the reason why there are none


def attempt(decode: Callable[..., np.ndarray], *args: Any) -> np.ndarray | str:
    """What `decode` gives, or why it gives nothing: whatever a broken file makes Pillow raise."""
    try:
        return decode(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def in_workers(dataset: Dataset[list[Decoded]], workers: int) -> Generator[Decoded]:
    """What `dataset` has, some at a time, read in so many processes; few results wait to be taken. With 0 it is read in
    this one."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=list,
        # Workers share the limit of pixels in flight, and what was listed, with the process that they are forks of.
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # else a seed for the workers is drawn from everybody's
    )
    for some in loader:
        yield from some
