"""The check of contractions by themselves: what it runs, and that it finds what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdcgan.backends import cuda_tiles
from fastdcgan.backends.base import Backend
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.benchmarks import kernel_check
from fastdcgan.benchmarks.kernel_check import FORMS, OPS
from fastdcgan.spec import Algorithm, Call
from tests.cuda_on_cpu.host_programs import needs_compiler

CPU = torch.device("cpu")


class Own(ReferenceBackend):
    """PyTorch's own convolutions as an algorithm that can be wrong: one value of so many."""

    def __init__(self, wrong: float = 0.0, error: Exception | None = None) -> None:
        self.wrong, self.error = wrong, error

    def algorithms(self, op: str) -> list[Algorithm]:
        return [Algorithm("own", lambda call: None, self.run)]

    def run(self, call: Call, tile: None) -> Any:
        if self.error is not None:
            raise self.error
        found = self.pytorch(call)
        if self.wrong:
            out = found if isinstance(found, torch.Tensor) else found[0]
            out[0, 0, 0, 0] += self.wrong * float(out.float().norm())
        return found


def check(on: Backend, share: tuple[int, int] = (0, 1), tiles: list[int] | None = None) -> kernel_check.Checked:
    return kernel_check.check(on, CPU, tiles, share, True, lambda text: None)


def test_every_form_is_run_once_by_all_shares_together() -> None:
    counts = [check(Own(), (i, 5)).count for i in range(5)]
    assert sum(counts) == 2 * len(FORMS) == 2 * (2 * 3 * 5 + 3 * 3)
    assert {op for op, _, _ in FORMS} == set(OPS)


def test_what_is_wrong_is_named() -> None:
    assert not check(Own()).wrong
    found = check(Own(wrong=0.01), (0, 10))
    assert len(found.wrong) == found.count > 0
    assert "own conv none none (8, 16) bf16: " in found.wrong[0] and "from float64, expected at most" in found.wrong[0]
    found = check(Own(error=RuntimeError("an illegal instruction")), (0, 40))
    assert found.wrong[0].endswith(": RuntimeError: an illegal instruction") and len(found.wrong) == found.count


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The CUDA library on the CPU, whose tiles are those of a GPU of compute capability 9.0."""
    from tests.cuda_on_cpu.host_library import HostCUDABackend

    backend = HostCUDABackend()
    backend.require()
    monkeypatch.setattr(cuda_tiles, "device_of", lambda device: cuda_tiles.H100)
    monkeypatch.setattr(kernel_check, "DRY_CHANNELS", ((64, 72),))
    return backend


@needs_compiler
@pytest.mark.compiles
@pytest.mark.parametrize("number", range(len(cuda_tiles.TILES)))
def test_tiles_of_the_cuda_library(number: int, shim: Backend) -> None:
    found = check(shim, (number, 31), [number])
    assert found.count > 0 and not found.wrong
