"""Forwards that give every intermediate a name of its own: fused wherever nobody reads it again, and right anyway."""

from __future__ import annotations

import copy
import sys
import weakref
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdcgan
from fastdcgan.engine import liveness, pending
from tests.engine.test_deferred import run
from tests.helpers.twins import assert_same, numbers, one_thread
from tests.helpers.ways import SHAPE, Net, block, named, named_and_skipped, net

counts_all = pytest.mark.skipif(not liveness.COUNTS_ALL, reason="this Python doesn't count every variable")


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each chain has that runs."""
    found: list[int] = []
    run_call = pending.run_call

    def counted(mode: Any, x: Tensor, key: int, tensors: Any, running: Any) -> Tensor:
        found.append(len(tensors))
        return run_call(mode, x, key, tensors, running)

    monkeypatch.setattr(pending, "run_call", counted)
    return found


# --- what a function may read ----------------------------------------------------------------------------------------


def reads(name: str) -> bool:
    """Whether the function that calls this may read its variable from here on."""
    frame = sys._getframe(1)
    return liveness.may_read(frame.f_code, frame.f_lasti, name)


def in_branches(flag: bool, c: int) -> list[bool]:
    found = [reads("c"), reads("flag")]
    if flag:
        found.append(reads("c"))
        print(c)
    else:
        found.append(reads("c"))
        c = 2
        found.append(reads("c"))
        found.append(c > 1)
    c = 3
    found.append(reads("c"))
    del c
    return [*found, reads("c"), reads("flag")]


def in_a_loop() -> list[bool]:
    found, outer, last = [], 1, 0
    for i in range(1):
        found += [reads("c"), reads("outer"), reads("last")]
        c = i
        found += [reads("c"), reads("outer")]
        last = c + outer
        found += [reads("c"), reads("outer"), reads("last")]
    return [*found, reads("outer"), last > 0]


def handling_exceptions() -> list[bool]:
    c = d = 1
    try:
        found = [reads("c"), reads("d")]
        raise KeyError
    except KeyError:
        found.append(reads("c"))
        print(c)
    with torch.no_grad():
        found += [reads("c"), reads("d")]
    del d
    return found


def with_closures() -> list[bool]:
    c = d = 1
    found = [reads("c"), reads("d")]
    found += [(lambda: c)() > 0, reads("c")]
    del d
    return found


READS = {
    "branch": (lambda: in_branches(True, 1), [True, True, True, False, False, False]),
    "other branch": (lambda: in_branches(False, 1), [True, True, False, True, True, False, False, False]),
    "loop": (in_a_loop, [False, True, False, True, True, False, True, True, False, True]),
    "exceptions": (handling_exceptions, [True, False, True, False, False]),
    "closures": (with_closures, [True, False, True, True]),
}


@pytest.mark.parametrize("of", READS)
def test_what_may_be_read(of: str) -> None:
    function, expected = READS[of]
    assert function() == expected


# --- what is fused ---------------------------------------------------------------------------------------------------


def renamed(m: Any, x: Tensor) -> Tensor:
    """As `named`, with one variable."""
    x = m.act(m.bn(m.conv(x)))
    x = m.bn2(m.conv2(x))
    return F.avg_pool2d(x, 2)


def renamed_and_skipped(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    a = m.act(m.bn(c))
    x = m.act(m.bn2(m.conv2(a)))
    return torch.cat([F.avg_pool2d(x, 3, 1, 1), c, a], 1)


def named_in_a_loop(m: Any, x: Tensor) -> Tensor:
    for conv, bn in ((m.conv, m.bn), (m.conv2, m.bn2)):
        c = conv(x)
        n = bn(c)
        a = m.act(n)
        x = F.avg_pool2d(a, 1)
    return x


def renamed_in_a_loop(m: Any, x: Tensor) -> Tensor:
    for conv, bn in ((m.conv, m.bn), (m.conv2, m.bn2)):
        x = F.avg_pool2d(m.act(bn(conv(x))), 1)
    return x


def named_in_place(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    a = F.elu(n, inplace=True)
    dropped = m.drop(a)
    c2 = m.conv2(dropped)
    n2 = m.bn2(c2)
    a2 = F.elu_(n2)
    return a2.flatten(1)


def renamed_in_place(m: Any, x: Tensor) -> Tensor:
    x = m.drop(F.elu(m.bn(m.conv(x)), inplace=True))
    return F.elu_(m.bn2(m.conv2(x))).flatten(1)


def named_by_others(m: Any, x: Tensor) -> Tensor:
    """Whose variables are those of several functions."""

    def head(n: Tensor) -> Tensor:
        a = m.act(n)
        c2 = m.conv2(a)
        return c2.flatten(2)

    c = m.conv(x)
    n = m.bn(c)
    return head(n)


def renamed_by_others(m: Any, x: Tensor) -> Tensor:
    return m.conv2(m.act(m.bn(m.conv(x)))).flatten(2)


FUSED = {
    "named": (named, renamed),
    "skipped": (named_and_skipped, renamed_and_skipped),
    "loop": (named_in_a_loop, renamed_in_a_loop),
    "in place": (named_in_place, renamed_in_place),
    "functions": (named_by_others, renamed_by_others),
}


@counts_all
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("way", FUSED)
@one_thread()
def test_as_without_names(way: str, train: bool, norm: type[nn.Module], chains: list[int]) -> None:
    """The same chains run, from the first call on, and the results are those of plain modules."""
    counts, found = [], []
    for function in FUSED[way]:
        torch.manual_seed(0)
        norms = {name: norm(4, affine=True, track_running_stats=True) for name in ("bn", "bn2")}
        plain = net(function, **norms).train(train)
        fused = fastdcgan.fuse(copy.deepcopy(plain))
        chains.clear()
        found += [run(fused, numbers(*SHAPE)), run(plain, numbers(*SHAPE))]
        counts.append(list(chains))
    assert counts[0] == counts[1] and max(counts[0]) >= 1
    for other in found[1:]:
        assert_same(found[0], other)


# --- what somebody asks for ------------------------------------------------------------------------------------------


def flagged(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    a = m.act(n)
    out = F.avg_pool2d(m.conv2(a), 3, 1, 1)
    return out + c if m.flag else out


def returned(m: Any, x: Tensor) -> Any:
    c = m.conv(x)
    n = m.bn(c)
    a = m.act(n)
    out = F.avg_pool2d(m.conv2(a), 3, 1, 1)
    return (out, c) if m.flag else out


def saved(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    if m.flag:
        m.kept = [c]
    a = m.act(n)
    out = F.avg_pool2d(m.conv2(a), 3, 1, 1)
    if m.flag:
        m.kept.append(n)
    return out


def shown(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    out = F.avg_pool2d(m.act(n), 3, 1, 1)
    return out + locals()["n"] + vars()["c"] if m.flag else out


def of_a_frame(m: Any, x: Tensor) -> Tensor:
    """Which nobody can foresee."""
    c = m.conv(x)
    n = m.bn(c)
    out = F.avg_pool2d(m.act(n), 3, 1, 1)
    return out + callers_variable("n") * 2 + callers_variable("c") if m.flag else out


def callers_variable(name: str) -> Any:
    return sys._getframe(1).f_locals[name]


def goes_on_from_a_frame(m: Any, x: Tensor) -> Tensor:
    n = m.bn(m.conv(x))
    out = F.avg_pool2d(m.act(n), 3, 1, 1)
    return out + m.bn2(m.conv2(callers_variable("n"))) if m.flag else out


def closed_over(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    later = lambda: n.mean()  # noqa: E731
    out = F.avg_pool2d(m.act(n), 3, 1, 1)
    return out + later() if m.flag else out


def handled(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    out = F.avg_pool2d(m.act(n), 3, 1, 1)
    try:
        if m.flag:
            raise KeyError
    except KeyError:
        out = out + c
    return out


def read_twice(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    for i in range(3):
        n = m.bn(c)
        a = m.act(n)
        out = F.avg_pool2d(a, 3, 1, 1)
        if not m.flag and i == 1:
            break
    return out


ASKED = {
    way.__name__: way
    for way in (flagged, returned, saved, shown, of_a_frame, goes_on_from_a_frame, closed_over, handled, read_twice)
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", ASKED)
@one_thread()
def test_a_flag_that_changes(way: str, grad: bool) -> None:
    """Whatever earlier calls asked for."""
    found = []
    plain = net(ASKED[way])
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        for i, flag in enumerate([False, False, True, True, False]):
            model.flag, model.kept = flag, []
            with torch.set_grad_enabled(grad):
                found.append({f"{i} {k}": t for k, t in run(model, numbers(*SHAPE), passes=1).items()})
            assert all(type(t) is Tensor for t in model.kept)
    for one, other in zip(found[5:], found[:5], strict=True):
        assert_same(one, other)


def kept_gradients(m: Any, x: Tensor) -> Tensor:
    c = m.conv(x)
    n = m.bn(c)
    a = m.act(n)
    out = F.avg_pool2d(m.conv2(a), 3, 1, 1)
    if m.flag:
        c.retain_grad()
        n.register_hook(lambda g: m.seen.append(g.clone()))
        m.kept = [c]
    return out


@pytest.mark.parametrize("hooked", [True, False])
def test_gradients_of_intermediates(hooked: bool) -> None:
    """What is asked for after the chain has run is what the chain came from."""
    found = []
    plain = net(named if hooked else kept_gradients)
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        model.flag, model.seen, outs = False, [], list[Tensor]()
        model(numbers(*SHAPE))
        model.flag = not hooked
        if hooked:
            for module in (model.conv, model.bn):
                module.register_forward_hook(lambda module, args, out, outs=outs: outs.append(out))
        loss = model(numbers(*SHAPE)).square().sum()
        if hooked:
            found.append(dict(zip("cn", torch.autograd.grad(loss, outs), strict=True)))
        else:
            loss.backward()
            found.append({"c": model.kept[0].grad, "n": model.seen[0]})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    found: list[dict[str, Tensor | None]] = []
    plain = net(named_and_skipped)
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        for _ in range(3):
            x = numbers(*SHAPE).requires_grad_()
            checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        found.append({"x": x.grad} | {k: p.grad for k, p in model.named_parameters()} | dict(model.named_buffers()))
    assert_same(found[1], found[0])


def test_gradients_of_gradients() -> None:
    found = []
    plain = net(named_and_skipped)
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        x = numbers(*SHAPE).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append({"slope": slope.detach(), "x": x.grad} | {k: p.grad for k, p in model.named_parameters()})
    assert_same(found[1], found[0])


def test_an_exception_shows_variables() -> None:
    """Those of what failed can be looked at, and no statistics are updated by that."""

    def way(m: Any, x: Tensor) -> Tensor:
        c = m.conv(x)
        n = m.bn(c)
        F.avg_pool2d(m.act(n), 2)
        raise KeyError

    found = []
    plain = net(way)
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        with pytest.raises(KeyError) as raised:
            model(numbers(*SHAPE))
        variables = raised.traceback[-1].frame.f_locals
        found.append({"n": variables["n"] + 0, "c": variables["c"] + 0, "mean": model.bn.running_mean.clone()})
    assert_same(found[1], found[0])


def test_a_debugger_that_calls_something() -> None:
    """From within a forward: its variables stay."""

    def way(m: Any, x: Tensor) -> Tensor:
        c = m.conv(x)
        n = m.bn(c)
        mark = 1
        a = m.act(n)
        return F.avg_pool2d(a, 2) * mark

    def debugger(frame: FrameType, event: str, arg: Any) -> Any:
        variables = frame.f_locals
        if frame.f_code is way.__code__ and "mark" in variables and not found:
            found["seen"] = F.avg_pool2d(variables["m"].act(variables["n"]), 3)
        return debugger if frame.f_code is way.__code__ else None

    both = []
    plain, before = net(way), sys.gettrace()
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        found: dict[str, Tensor | None] = {}
        sys.settrace(debugger)
        try:
            found["out"] = model(numbers(*SHAPE))
        finally:
            sys.settrace(before)
        both.append(found | {"mean": model.bn.running_mean})
        assert "seen" in found
    assert_same(both[1], both[0])


def test_variables_of_others_stay() -> None:
    """What a function got of `locals()` is its own."""

    def way(m: Any, x: Tensor) -> Tensor:
        before = locals()
        c = m.conv(x)
        n = m.bn(c)
        out = F.avg_pool2d(n, 2)
        assert before["x"] is x
        return out

    fastdcgan.fuse(net(way))(numbers(*SHAPE))


def test_code_that_is_executed() -> None:
    """Its variables are a dict of somebody's own."""

    def way(m: Any, x: Tensor) -> Tensor:
        c = m.conv(x)
        space = {"pool": F.avg_pool2d, "n": m.bn(c)}
        exec("out = pool(n, 2)", space)
        return space["out"] + space["n"].mean()

    plain = net(way)
    assert_same(run(fastdcgan.fuse(copy.deepcopy(plain)), numbers(*SHAPE)), run(plain, numbers(*SHAPE)))


