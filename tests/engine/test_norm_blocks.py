"""Blocks without a convolution: norms in front of one (pre-activation), and norms behind an activation."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan.engine import planner
from fastdcgan.engine.match import Alone, segments
from fastdcgan.spec import Boundaries, Plan
from tests.engine.test_saved_memory import saved_bytes
from tests.helpers.tolerance import assert_same_float64
from tests.helpers.twins import (
    assert_as_good,
    assert_same,
    channels_last,
    in_dtype,
    numbers,
    one_thread,
    outcome,
    prepared,
    subsets,
    twin,
    without_kinks,
)

Norms = Callable[[int], nn.Module]
SHAPE = (4, 4, 6, 6)


def preactivated(norm: Norms = nn.BatchNorm2d, width: int = 4) -> nn.Sequential:
    """A residual block's, as SN-GAN's generator has it, but for the up-sampling."""
    return prepared(
        nn.Sequential(
            norm(width), nn.ReLU(inplace=True), nn.Conv2d(width, width + 1, 3, 1, 1, bias=False),
            norm(width + 1), nn.ReLU(inplace=True), nn.ConvTranspose2d(width + 1, width, 4, 2, 1),
        )
    )  # fmt: skip


def activated_first(norm: Norms = nn.BatchNorm2d, width: int = 4) -> nn.Sequential:
    """Convolution, activation, norm; once with a Dropout in between: the norm is in front of a convolution then."""
    return prepared(
        nn.Sequential(
            nn.Conv2d(width, width + 1, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True), norm(width + 1),
            nn.ConvTranspose2d(width + 1, width, 4, 2, 1), nn.Tanh(), norm(width), nn.SiLU(),
            nn.Dropout(0.0), norm(width), nn.Conv2d(width, 3, 3, padding=1), nn.LeakyReLU(0.2), norm(3),
        )
    )  # fmt: skip


NETS = [preactivated, activated_first]
NORMS: dict[str, Norms] = {
    "batch": nn.BatchNorm2d,
    "cumulative": lambda width: nn.BatchNorm2d(width, momentum=None, affine=False),
    "not tracked": lambda width: nn.BatchNorm2d(width, track_running_stats=False),
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
    "instance, plain": nn.InstanceNorm2d,
    "sync": nn.SyncBatchNorm,
}


def patterns(model: nn.Sequential) -> list[list[str] | str]:
    """Each chain's blocks; in between, the modules that are called as they are."""
    return [
        type(part.module).__name__ if isinstance(part, Alone) else [block.pattern for block in part.blocks]
        for part in segments(model)
    ]


