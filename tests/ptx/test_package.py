"""The package's own way to the GPU, from its public functions down to nvcc's PTX on the machine, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdcgan.backends import cuda_facts
from fastdcgan.functional import bce_with_logits, normalize_images
from fastdcgan.optim import FusedAdam
from tests.csrc.cuda.compiling import needs_nvcc
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.twins import (
    assert_as_good,
    channels_last,
    in_dtype,
    numbers,
    outcome,
    prepared,
    twin,
    without_kinks,
)
from tests.ptx.cuda_kernels import package_on
from tests.ptx.interpreter import Machine

pytestmark = [needs_nvcc, needs_compiler, pytest.mark.compiles]


def down() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(16, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 72, 4, 2, 1, bias=False), nn.BatchNorm2d(72), nn.LeakyReLU(0.2),
    )  # fmt: skip


def up() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(72, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("make", [down, up])
def test_a_chain_of_two_blocks(make: type, capability: int, dtype: torch.dtype) -> None:
    """Forward and backward."""
    model = prepared(make())
    low = in_dtype(model if dtype == torch.float32 else without_kinks(model), dtype)
    x = channels_last(numbers(2, 16, 16, 16, dtype=dtype) if make is down else numbers(2, 72, 4, 4, dtype=dtype))
    machine = Machine("random")
    with package_on(machine, capability):
        found = outcome(twin(low), x)
    uses_sm90 = any("sm90_contraction" in kernel for kernel in machine.launched)
    assert len(machine.launched) > 15 and uses_sm90 == (capability == 90 and dtype == torch.bfloat16)
    assert_as_good(found, outcome(low, x), outcome(in_dtype(low, torch.float64), x.double()), reduction=2 * 64 * 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adam(dtype: torch.dtype) -> None:
    """Tensors of any alignment, and one of several chunks; parameters of 16 bits follow those that they stand for."""
    weights = [
        nn.Parameter(numbers(*shape).to(dtype)) for shape in ((), (17,), (6, 3, 4, 4), (cuda_facts.ADAM_CHUNK + 5,))
    ]
    others = [[nn.Parameter(w.detach().to(other)) for w in weights] for other in (torch.float32, torch.float64)]
    machine = Machine("random")
    with package_on(machine, 80):
        ours = FusedAdam(weights, lr=1e-2, betas=(0.5, 0.999), weight_decay=0.1)
        optimizers = [
            ours,
            *(torch.optim.Adam(params, lr=1e-2, betas=(0.5, 0.999), weight_decay=0.1) for params in others),
        ]
        for step in range(3):
            for params, optimizer in zip((weights, *others), optimizers, strict=True):
                for k, w in enumerate(params):
                    w.grad = numbers(*w.shape, seed=4 * step + k).to(dtype).to(w.dtype)
                optimizer.step()
    assert len(machine.launched) >= 3
    for w, usual, true in zip(weights, *others, strict=True):
        found = w.detach() if dtype == torch.float32 else ours.state[w]["master"]
        assert_as_accurate(found, usual.detach(), true.detach(), f"weights {list(w.shape)}", reduction=3)
        assert torch.equal(w, found.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_images(dtype: torch.dtype) -> None:
    logits = numbers(2 * 3001, dtype=dtype).requires_grad_()
    pixels = torch.randint(0, 256, (3, 7, 9, 3), dtype=torch.uint8)
    flip = torch.tensor([True, False, True])
    machine = Machine("random")
    with package_on(machine, 80):
        losses, probabilities = bce_with_logits(logits, (0.9, 0.0))
        losses.sum().backward()
        images = normalize_images(pixels, flip, dtype)
    assert len(machine.launched) >= 2
    usual, true = (logits.detach().to(other).view(2, -1).requires_grad_() for other in (torch.float32, torch.float64))
    for x in (usual, true):
        x.losses = F.binary_cross_entropy_with_logits(
            x, x.new_tensor([[0.9], [0.0]]).expand_as(x), reduction="none"
        ).mean(1)
        x.losses.sum().backward()
    assert_as_accurate(losses.detach(), usual.losses.detach(), true.losses.detach(), "losses", reduction=3001)
    assert_as_accurate(probabilities, usual.detach().sigmoid().mean(1), true.detach().sigmoid().mean(1), reduction=3001)
    assert_as_accurate(logits.grad.view(2, -1), usual.grad.to(dtype), true.grad, "gradient", scale=1 / 3001)
    expected = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    assert torch.equal(images, torch.where(flip[:, None, None, None], expected.flip(3), expected).to(dtype))
