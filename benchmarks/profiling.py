"""Where the time of a step goes: kernels and host time, a Chrome trace, and each primitive against its floor."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fastdcgan.benchmarks import harness
from fastdcgan.dispatch import primitives
from fastdcgan.spec import Operand

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


def _operand_bytes(a: Operand) -> int:
    return sum(t.nbytes for t in (a.x, a.y) if t is not None)


def _cost(name: str, args: tuple, result: object) -> _Cost:
    """FLOPs and bytes, every operand moved once."""
    out = result[0] if isinstance(result, tuple) else result
    assert isinstance(out, Tensor)
    if name in ("conv", "conv_transpose"):
        a, weight, epilogue = args[0], args[1], args[-2]
        positions = out if name == "conv" else a.x
        flops = 2.0 * positions.shape[0] * math.prod(positions.shape[2:]) * weight.numel()
        extra = epilogue.y.nbytes if epilogue.y is not None else 0
        return _Cost(flops, _operand_bytes(a) + weight.nbytes + out.nbytes + extra)
    if name == "weight_grad":
        gathered, linear = args[0], args[1]
        flops = 2.0 * linear.x.shape[0] * math.prod(linear.x.shape[2:]) * out.numel()
        return _Cost(flops, _operand_bytes(gathered) + _operand_bytes(linear) + out.nbytes)
    if name == "norm_act":
        return _Cost(0.0, _operand_bytes(args[0]) + out.nbytes)
    return _Cost(0.0, sum(t.nbytes for t in args if isinstance(t, Tensor)) + out.nbytes)


def _label(name: str, args: tuple, result: object) -> str:
    out = result[0] if isinstance(result, tuple) else result
    first = args[0].x if isinstance(args[0], Operand) else args[0]
    kinds = [a.kind for a in args if hasattr(a, "kind") and a.kind != "none"]
    sizes = f"{'x'.join(map(str, first.shape))} -> {'x'.join(map(str, out.shape))}"  # type: ignore[union-attr]
    return " ".join([name, sizes, *kinds])


_PRIMITIVES = (
    "conv",
    "conv_transpose",
    "weight_grad",
    "norm_act",
    "norm_act_reduce",
    "normalize",
    "normalize_backward",
)
_Entry = tuple[str, _Cost]


@contextlib.contextmanager
def _annotated(entries: list[_Entry | None]) -> Iterator[None]:
    """Inside a `with`, call number i of a primitive is a region of the trace, and `entries[i]` says what it was."""

    def wrapped(name: str) -> Callable:
        real = getattr(primitives, name)

        def call(*args):
            index = len(entries)
            entries.append(None)
            with record_function(f"{_PREFIX}{index}"):
                result = real(*args)
            entries[index] = (_label(name, args, result), _cost(name, args, result))
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name in _PRIMITIVES:
            stack.enter_context(mock.patch.object(primitives, name, wrapped(name)))
        yield


def trace(
    step: Callable[[], object], device: torch.device, path: Path | None, rates: Rates, calls: int = 3
) -> list[Share]:
    """Profile `calls` steps (eager ones: a captured step has no regions).

    Returns the primitives of one step with their time and floor, the longest first, and at last everything else.
    `path`: where a Chrome trace goes, if anywhere.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(2):
        step()
    entries: list[_Entry | None] = []
    with _annotated(entries), profile(activities=activities) as found:
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
        entry = entries[int(event.name.removeprefix(_PREFIX))]
        assert entry is not None
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
