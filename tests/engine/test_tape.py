"""Recorded operators against the Python that called them: the same bits, and the same left behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.dispatch import autotune, router
from fastdcgan.engine import autograd, tape
from fastdcgan.engine.program import Program
from tests.helpers.networks import VARIANTS
from tests.helpers.twins import build, draw, numbers, one_thread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    try:
        backends.get("cpu").require()
    except fastdcgan.spec.Unavailable as error:
        pytest.skip(str(error))
    with fastdcgan.backend("cpu"), one_thread():
        yield


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A tape for each time that one runs."""
    found: list[Any] = []

    class Counted:
        def __init__(self, recorded: Any) -> None:
            self.recorded = recorded

        def run(self, inputs: list[Tensor | None]) -> Any:
            found.append(self.recorded)
            return self.recorded.run(inputs)

    made = tape._Recorder.tape

    def counted(recorder: Any, outputs: Any) -> Any:
        recorded = made(recorder, outputs)
        return None if recorded is None else Counted(recorded)

    monkeypatch.setattr(tape._Recorder, "tape", counted)
    return found


def passes(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What calls of every kind leave behind, by name; of tensors also strides, of buffers versions."""
    found: dict[str, Any] = {}
    for mode in ("train", "eval"):
        model.train(mode == "train")
        for step in range(4):
            torch.manual_seed(step)  # dropout
            leaf = x.clone().requires_grad_()
            out = model(leaf * 1)
            (out * draw(tuple(out.shape), out.dtype, out.device, step)).sum().backward()
            with torch.no_grad():
                found |= {f"{mode} {step}": out, f"{mode} {step} input": leaf.grad, f"{mode} {step} alone": model(x)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return found | {f"version of {name}": b._version for name, b in model.named_buffers()}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", VARIANTS)
def test_bits_strides_and_versions(name: str, last: bool, replays: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    factory, shape = VARIANTS[name]
    x = draw(shape, torch.float32, CPU)
    format = torch.channels_last if last and x.dim() == 4 else torch.contiguous_format

    def run() -> dict[str, Any]:
        model = build(factory, torch.float32, CPU).to(memory_format=format)
        return passes(fastdcgan.fuse(model), x.contiguous(memory_format=format))

    found = run()
    with monkeypatch.context() as m:
        m.setattr(Program, "taped", lambda program, key, inputs, call: call())
        ran = len(replays)
        expected = run()
        assert len(replays) == ran
    assert found.keys() == expected.keys()
    for each, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[each], value) and found[each].stride() == value.stride(), each
        else:
            assert found[each] == value, each


def two_blocks() -> nn.Sequential:
    blocks = [nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)]
    return fastdcgan.fuse(nn.Sequential(*blocks, nn.Conv2d(4, 5, 3, 2, 1), nn.Tanh()))


def step(net: nn.Module, x: Tensor) -> None:
    net(x).sum().backward()


def test_the_second_call_is_recorded_and_later_ones_replayed(replays: list[Any]) -> None:
    net, x = two_blocks(), numbers(2, 3, 8, 8, dtype=torch.float32)
    for calls in range(5):
        assert len(replays) == 2 * max(calls - 2, 0)  # a forward and a backward
        step(net, x)
    step(net, x.repeat(2, 1, 1, 1))  # of another batch
    net.eval()
    step(net, x)
    assert len(replays) == 6
    assert "not measured" in str(fastdcgan.explain(net, x))  # it sees the contractions themselves


def test_what_may_still_be_measured_is_not_recorded(replays: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a tape of what the rules choose doesn't run where measured times count."""
    net, x = two_blocks(), numbers(2, 3, 8, 8, dtype=torch.float32)
    for _ in range(3):
        step(net, x)
    assert len(replays) == 2
    monkeypatch.setattr(autotune, "consulted", lambda device: True)
    monkeypatch.setattr(autotune, "may_begin", lambda calls: False)
    calls: list[int] = []
    forward = autograd.forward
    monkeypatch.setattr(autograd, "forward", lambda *args, **how: (calls.append(1), forward(*args, **how))[1])
    for _ in range(3):
        step(net, x)
    assert len(replays) == 2 and len(calls) == 3
    settled = router.route
    monkeypatch.setattr(router, "route", lambda call, backend: settled(call, backend)._replace(settled=True))
    other = two_blocks()
    for _ in range(4):
        step(other, x)
    assert len(replays) == 6 and len(calls) == 5


def untied(net: nn.Sequential) -> None:
    net[3].weight = nn.Parameter(net[0].weight.detach() * 2)


def other_buffers(net: nn.Sequential) -> None:
    net[1].running_mean, net[1].running_var = torch.zeros(3, 2)[:, 1], torch.ones(6)[::2]


def own_buffers(net: nn.Sequential) -> None:
    net[4].running_mean, net[4].running_var = net[1].running_mean.clone(), net[1].running_var.clone()


@pytest.mark.parametrize("change", [untied, other_buffers, own_buffers, lambda net: None])
def test_tensors_that_were_one(change: Callable[[Any], None], replays: list[Any]) -> None:
    """A weight, running statistics, the input and the gradient that comes back; and running statistics with gaps."""
    results = []
    for fuse in (fastdcgan.fuse, lambda model: model):
        torch.manual_seed(0)
        blocks = [nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU()]
        net = nn.Sequential(*blocks, nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3))
        net[3].weight, net[4].running_mean, net[4].running_var = net[0].weight, net[1].running_mean, net[1].running_var
        net, x = fuse(net), numbers(2, 3, 8, 8, dtype=torch.float32)
        for _ in range(4):
            net(x).backward(x)
        change(net)
        for seed in range(2, 6):
            out = net(x)
            out.backward(numbers(*out.shape, dtype=torch.float32, seed=seed))
        results.append([out, *(p.grad for p in net.parameters()), *net.buffers()])
    assert len(replays) > 6
    for ours, vanilla in zip(*results, strict=True):
        torch.testing.assert_close(ours, vanilla, rtol=1e-4, atol=1e-4)


