"""Where the time of a step goes: kernels and host time, a Chrome trace, and each primitive against its floor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan.benchmarks import harness
from fastdcgan.spec import Epilogue, Operand

_HOST_CALLS = 7
_PREFIX = "fastdcgan: "


def kernels(call: Callable[[], object], device: torch.device) -> int:
    """How many kernels, copies and fills one call runs on a GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def host_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that a call keeps the host, while the GPU has nothing to do before it: the median of a few."""
    times = []
    for _ in range(_HOST_CALLS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize(device)
    return 1e3 * sorted(times)[len(times) // 2]


# --- primitives against their floors ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """All calls of one primitive on tensors of one size."""

    what: str
    calls: int
    ms: float
    floor_ms: float


@dataclass(frozen=True)
class _Cost:
    flops: float
    bytes: int


_SECOND = len(Operand._fields)  # where a contraction's second tensor is: an operator takes an operand field by field


def _cost(name: str, args: Sequence, out: Tensor) -> _Cost:
    """FLOPs and bytes of an operator, with every image-shaped tensor and weight moved once."""
    moved = sum(t.nbytes for t in (*args, out) if isinstance(t, Tensor) and t.dim() == 4)
    if name not in ("conv", "conv_transpose", "weight_grad"):
        return _Cost(0.0, moved)
    weights = (out if name == "weight_grad" else args[_SECOND]).numel()
    positions = {"conv": out, "conv_transpose": args[0], "weight_grad": args[_SECOND]}[name]
    return _Cost(2.0 * positions.shape[0] * math.prod(positions.shape[2:]) * weights, moved)


def _label(name: str, args: Sequence, out: Tensor) -> str:
    sizes = f"{'x'.join(map(str, args[0].shape))} -> {'x'.join(map(str, out.shape))}"
    if name not in ("conv", "conv_transpose"):
        return f"{name} {sizes}"
    kind = Epilogue(*args[-1 - len(Epilogue._fields) : -1]).kind  # the last argument is the backend
    return f"{name} {sizes}" if kind == "none" else f"{name} {sizes} {kind}"


class _Annotated(TorchDispatchMode):
    """Inside a `with`, call number i of one of our operators is a region of the trace, and `entries[i]` says what it
    was; it stays None for operators on per-channel vectors alone.

    Where a dispatch mode watches, blocks call their primitives as registered operators, in place of a backend's own
    methods for several of them: the same passes over memory, and some host time more."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[str, _Cost] | None] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fastdcgan":
            return func(*args, **(kwargs or {}))
        index = len(self.entries)
        self.entries.append(None)
        with record_function(f"{_PREFIX}{index}"):
            result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, tuple) else result
        name = func._opname
        if isinstance(out, Tensor) and _cost(name, args, out).bytes:
            self.entries[index] = _label(name, args, out), _cost(name, args, out)
        return result


def trace(
    step: Callable[[], object], device: torch.device, path: Path | None, rates: Rates, calls: int = 3
) -> list[Share]:
    """Profile `calls` steps (eager ones: a captured step has no regions).

    Returns the primitives of one step with their time and floor, the longest first, and at last everything else.
    `path`: where a Chrome trace goes, if anywhere.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _Annotated() as annotated:
        for _ in range(2):
            step()
        annotated.entries.clear()
        with profile(activities=activities) as found:
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            total_ms = 1e3 * (time.perf_counter() - begin)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(path))
    shares: dict[str, Share] = {}
    for event in found.events():
        if not event.name.startswith(_PREFIX) or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        entry = annotated.entries[int(event.name.removeprefix(_PREFIX))]
        if entry is None:
            continue
        label, cost = entry
        ms = (event.device_time_total if device.type == "cuda" else event.cpu_time_total) / 1e3
        floor_ms = 1e3 * max(cost.flops / rates.flops_per_s, cost.bytes / rates.bytes_per_s)
        before = shares.get(label, Share(label, 0, 0.0, 0.0))
        shares[label] = Share(label, before.calls + 1, before.ms + ms, before.floor_ms + floor_ms)
    each = [Share(s.what, s.calls // calls, s.ms / calls, s.floor_ms / calls) for s in shares.values()]
    each.sort(key=lambda share: -share.ms)
    rest = total_ms / calls - sum(share.ms for share in each)
    return [*each, Share("everything else, and gaps", 1, rest, 0.0)]


# --- ceilings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What the machine does at best: measured, in this process."""

    flops_per_s: float
    bytes_per_s: float


def ceilings(device: torch.device, dtype: torch.dtype, size: int, copied: int, seconds: float) -> Rates:
    """A matrix product [size, size] x [size, size] on random data, and a copy of `copied` bytes, read and written."""
    timer = harness.timer_for(device, cold=False)

    def median_s(function: Callable[[], object]) -> float:
        calls = harness.calls_per_round(timer, (function,), seconds)
        return harness.summarise([timer((function,), calls)[0] for _ in range(5)]).median

    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    flops_per_s = 2 * size**3 / median_s(lambda: torch.mm(a, b, out=product))
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(flops_per_s, 2 * copied / median_s(lambda: target.copy_(source)))