@counts_all
def test_compiled_inside(chains: list[int]) -> None:
    """What waits before compiled code runs is one chain."""

    def way(m: Any, x: Tensor) -> Tensor:
        c = m.conv(x)
        n = m.bn(c)
        a = m.act(n)
        c2 = m.conv2(a)
        return double(c2)

    double = torch.compile(lambda t: t * 2, backend="eager")
    model = fastdcgan.fuse(net(way))
    model(numbers(*SHAPE))
    assert chains == [2]


def test_nothing_is_kept_in_variables() -> None:
    """A variable that is written to lets go of what it had."""

    def way(m: Any, x: Tensor) -> Tensor:
        large = x * 2
        seen = weakref.ref(large)
        c = m.conv(large)
        out = F.avg_pool2d(m.bn(c), 2)
        c = large = out
        assert seen() is None
        return large + c

    with torch.no_grad():
        fastdcgan.fuse(net(way))(numbers(*SHAPE))


def test_calls_of_one_module_after_another() -> None:
    """With a module in it that has a forward of its own, and is called twice."""

    def way(m: Any, x: Tensor) -> Tensor:
        first = m.tail(x)
        c = m.conv(first)
        second = m.tail(c)
        n = m.bn(second)
        return F.avg_pool2d(n, 2) + second.mean()

    plain = net(way, tail=Net(block))
    assert_same(run(fastdcgan.fuse(copy.deepcopy(plain)), numbers(*SHAPE)), run(plain, numbers(*SHAPE)))