def test_where_a_block_begins() -> None:
    assert patterns(preactivated()) == [["BatchNorm2d + ReLU", "Conv2d + BatchNorm2d + ReLU", "ConvTranspose2d"]]
    assert patterns(activated_first()) == [
        ["Conv2d + LeakyReLU", "BatchNorm2d", "ConvTranspose2d + Tanh", "BatchNorm2d + SiLU"],
        "Dropout",
        ["BatchNorm2d", "Conv2d + LeakyReLU", "BatchNorm2d"],
    ]
    # A norm that nothing can be fused to runs as it is, and so does an activation that no norm comes before.
    pool = nn.MaxPool2d(2)
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert patterns(nn.Sequential(nn.BatchNorm2d(4), pool, nn.ReLU(), nn.BatchNorm2d(4), conv, pool)) == [
        "BatchNorm2d", "MaxPool2d", "ReLU", "BatchNorm2d", ["Conv2d"], "MaxPool2d",
    ]  # fmt: skip
    assert patterns(nn.Sequential(nn.InstanceNorm2d(4), nn.Identity(), nn.ELU(), pool)) == [
        ["InstanceNorm2d + ELU"], "MaxPool2d",
    ]  # fmt: skip
    # Autocast on a GPU makes float32 of Softplus, and the norm behind it keeps that.
    assert len(patterns(nn.Sequential(conv, nn.Softplus(), nn.BatchNorm2d(4), nn.Tanh()))) == 2


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("net", NETS)
@one_thread()
def test_vanilla_in_float64(net: Callable[..., nn.Sequential], norm: str, train: bool) -> None:
    model = net(NORMS[norm]).train(train)
    for boundaries, layout in itertools.product(("deferred", "finished"), (torch.Tensor.contiguous, channels_last)):
        fused = twin(model)
        fused.boundaries = boundaries
        x = layout(numbers(*SHAPE))
        assert_same(outcome(fused, x, steps=2), outcome(model, x, steps=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("boundaries", ["deferred", "finished"])
@pytest.mark.parametrize("net", NETS)
@one_thread()
def test_as_accurate_as_vanilla(
    net: Callable[..., nn.Sequential], boundaries: str, dtype: torch.dtype, backend: str
) -> None:
    # Of fewer channels, or with nothing but a Dropout between two norms, a vector's error is a matter of luck.
    low = in_dtype(without_kinks(net(width=32))[:7], dtype)
    for x in (numbers(8, 32, 6, 6, dtype=dtype), channels_last(numbers(8, 32, 6, 6, dtype=dtype))):
        fused, truth = twin(low), outcome(in_dtype(low, torch.float64), x.double())
        fused.boundaries = boundaries
        found, vanilla = outcome(fused, x), outcome(low, x)
        assert_as_good(found, vanilla, truth, reduction=8 * 12 * 12 * 32)
        assert found["output"].stride() == vanilla["output"].stride()  # type: ignore[union-attr]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("net", NETS)
@one_thread()
def test_no_choice_of_the_plan_changes_the_result(
    net: Callable[..., nn.Sequential], train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, real, seen = net().train(train), planner.plan, set()
    expected = outcome(model, numbers(*SHAPE))
    for flags in itertools.product((True, False), repeat=3):

        def plan(*args: Any, flags: tuple[bool, ...] = flags) -> Plan:
            made = real(*args)
            n = len(made.blocks)
            seen.add(choice := Boundaries((flags[0],) * (n - 1), (flags[1],) * (n - 1), (flags[2],) * n))
            return dataclasses.replace(made, boundaries=choice)

        monkeypatch.setattr(planner, "plan", plan)
        assert_same(outcome(twin(model), numbers(*SHAPE)), expected)
    assert len(seen) >= 8


@pytest.mark.parametrize("train", [True, False])
@one_thread()
def test_exactly_the_gradients_that_are_asked_for(train: bool) -> None:
    model = prepared(nn.Sequential(nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.ELU(), nn.BatchNorm2d(3)))
    model.train(train)
    names = [name for name, _ in model.named_parameters()]
    some = [asked for asked in subsets(["x", *names]) if len(asked) in (0, 1, 2, len(names))]
    for asked, boundaries in itertools.product(some, ("deferred", "finished")):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in asked)
        fused, needs = twin(model), "x" in asked
        fused.boundaries = boundaries
        assert_same(outcome(fused, numbers(*SHAPE), needs), outcome(model, numbers(*SHAPE), needs))


def test_the_input_is_left_alone(backend: str) -> None:
    """By an activation in place too, which writes to the norm's output; one that comes first writes to the input."""
    for grad, train in itertools.product((True, False), repeat=2):
        model, x = twin(preactivated()).float().train(train), numbers(*SHAPE, dtype=torch.float32)
        for layout in (torch.Tensor.contiguous, channels_last, lambda t: t[:, :, :1, :1]):
            given = layout(x)
            before = given.clone()
            with torch.set_grad_enabled(grad):
                out = model(given)
            if grad:
                out.sum().backward()
            assert torch.equal(given, before)
    first = nn.Sequential(nn.LeakyReLU(0.2, True), *preactivated()).float()
    for model in (first, twin(first)):
        x = numbers(*SHAPE, dtype=torch.float32)
        given = x * 1
        model(given)
        assert torch.equal(given, nn.functional.leaky_relu(x, 0.2))


def test_a_change_of_its_input_is_noticed() -> None:
    for model in (preactivated(), twin(preactivated())):
        x = numbers(*SHAPE).requires_grad_() * 1
        out = model(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_autocast_casts_no_norms_input(
    net: Callable[..., nn.Sequential], train: bool, dtype: torch.dtype, backend: str
) -> None:
    """Statistics of a mean far from zero would be those of its rounding."""
    model = without_kinks(net()).float().train(train)
    x, found = (numbers(*SHAPE, dtype=torch.float32) * 0.1 + 50).to(dtype), []
    for each in (copy.deepcopy(model), twin(model)):
        leaf = x.clone().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16):
            out = each(leaf)
            again = each(leaf)
        out.float().square().mean().backward()
        found.append([out, again, leaf.grad, *(p.grad for p in each.parameters()), *each.buffers()])
    for vanilla, ours in zip(*found, strict=True):
        assert ours.dtype == vanilla.dtype
        scale = float(vanilla.detach().float().abs().max().clamp(min=0.1))
        assert float((ours.float() - vanilla.float()).abs().max()) <= 0.1 * scale


@pytest.mark.parametrize("net", NETS)
def test_two_statistics_groups_are_two_passes(net: Callable[..., nn.Sequential]) -> None:
    model = net()
    once, twice, x = twin(model), copy.deepcopy(model), numbers(*SHAPE)
    found = outcome(once, x, stat_groups=2)
    halves = x.clone().requires_grad_()
    out = torch.cat([twice(half) for half in halves.chunk(2)])
    out.backward(numbers(*out.shape, seed=7))
    expected = {"output": out.detach(), "input gradient": halves.grad}
    expected |= {f"gradient of {name}": p.grad for name, p in twice.named_parameters()} | dict(twice.named_buffers())
    assert_same(found, expected)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_gradients_of_gradients(net: Callable[..., nn.Sequential], train: bool) -> None:
    model, results = without_kinks(net()).train(train), []
    for each in (twin(model), copy.deepcopy(model)):
        x = numbers(*SHAPE).requires_grad_()
        (slope,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        results.append([slope, *torch.autograd.grad(slope.square().sum(), [x, *each.parameters()], allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        if expected is None:  # the last norm's bias, which only shifts the output
            assert found is None or not found.any()
        else:
            assert_same_float64(found, expected, "gradient", 1e-8)


@pytest.mark.parametrize("net", NETS)
def test_empty_and_other_shapes(net: Callable[..., nn.Sequential]) -> None:
    model = net()
    assert_same(outcome(twin(model), numbers(0, *SHAPE[1:])), outcome(model, numbers(0, *SHAPE[1:])))
    model = net(nn.InstanceNorm2d)
    assert_same(outcome(twin(model), numbers(*SHAPE[1:])), outcome(model, numbers(*SHAPE[1:])))
    for bad in (numbers(4, 4), numbers(*SHAPE[1:]), numbers(4, 5, 6, 6)):
        before = copy.deepcopy(net().state_dict())
        for model in (net(), twin(net())):
            with pytest.raises((RuntimeError, ValueError)):
                model(bad)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    flat = nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU(), nn.Identity()).double()
    fused = fastdcgan.FusedSequential(*copy.deepcopy(flat))
    assert_same(outcome(fused, numbers(5, 4).cpu()), outcome(flat, numbers(5, 4).cpu()))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_compiled(net: Callable[..., nn.Sequential], train: bool) -> None:
    model = net().train(train)
    torch._dynamo.reset()
    compiled = torch.compile(twin(model), fullgraph=True, backend="aot_eager")
    x, y = numbers(*SHAPE).requires_grad_(), numbers(*SHAPE).requires_grad_()
    out, expected = compiled(x), model(y)
    assert_same_float64(out, expected, "output")
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_same_float64(x.grad, y.grad, "input gradient", 1e-8)
    torch._dynamo.reset()


def test_hooks_on_a_norm_and_its_activation() -> None:
    for where in (0, 1, 3):
        seen: list[list[Tensor]] = []
        for model in (preactivated(), twin(preactivated())):
            given: list[Tensor] = []
            model[where].register_forward_hook(lambda m, x, out, given=given: given.append(out.clone()))
            outcome(model, numbers(*SHAPE))
            seen.append(given)
        (vanilla,), (fused,) = seen
        assert_same_float64(fused, vanilla, "what the hook saw")


def test_a_deferred_chain_stores_no_activation(backend: str) -> None:
    """The input and the raw outputs alone, where the plain modules keep each norm's activated output too."""
    model, x = preactivated(width=8).float(), channels_last(numbers(8, 8, 16, 16, dtype=torch.float32))
    fused = twin(model)
    fused.boundaries = "deferred"
    raw = 8 * 9 * 16 * 16 * 4
    assert raw <= saved_bytes(fused, x) <= raw + 16 * 4 * 16
    assert saved_bytes(model, x) >= raw + 8 * 9 * 16 * 16 * 4
