"""Profiling: every primitive of a step is found, with FLOPs and bytes that can be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastdcgan import backends
from fastdcgan.benchmarks import floors, profiling
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.profiling import Rates
from fastdcgan.benchmarks.runners import StepRunner
from fastdcgan.benchmarks.shapes import NetShape, inputs
from fastdcgan.spec import STORE, Epilogue, Operand

CPU = torch.device("cpu")
TINY = NetShape(16, ngf=8, ndf=8)


@pytest.fixture(autouse=True)
def _somewhere() -> Iterator[None]:
    """A backend that is everywhere: without the extension "auto" leaves blocks to PyTorch's own modules."""
    with backends.backend("reference"):
        yield


def runner() -> StepRunner:
    torch.manual_seed(0)
    return StepRunner(PEERS["train"], TINY.nets(), [inputs(TINY, 4)], CPU, torch.float32, graph=False)


def flat(*args: object) -> list[object]:
    """Arguments as an operator takes them, field by field, without the geometry."""
    return [field for arg in args for field in (arg if isinstance(arg, tuple) else (arg,))]


def test_costs_by_hand() -> None:
    x, w, y = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    flops, values = 2 * 2 * 16 * 5 * 3 * 16, {id(t): t.numel() for t in (x, w, y)}

    def of(*tensors: torch.Tensor) -> int:
        return 4 * sum(values[id(t)] for t in tensors)

    coef = torch.zeros(4, 1, 5)  # vectors are left out
    cost = profiling._cost("conv", flat(Operand(x), w, STORE, "reference"), y)
    assert cost == profiling._Cost(flops, of(x, w, y))
    epilogue = Epilogue("grad_stats", x)
    cost = profiling._cost("conv_transpose", flat(Operand(y, y, coef), w, epilogue, "reference"), x)
    assert cost == profiling._Cost(flops, of(y, y, w, x, x))
    cost = profiling._cost("weight_grad", flat(Operand(x), Operand(y), "reference"), w)
    assert cost == profiling._Cost(flops, of(x, y, w))
    cost = profiling._cost("norm_act", flat(Operand(y, y, coef), "reference"), y)
    assert cost == profiling._Cost(0, of(y, y, y))


def test_labels_have_sizes_and_the_epilogue() -> None:
    x, w, y = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    conv = "conv 2x3x8x8 -> 2x5x4x4"
    assert profiling._label("conv", flat(Operand(x), w, STORE, "reference"), y) == conv
    assert profiling._label("conv", flat(Operand(x), w, Epilogue("stats"), "reference"), y) == f"{conv} stats"
    assert profiling._label("norm_act", flat(Operand(y), "reference"), y) == "norm_act 2x5x4x4 -> 2x5x4x4"


def test_a_trace_has_every_primitive(tmp_path: Path) -> None:
    step, path = runner(), tmp_path / "folder" / "trace.json"
    shares = profiling.trace(step, CPU, path, Rates(1e12, 1e12))
    *each, rest = shares
    assert rest.what == "everything else, and gaps" and rest.ms > 0
    assert all(share.ms > 0 and share.floor_ms > 0 and share.calls >= 1 for share in each)
    assert [share.ms for share in each] == sorted((share.ms for share in each), reverse=True)
    names = {share.what.split(" ")[0] for share in each}
    assert names >= {"conv", "conv_transpose", "weight_grad", "norm_act"}
    # G backwards and forwards, D three times forwards (two of them as one batch), as `floors` counts them.
    contractions = sum(
        share.calls for share in each if share.what.split(" ")[0] in ("conv", "conv_transpose", "weight_grad")
    )
    g, d = len(TINY.generator()), len(TINY.discriminator())
    assert contractions == (g + (g - 1) + g) + (d + (d - 1) + d) + (d + d)
    assert "traceEvents" in json.loads(path.read_text())


def test_floors_of_a_trace_are_those_that_are_counted() -> None:
    shares = profiling.trace(runner(), CPU, None, Rates(1.0, 1e30), calls=1)
    assert sum(share.floor_ms for share in shares) == pytest.approx(1e3 * floors.step_flops(TINY, 4))


def test_ceilings_are_plausible() -> None:
    rates = profiling.ceilings(CPU, torch.float32, 64, 2**16, 1e-3)
    assert 1e6 < rates.flops_per_s < 1e15
    assert 1e6 < rates.bytes_per_s < 1e15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_and_host_time_of_a_gpu() -> None:
    x, device = torch.ones(1024, device="cuda"), torch.device("cuda")
    assert profiling.kernels(lambda: x + x, device) == 1
    assert profiling.kernels(lambda: (x + x) * x, device) == 2
    assert 0 < profiling.host_ms(lambda: x + x, device) < 1e3
