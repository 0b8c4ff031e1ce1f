"""What a training step needs around it to be one CUDA graph.

A graph replays the very kernels that were captured, on the very memory: so inputs are copied to fixed places, learning
rates are tensors, and whatever the warm-up runs changed is put back before the capture, which itself computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdcgan.train_step import StepMetrics

_NUMBERS = frozenset((bool, int, float, str, tuple, type(None)))  # modes, momentum, slopes, ... of a module
# What these make at their first step begins as zeros, so that zeroing it undoes a warm-up.
_START_AT_ZERO = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)


@dataclass(frozen=True)
class Captured:
    """A step that was captured: its graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    metrics: Tensor  # [6]
    inputs: tuple[Tensor | None, ...]  # real images, z, labels

    def __call__(self, *inputs: Tensor | None) -> StepMetrics:
        for memory, new in zip(self.inputs, inputs, strict=True):
            if memory is not None:
                assert new is not None
                memory.copy_(new, non_blocking=True)
        self.graph.replay()
        return StepMetrics(*self.metrics.clone().unbind())  # the next replay writes over it


def record(
    function: Callable[[], Tensor], device: torch.device, rng: torch.Generator | None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture what `function` does on the GPU, without doing it, and the memory of its result."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        if rng is not None:
            graph.register_generator_state(rng)
        # Of this thread's calls alone: another one may copy the next batch to the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            return graph, function()


# --- what a graph takes for granted -----------------------------------------------------------------------------------


class Granted:
    """What a captured graph of `nets` and `optimizers` has taken for granted: with another one it would compute
    something else, or read memory that is somebody else's."""

    def __init__(self, nets: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self._nets, self._optimizers = nets, optimizers
        self._whole = self._look()
        self._watch()

    def holds(self) -> bool:
        """Whether nothing of it has changed since. A glance says so as a rule, in a fraction of the time of a look."""
        if self._glance() == self._before:
            return True
        if self._look() != self._whole:
            return False
        self._watch()  # something else of these objects has changed
        return True

    def _watch(self) -> None:
        modules = [m for net in self._nets for m in net.modules()]
        groups = [group for o in self._optimizers for group in o.param_groups]
        states = [state for o in self._optimizers for state in o.state.values()]
        self._dicts: list[dict] = [
            *map(vars, (*modules, *self._optimizers)),
            *(d for m in modules for d in (m._parameters, m._buffers, m._modules)),
            *groups,
            *(o.state for o in self._optimizers),
            *states,
        ]
        self._lists = [value for group in groups for value in group.values() if isinstance(value, list)]
        self._tensors = [t for net in self._nets for t in (*net.parameters(), *net.buffers())]
        self._of_optimizers = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        self._held = list(self._values())  # so that no other object gets the id of one of these
        self._before = self._glance()

    def _values(self) -> Iterable[Any]:
        return chain(chain.from_iterable(map(dict.values, self._dicts)), *self._lists)

    def _glance(self) -> tuple:
        return (
            list(map(id, self._values())),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(Tensor.stride, self._tensors)),
            [(t.dtype, t.requires_grad) for t in self._tensors],
            list(map(Tensor.data_ptr, self._of_optimizers)),
            [t._version for t in self._of_optimizers],
        )

    def _look(self) -> Hashable:
        tensors = tuple(
            (t.data_ptr(), t.dtype, t.stride(), t.requires_grad)
            for net in self._nets
            for t in (*net.parameters(), *net.buffers())
        )
        modules = tuple(
            (id(m), *(value for value in vars(m).values() if value.__class__ in _NUMBERS))
            for net in self._nets
            for m in net.modules()
        )
        states = tuple(
            value.data_ptr()
            for o in self._optimizers
            for state in o.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        groups = tuple(
            tuple((name, value) for name, value in group.items() if name not in ("params", "lr", "initial_lr"))
            for o in self._optimizers
            for group in o.param_groups
        )
        ready = tuple(o.ready() for o in self._optimizers if hasattr(o, "ready"))
        return tensors, modules, states, ready, repr(groups)


# --- putting back what a warm-up changed ------------------------------------------------------------------------------


class Snapshot:
    """Copies of all that a training step changes; `restore` puts them back in place, where graphs read and write."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizers: Sequence[Optimizer],
        scaler: torch.amp.GradScaler | None = None,
        rng: torch.Generator | None = None,
    ) -> None:
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        self._tensors = [(t, t.detach().clone()) for t in tensors.values()]
        self._optimizers = optimizers
        self._states = [
            {
                (p, name): value.clone()
                for p, state in o.state.items()
                for name, value in state.items()
                if isinstance(value, Tensor)
            }
            for o in optimizers
        ]
        self._scaler, self._rng = scaler, rng
        self._scale = None if scaler is None else scaler.state_dict()
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._own = None if rng is None else rng.get_state()

    @torch.no_grad()
    def restore(self) -> None:
        """State of an optimiser that was not there is set to zero (`check_first_state`)."""
        for tensor, before in self._tensors:
            tensor.copy_(before)
        for optimizer, known in zip(self._optimizers, self._states, strict=True):
            for p, state in optimizer.state.items():
                for name, value in state.items():
                    if name == "master" and (p, name) not in known:  # FusedAdam's float32 copy of a weight
                        value.copy_(p)
                    elif isinstance(value, Tensor):
                        value.copy_(known[p, name]) if (p, name) in known else value.zero_()
            if hasattr(optimizer, "prepare"):
                optimizer.prepare()
        if self._scaler is not None and self._scale is not None:
            self._scaler.load_state_dict(self._scale)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._rng is not None and self._own is not None:
            self._rng.set_state(self._own)


def check_optimizers(*optimizers: Optimizer) -> None:
    """Raise ValueError for an optimiser whose step can't be captured in a CUDA graph."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not group.get("capturable", isinstance(optimizer, torch.optim.SGD)):
                name = type(optimizer).__name__
                raise ValueError(
                    f"{name} can't be captured in a CUDA graph as it is: expected {name}(..., capturable=True) where "
                    f"it has that, or fastdcgan.optim.FusedAdam(..., capturable=True); or GANStep(..., graph=False)"
                )


def check_first_state(optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for an optimiser whose first step makes state that nobody could put back."""
    for optimizer in optimizers:
        plain = type(optimizer) is torch.optim.SGD and all(not g["momentum"] for g in optimizer.param_groups)
        if not optimizer.state and not plain and not isinstance(optimizer, _START_AT_ZERO):
            raise ValueError(
                f"{type(optimizer).__name__} makes its state at its first step, and a warm-up must not leave a trace: "
                f"make it before, by one step of an eager GANStep(..., graph=False)"
            )