def replayed(call: Callable[[Tensor, Tensor], list[Tensor | None]], *inputs: Tensor, constants: Any = ()) -> Any:
    """What a tape of `call` gives for other inputs of the kind, and `call` itself."""
    tapes, runs = tape.Tapes(), []
    for seed in range(4):
        given = [draw(tuple(t.shape), torch.float64, CPU, seed).to(t.dtype) for t in inputs]
        copies = [t.clone() for t in given]

        def called(copies: list[Tensor] = copies) -> list[Tensor | None]:
            runs.append(1)
            return call(*copies)

        found = tapes.run("key", copies, called, lambda: True, constants)
        expected = call(*given)
        assert all(a is b if b is None else torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(copies, given, strict=True))  # what was written in place
    return len(runs)


def test_every_kind_of_value() -> None:
    constant = torch.full((3,), 2.0)

    def call(x: Tensor, n: Tensor) -> list[Tensor | None]:
        n.add_(1)  # a number in a tensor's place, and in place
        first, second = x.unbind()
        joined = torch.stack([second, first * 0.5, constant.expand_as(first)])
        wide = x.sum((0,), True, dtype=torch.float64)
        dense = joined[None].contiguous(memory_format=torch.channels_last)
        pooled, _ = torch.ops.aten.max_pool2d_with_indices(dense, [2, 2], [1, 1])
        pair = torch.ops.aten.native_batch_norm(dense, None, None, None, None, True, 0.1, 1e-5)
        doubled = torch.ops.aten._foreach_mul([x, n], 2.0)
        return [None, joined, wide, pooled, pair[0], *doubled, x.detach(), torch.nn.functional.gelu(x)]

    assert replayed(call, torch.zeros(2, 3, 3), torch.zeros((), dtype=torch.int64), constants=[constant]) == 2


def test_what_has_no_place_in_a_tape_goes_on_in_python() -> None:
    other = torch.ones(3)
    assert replayed(lambda x: [x + other], torch.zeros(3)) == 4  # another tensor
    assert replayed(lambda x: [x + torch.ones(3, device=CPU)], torch.zeros(3)) == 4  # a device
    names = functools.partial(torch.ops.fastdcgan_cpu.algorithms, "conv", 16, 16, (3, 3), (1, 1), (1, 1), torch.float32)
    assert replayed(lambda x: [x + len(names(False))], torch.zeros(3)) == 4  # strings
    assert replayed(lambda x: [torch.full_like(x, 3.0) * x], torch.zeros(3)) == 2
    assert replayed(lambda x: [x.data + x], torch.zeros(3)) == 2


def test_an_error_of_an_operator_is_the_caller_s() -> None:
    tapes = tape.Tapes()
    for _ in range(3):
        x = torch.zeros(3)
        tapes.run("key", [x], lambda x=x: [x.view(3, 1)], lambda: True)
    with pytest.raises(RuntimeError, match="shape"):
        tapes.run("key", [torch.zeros(4)], list, lambda: True)


def test_nothing_is_recorded_while_the_first_call_runs() -> None:
    """What another thread calls meanwhile may be the first to choose a route."""
    tapes, x, modes = tape.Tapes(), torch.zeros(3), []

    def call() -> list[Tensor | None]:
        modes.append(torch._C._len_torch_dispatch_stack())
        return [x + 1]

    tapes.run("key", [x], lambda: tapes.run("key", [x], call, lambda: True), lambda: True)
    tapes.run("key", [x], call, lambda: True)
    assert modes == [0, 1]
