"""The suite of bare contractions: right before it is timed, and against PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdcgan import backends
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.benchmarks import tables
from fastdcgan.benchmarks.contractions import LIBRARY, PARTS, run_layer
from fastdcgan.benchmarks.harness import Timing
from fastdcgan.benchmarks.results import Results, environment
from fastdcgan.benchmarks.shapes import NetShape
from fastdcgan.spec import Algorithm, Call

CPU = torch.device("cpu")
TIMING = Timing(2, 0.001)
NET = NetShape(16, ngf=4, ndf=4)


class Own(ReferenceBackend):
    """Stands in for a backend with kernels of its own; `scale` makes them wrong."""

    def __init__(self, scale: float = 1.0, error: Exception | None = None) -> None:
        self.scale, self.error = scale, error

    def algorithms(self, op: str) -> list[Algorithm]:
        return [
            Algorithm("own", lambda call: None, self.wrong),
            Algorithm("unable", lambda call: "it has no kernel", self.pytorch),
        ]

    def wrong(self, call: Call, tile: None) -> Any:
        if self.error is not None:
            raise self.error
        a = call.a._replace(x=call.a.x * self.scale)
        return self.pytorch(call._replace(a=a))


def run(monkeypatch: pytest.MonkeyPatch, own: Own, index: int = 0) -> list:
    monkeypatch.setattr(backends, "reasons", lambda *args: {"own": None, "absent": "it is not here"})
    own.name = "own"
    monkeypatch.setitem(backends._loaded, "own", own)
    blocks = (*NET.generator(), *NET.discriminator())
    return run_layer(blocks[index], 2, CPU, "fp32", TIMING)


@pytest.mark.parametrize("index", range(6))
def test_every_layer_and_part_is_right_and_timed(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    cases = run(monkeypatch, Own(), index)
    assert [case.part for case in cases] == list(PARTS)
    for case in cases:
        assert [row.peer for row in case.rows] == [LIBRARY, "own"]
        assert all(row.status == "ok" and len(row.samples_ms) == 2 for row in case.rows)
        assert case.reference == "own"
    table = tables.markdown(Results("bench", environment(CPU), cases), "contractions")
    assert len(table.splitlines()) == 2 + len(PARTS)
    assert "(own)" in table


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in run(monkeypatch, Own(1.001)):
        library, own = case.rows
        assert own.status == "wrong" and own.samples_ms == [] and "from float64" in own.detail
        assert library.status == "ok" and case.reference == LIBRARY


def test_a_failing_kernel_keeps_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    own = run(monkeypatch, Own(error=RuntimeError("no such tile")))[0].rows[1]
    assert (own.status, own.detail) == ("failed", "RuntimeError: no such tile")
