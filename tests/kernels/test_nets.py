"""Whole small networks on the Triton backend, forward and backward, against vanilla PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Operand
from tests.helpers.contractions import conv_call
from tests.helpers.twins import assert_as_good, build, draw, results, settled_input
from tests.machine import DEVICE
from tests.models.dcgan import Discriminator, Generator

STEPS = 1
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "generator": (lambda: Generator(nz=20, ngf=4, pixels=16), (4, 20, 1, 1)),
    "discriminator": (lambda: Discriminator(ndf=8, pixels=16), (4, 3, 16, 16)),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        ),
        (2, 8, 4, 4),
    ),
}


@pytest.fixture(autouse=True)
def _on_triton(no_overflow_checks: None) -> Iterator[None]:
    with fastdcgan.backend("triton"):
        yield


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_forward_and_backward(name: str, train: bool) -> None:
    factory, shape = NETS[name]
    exact = settled_input(build(factory, torch.float64, DEVICE).train(train), shape, DEVICE, STEPS)
    truth = results(build(factory, torch.float64, DEVICE).train(train), exact, STEPS)
    x = exact.float()
    vanilla = results(build(factory, torch.float32, DEVICE).train(train), x, STEPS)
    ours = results(fastdcgan.fuse(build(factory, torch.float32, DEVICE)).train(train), x, STEPS)
    assert_as_good(ours, vanilla, truth)


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_twice_the_same_bits(name: str) -> None:
    factory, shape = NETS[name]
    x = draw(shape, torch.float32, DEVICE)
    first, second = (results(fastdcgan.fuse(build(factory, torch.float32, DEVICE)), x, STEPS) for _ in range(2))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_what_no_kernel_takes_has_a_reason() -> None:
    backend = backends.get("triton")

    def why(x: tuple[int, ...], groups: int = 1) -> str | None:
        a, w = Operand(torch.empty(x, device="meta")), torch.empty(4, x[1] // groups, 3, 3, device="meta")
        call = conv_call(a, w, Geometry((3, 3), (1, 1), (1, 1), groups=groups))
        return backend.algorithms("conv")[-1].why_not(call)

    assert why((2, 8, 4, 4)) is None
    assert "no groups" in why((2, 8, 4, 4), groups=2)
    assert "elements" in why((0, 8, 4, 4))
    assert "elements" in why((2**20, 2**11, 1, 1))
    assert "float64" in backend.why_not(DEVICE.type, torch.float64)
    assert "meta" in backend.why_not("meta", torch.float32)


def test_explain_says_what_pytorch_does() -> None:
    factory, shape = NETS["groups"]
    rows = fastdcgan.explain(fastdcgan.fuse(build(factory, torch.float32, DEVICE)), draw(shape, torch.float32, DEVICE))
    assert "pytorch: not triton image-side, triton flipped: 8 channels on the image's side" in rows[0].why
    assert "; not triton: the Triton contractions have no groups, and here are 2" in rows[0].why
    assert rows[1].why.startswith("triton") and "pytorch" not in rows[1].why


def test_an_empty_batch_runs() -> None:
    model = fastdcgan.fuse(nn.Sequential(nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.2))).to(DEVICE)
    out: Tensor = model(torch.randn(0, 8, 5, 5, device=DEVICE))
    assert out.shape == (0, 8, 3, 3)
