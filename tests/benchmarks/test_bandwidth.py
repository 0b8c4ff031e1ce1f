"""The bandwidth part of gpu-check: what it runs and counts."""

from __future__ import annotations

import pytest
import torch

from fastdcgan import backends
from fastdcgan.backends.base import Backend
from fastdcgan.benchmarks import bandwidth
from fastdcgan.spec import Operand


class CountingBackend(Backend):
    """Counts the bytes of the tensors that each pass takes and gives, per-channel vectors left out."""

    name = "counting"

    def __init__(self) -> None:
        self.inner = backends.get("reference")
        self.tensors = 0

    def norm_act(self, a: Operand) -> torch.Tensor:
        self.tensors += 2 + (a.y is not None)
        return self.inner.norm_act(a)

    def norm_act_reduce(self, *args):
        self.tensors += 2
        return self.inner.norm_act_reduce(*args)

    def grad_stats(self, *args):
        self.tensors += 3
        return self.inner.grad_stats(*args)

    def batch_stats(self, *args):
        self.tensors += 1
        return self.inner.batch_stats(*args)

    def coefficients(self, *args):
        return self.inner.coefficients(*args)

    def grad_coefficients(self, *args):
        return self.inner.grad_coefficients(*args)


def test_passes_count_what_they_move() -> None:
    backend = CountingBackend()
    y = torch.randn(2, 3, 4, 4)
    for name, (run, tensors) in bandwidth.passes(backend, y, y).items():
        backend.tensors = 0
        run()
        assert backend.tensors == tensors, name


def test_every_pass_of_every_layer_is_measured() -> None:
    found = bandwidth.measure("reference", 2, torch.device("cpu"), torch.float32, dry=True)
    assert {entry.name for entry in found} == set(
        bandwidth.passes(backends.get("reference"), *[torch.ones(1, 1, 2, 1)] * 2)
    )
    for entry in found:
        assert entry.shape == (2, *bandwidth.DRY_LAYERS[0]) and entry.dtype == "float32"
        assert entry.bytes_per_s > 0 and 0 < entry.q1 <= entry.fraction <= entry.q3
    table = bandwidth.markdown(bandwidth.as_entries(found))
    assert len(table.splitlines()) == 2 + len(found) and "2x8x4x4" in table


@pytest.mark.parametrize("fraction", [0.5, 0.876])
def test_the_table_says_the_fraction(fraction: float) -> None:
    entry = bandwidth.Bandwidth("cuda", "norm_act", (1, 2, 3, 4), "bfloat16", 1.5e12, fraction, 0.4, 0.9)
    row = bandwidth.markdown(bandwidth.as_entries([entry])).splitlines()[-1]
    assert row == f"| cuda | norm_act | 1x2x3x4 | bfloat16 | 1500 | {fraction:.0%} (40% to 90%) |"


def test_image_side_layers_and_training_are_measured() -> None:
    device = torch.device("cpu")
    work = bandwidth.image_side(backends.get("reference"), 2, device, torch.bfloat16, dry=True)
    assert [each.name for each in work] == ["image conv", "image conv_transpose", "image weight_grad"]
    assert {each.moved for each in work} == {2 * (2 * 3 * 8 * 8 + 2 * 16 * 4 * 4)}
    work += bandwidth.training(2, device, dry=True)
    adam, images = work[-2:]
    assert adam.moved == 28 * adam.shape[0] and images.moved == 3 * 2 * 32 * 32 * 3
    for entry, each in zip(bandwidth.measure_work("reference", work, device, dry=True), work, strict=True):
        assert (entry.name, entry.shape, entry.dtype) == (each.name, each.shape, str(each.dtype).removeprefix("torch."))
        assert entry.bytes_per_s > 0 and entry.fraction > 0
