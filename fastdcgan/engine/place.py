"""Where something is called: in which forward, and within what of PyTorch's that may call it again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


class _Local(threading.local):
    def __init__(self) -> None:
        self.inside: tuple | None = None  # the `place` of the forward that runs now, if things wait in it
        self.applying = 0  # autograd Functions' forwards that run
        self.within = False  # whether a forward runs that has decided how it runs
        self.reordering: tuple | None = None  # the `place` at which it runs in channels_last
        self.plain: tuple | None = None  # or as PyTorch's modules
        self.made: list[Callable[[], Any]] = []  # what refers to its `Reordered`s


local = _Local()
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def place() -> tuple:
    """Sets code apart that something other than the forward itself calls, perhaps more than once: checkpoints,
    transforms, tracers, the backward. What it calls doesn't wait until it has returned."""
    return (
        top_hooks(True), torch._C._current_graph_task_id(), torch._C._are_functorch_transforms_active(),
        forward_ad._current_level, torch._C._is_tracing(), local.applying,
    )  # fmt: skip


def is_computed_again() -> bool:
    """Whether the backward may compute this call again, in the same way: what a checkpoint calls, say."""
    return top_hooks(True) is not None


class Kept:
    """What is kept on a module for its next calls. A copy of the module starts anew."""

    def __deepcopy__(self, memo: dict) -> Kept:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()
