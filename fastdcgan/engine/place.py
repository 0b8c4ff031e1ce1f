"""Where something is called: in which forward, and within what of PyTorch's that may call it again."""

from __future__ import annotations

import threading

import torch
from torch.autograd import forward_ad

# inside: the `place` of the forward that runs now, if things wait in it; applying: how many Functions' do;
# within: a forward that has decided how it runs; reordering, plain: at this `place` in channels_last, or as PyTorch's
# modules; made: `Reordered`s of it
local = threading.local()
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def place() -> tuple:
    """Sets code apart that something other than the forward itself calls, perhaps more than once: checkpoints,
    transforms, tracers, the backward. What it calls doesn't wait until it has returned."""
    return (
        top_hooks(True), torch._C._current_graph_task_id(), torch._C._are_functorch_transforms_active(),
        forward_ad._current_level, torch.jit.is_tracing(), getattr(local, "applying", 0),
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
