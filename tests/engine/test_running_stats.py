"""Running statistics: on the reference backend the bits that PyTorch computes, on any backend the same counters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan import functional
from tests.helpers.twins import block, channels_last, in_dtype, numbers, twin
from tests.machine import DEVICE

on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="PyTorch's kernel for other devices rounds in another order")


def after(
    model: nn.Module, steps: int, dtype: torch.dtype, layout: object = torch.Tensor.contiguous
) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    for step in range(steps):
        model(layout(3 * numbers(5, 4, 8, 6, dtype=dtype, seed=step) + step))  # type: ignore[operator]
    return dict(model.named_buffers())


@on_cpu
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("momentum", [0.1, 0.3, 1 / 3, 0.9, 0.0, 1.0, None])
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_are_pytorchs(transposed: bool, momentum: float | None, layout: object) -> None:
    for dtype in (torch.float32, torch.float64):
        model = block(transposed, "train", "relu", bias=False, momentum=momentum).to(dtype)
        with fastdcgan.backend("reference"):
            found = after(twin(model), 4, dtype, layout)
        for name, value in after(model, 4, dtype, layout).items():
            assert torch.equal(found[name], value), (dtype, name)


@on_cpu
def test_bits_with_two_statistics_groups_are_those_of_two_passes() -> None:
    model = block(False, "train", "relu", bias=False, momentum=0.3).float()
    x = numbers(6, 4, 8, 6, dtype=torch.float32)
    for momentum in (0.3, None):
        model[1].momentum = momentum
        fused, vanilla = twin(model), copy.deepcopy(model)
        with fastdcgan.backend("reference"):
            fused(x, stat_groups=3)
        for part in x.chunk(3):
            vanilla(part)
        for name, value in vanilla.named_buffers():
            assert torch.equal(dict(fused.named_buffers())[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_every_backend_has_the_statistics_up_to_rounding(
    momentum: float | None, dtype: torch.dtype, backend: str
) -> None:
    model = in_dtype(block(False, "train", "relu", momentum=momentum), dtype)
    truth = (
        after(in_dtype(model, torch.float64), 3, torch.float64) if dtype == torch.float32 else after(model, 3, dtype)
    )
    for name, value in after(twin(model), 3, dtype).items():
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=rounding, atol=rounding)


def test_buffers_are_updated_in_place(backend: str) -> None:
    model = twin(block(False, "train", "relu", momentum=None).float())
    before = {name: (buffer, buffer.data_ptr(), buffer.clone()) for name, buffer in model.named_buffers()}
    for _ in range(2):
        model(numbers(4, 4, 6, 6, dtype=torch.float32)).sum().backward()
    assert int(model[1].num_batches_tracked) == 2
    for name, (buffer, pointer, value) in before.items():
        assert dict(model.named_buffers())[name] is buffer
        assert buffer.data_ptr() == pointer
        assert not torch.equal(buffer, value)


@pytest.mark.parametrize("case", ["eval", "no tracking", "tracking switched off", "functional eval"])
def test_nothing_is_updated(case: str, backend: str) -> None:
    model = twin(block(False, "eval" if case == "eval" else "train", "relu", track=case != "no tracking").float())
    if case == "tracking switched off":
        model[1].track_running_stats = False
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = numbers(4, 4, 6, 6, dtype=torch.float32)
    if case == "functional eval":
        conv, norm = model[0], model[1]
        functional.conv_bn_act(x, conv.weight, running_mean=norm.running_mean, running_var=norm.running_var)
    else:
        model(x).sum().backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_no_counter() -> None:
    """A batch norm without num_batches_tracked; with momentum None, running statistics then stay as they were."""
    for momentum in (0.1, None):
        model = block(False, "train", "relu", momentum=momentum)
        model[1].num_batches_tracked = None
        found, expected = after(twin(model), 2, torch.float64), after(model, 2, torch.float64)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_tracking_switched_off_uses_the_batch() -> None:
    model = block(False, "train", "relu")
    model[1].track_running_stats = False
    x = numbers(4, 4, 6, 6)
    torch.testing.assert_close(twin(model)(x), model(x))
    model.eval()  # PyTorch then takes the running statistics that are still there
    torch.testing.assert_close(twin(model)(x), model(x))
