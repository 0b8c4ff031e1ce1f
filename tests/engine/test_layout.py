"""The strides of outputs and gradients are those of the plain modules, also where sizes of 1 leave a choice."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdcgan
from tests.helpers.twins import channels_last, numbers, one_thread, prepared, twin
from tests.machine import DEVICE

Named = dict[str, Tensor]


def passed(model: nn.Module, x: Tensor, backward: str | None) -> Named:
    """The output, and the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_(backward is not None)
    out = model(x)
    found = {"output": out}
    if backward is not None:
        da = numbers(*out.shape, dtype=out.dtype)
        da = channels_last(da) if backward == "channels_last" else da
        wanted = {"input": x} | dict(model.named_parameters())
        grads = torch.autograd.grad(out, list(wanted.values()), da, create_graph=backward == "create_graph")
        found |= dict(zip(wanted, grads, strict=True))
    return found


def assert_alike(fused: Named, plain: Named, close: float | None) -> None:
    for name, expected in plain.items():
        assert fused[name].stride() == expected.stride(), f"{name} of shape {list(expected.shape)}"
        if close is not None:
            bound = close * max(1.0, float(expected.detach().abs().max()))
            torch.testing.assert_close(fused[name], expected, rtol=close, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


ACTS = (None, lambda: nn.ReLU(), lambda: nn.LeakyReLU(0.2, True), lambda: nn.SiLU(True), lambda: nn.Tanh())
SMOOTH = (nn.SiLU, nn.Tanh)
CONVS = (nn.Conv2d, nn.ConvTranspose2d)


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Up to three blocks, and a shape for their input: with many ones."""
    channels = draw(st.sampled_from((1, 1, 2, 3, 17)))
    shape = (draw(st.sampled_from((1, 2, 16))), channels, *draw(st.tuples(*[st.sampled_from((1, 1, 2, 5))] * 2)))
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        out, kernel = draw(st.sampled_from((1, 1, 2, 16))), draw(st.sampled_from((1, 2, 3, 4)))
        transposed, stride = draw(st.booleans()), draw(st.integers(1, 2))
        padding = (kernel - 1) // 2 if transposed else kernel // 2
        conv = nn.ConvTranspose2d if transposed else nn.Conv2d
        if draw(st.booleans()):
            modules.append(nn.Upsample(scale_factor=2))
        order = draw(st.sampled_from(("conv, norm, act", "conv, norm, act", "conv, act, norm", "norm, act, conv")))
        act = draw(st.sampled_from(ACTS))
        of = {
            "conv": [conv(channels, out, kernel, stride, padding, bias=draw(st.booleans()))],
            "norm": [nn.BatchNorm2d(out)] if draw(st.booleans()) else [],
            "act": [] if act is None else [act()],
        }
        if order.startswith("norm"):  # an activation in place needs one
            of["norm"] = [nn.BatchNorm2d(channels)]
        modules.extend(module for name in order.split(", ") for module in of[name])
        channels = out
    model = nn.Sequential(*modules)
    if draw(st.booleans()):
        model.to(memory_format=torch.channels_last)
    return model.train(draw(st.booleans())), shape


@one_thread()
@given(
    chain=chains(),
    format=st.sampled_from(("contiguous", "channels_last", "permuted")),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    backward=st.sampled_from((None, "contiguous", "channels_last", "create_graph")),
)
@settings(max_examples=250)
def test_strides_and_values_are_those_of_the_plain_modules(
    chain: tuple[nn.Sequential, tuple[int, ...]], format: str, dtype: torch.dtype, backward: str | None, backend: str
) -> None:
    model, shape = copy.deepcopy(chain[0]).to(DEVICE, dtype), chain[1]
    x = numbers(*shape, dtype=dtype)
    if format == "channels_last":
        x = channels_last(x)
    elif format == "permuted":  # as from an NHWC array: other strides where a size is 1
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    fused = twin(model)
    assume(fastdcgan.backends.reasons(DEVICE.type, dtype)[backend] is None)
    try:
        plain = passed(model, x, backward)
    except ValueError as error:
        assume("more than 1 value per channel" not in str(error))
        raise
    smooth = all(isinstance(m, (*CONVS, nn.Upsample, nn.BatchNorm2d, *SMOOTH)) for m in model)
    close = {torch.float64: 1e-7, torch.float32: 1e-2 if smooth else None}.get(dtype)
    assert_alike(passed(fused, x, backward), plain, close)


def mnist_generator() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(100, 64, 7), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def to_one_pixel() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 8, 4))


def one_channel() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4), nn.Sigmoid())


NAMED = [(mnist_generator, (8, 100, 1, 1)), (to_one_pixel, (4, 3, 8, 8)), (one_channel, (4, 1, 8, 8))]


@one_thread()
@pytest.mark.parametrize(("factory", "shape"), NAMED)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_chains_that_turn_to_channels_last(factory, shape: tuple[int, ...], compiled: bool) -> None:
    model = factory().to(DEVICE)
    fused, x = twin(model), numbers(*shape, dtype=torch.float32)
    torch._dynamo.reset()
    run = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    expected = passed(model, x, "contiguous")
    x = x.requires_grad_()
    out = run(x)
    out.backward(numbers(*out.shape, dtype=torch.float32))
    wanted = {"input": x} | dict(fused.named_parameters())
    assert_alike({"output": out} | {name: p.grad for name, p in wanted.items()}, expected, 1e-2)
    assert out.view(len(out), -1).is_contiguous()
    torch._dynamo.reset()


def test_a_result_may_be_changed_in_place() -> None:
    """Also one whose strides were mended: it is no view."""
    x = channels_last(numbers(2, 3, 8, 8)).requires_grad_()
    out = twin(nn.Sequential(nn.Conv2d(3, 1, 3), nn.Tanh()).double().to(DEVICE))(x)
    out.add_(1).sum().backward()
    assert out.stride() == (36, 36, 6, 1)


def test_ddp_takes_the_gradients_as_they_are() -> None:
    fused = twin(prepared(one_channel()))
    fused(numbers(4, 1, 8, 8)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(p.grad.stride() == p.stride() for p in fused.parameters())
