"""Convolutions that wait for what comes after them: to whoever calls them, they are those of PyTorch."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdcgan
from fastdcgan.dispatch import autotune
from fastdcgan.engine import deferred, pending
from fastdcgan.engine.choice import MODULES
from tests.engine.test_choice import Clock
from tests.helpers.twins import assert_same, channels_last, numbers, one_thread, prepared
from tests.helpers.ways import SHAPE, WAYS, Net, Pair, block, dense, net, recursion, statistics_of_nothing
from tests.machine import backends_here

needs_cpu = pytest.mark.skipif("cpu" not in backends_here(), reason="the choice is that of the backend 'cpu'")


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, Pair):
        value = [value.first, value.second]
    return [t for v in value for t in leaves(v)] if isinstance(value, (list, tuple)) else []


def run(model: nn.Module, x: Tensor, passes: int = 2) -> dict[str, Tensor | None]:
    """What passes through a model leave behind, the state of the random numbers included."""
    found: dict[str, Tensor | None] = {}
    for i in range(passes):
        torch.manual_seed(i)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        given = leaf * 1
        out = model(given)
        assert leaves(out) and all(type(t) is Tensor for t in leaves(out))
        outs = [t for t in [*leaves(out), *getattr(model, "kept", [])] if t.requires_grad]
        with torch.enable_grad():
            torch.autograd.backward(outs, [numbers(*t.shape, seed=j).to(t.dtype) for j, t in enumerate(outs)])
        found |= {f"{i}: output {j}": t.detach() for j, t in enumerate(leaves(out))}
        found |= {
            f"{i}: input": given.detach(),
            f"{i}: input gradient": leaf.grad,
            f"{i}: random": torch.rand(1).double(),
        }
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return (
        found | {f"parameter {name}": p.detach() for name, p in model.named_parameters()} | dict(model.named_buffers())
    )


SETTINGS = ["train", "eval", "no_grad", "inference", "channels_last"]


def pair_of(name: str) -> tuple[nn.Module, nn.Module]:
    way, changes = WAYS[name]
    plain = net(way, **copy.deepcopy(changes))
    return plain, fastdcgan.fuse(copy.deepcopy(plain))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", WAYS)
@one_thread()
def test_as_plain_modules(name: str, setting: str) -> None:
    found = []
    for model in pair_of(name):
        model.train(setting != "eval")
        x = numbers(*SHAPE)
        if setting == "channels_last":
            model, x = model.to(memory_format=torch.channels_last), channels_last(x)
        with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(setting, contextlib.nullcontext)():
            found.append(run(model, x))
    assert_same(found[1], found[0])


# Other dtypes than they expect; and weights whose casts autocast keeps, though they change.
NOT_CAST = ("operators", "transformed", "inner_gradient", "weight_changed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in WAYS if name not in NOT_CAST])
@one_thread()
def test_under_autocast(name: str) -> None:
    """In bfloat16 what a network gives has few digits; its dtypes and the steps of its buffers are exact."""
    found = []
    for model in pair_of(name):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(model.float(), numbers(*SHAPE).float(), passes=1))
    for of, value in found[0].items():
        other = found[1][of]
        assert (value is None) == (other is None), of
        if value is not None and other is not None:
            assert other.dtype == value.dtype and other.shape == value.shape, of
            scale = float(value.double().abs().max().clamp(min=1))
            assert float((other.double() - value.double()).abs().max()) <= 0.15 * scale, of


# --- what was measured to be the fastest ------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    found = Clock()
    monkeypatch.setattr(autotune, "milliseconds", found)
    monkeypatch.setattr(autotune, "_by_rule", False)
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))
    monkeypatch.setattr(autotune, "_spent", 0.0)
    monkeypatch.setattr(pending, "_chains", {})
    monkeypatch.setattr(deferred, "cost_of", lambda mode: pending.Cost(0.0, 0.0))
    return found


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """In float32, which is what is measured."""
    both = [
        {k: t.double() if t is not None and t.is_floating_point() else t for k, t in d.items()}
        for d in (found, expected)
    ]
    grads = [float(t.abs().max()) for name, t in both[1].items() if name.startswith("gradient of") and t is not None]
    largest = max([1.0, *grads])
    for name, right in both[1].items():
        # In front of a norm a bias's gradient is nothing but rounding of what it is summed up of.
        if not name.startswith("gradient of") or right is None or right.dim() != 1:
            continue
        if float(right.abs().max()) < 1e-3 * largest:
            both[0][name], both[1][name] = (None if d[name] is None else d[name] / largest for d in both)
    assert_same(*both, tolerance=1e-4)


@needs_cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fastest", [MODULES, "fused in channels_last"])
@pytest.mark.parametrize("name", [name for name in WAYS if name != "transformed"])
@one_thread()
def test_whatever_is_the_fastest(name: str, fastest: str, clock: Clock) -> None:
    clock.fastest = fastest
    plain, fused = (model.float() for model in pair_of(name))
    x = numbers(*SHAPE).float()
    assert_close(run(fused, x, passes=5), run(plain, x, passes=5))
    assert clock.measured


@needs_cpu
@pytest.mark.parametrize("fastest", [MODULES, "fused in contiguous"])
@one_thread()
def test_changes_after_it_was_measured(fastest: str, clock: Clock) -> None:
    clock.fastest = fastest
    plain, fused = (model.float() for model in pair_of("dense"))
    changes: list[Callable[[Any], Any]] = [
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.bn.train(),
        lambda m: m.requires_grad_(False),
        lambda m: m.conv2.requires_grad_(True),
        lambda m: setattr(m, "way", recursion),
        lambda m: setattr(m, "act", nn.Dropout()),
        lambda m: m.conv.register_forward_hook(lambda module, args, out: out * 2),
        lambda m: m.double(),
    ]
    for i, change in enumerate(changes):
        x = numbers(*SHAPE).to(torch.float64 if i == len(changes) - 1 else torch.float32)
        for model in (plain, fused):
            change(model)
        assert_close(run(fused, x, passes=4), run(plain, x, passes=4))
        assert i == len(changes) - 1 or bool(fused._plain_calls) == (fastest == MODULES)
    assert clock.measured


@needs_cpu
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fastest", [MODULES, "fused in channels_last"])
@one_thread()
def test_measured_while_checkpointed(reentrant: bool, fastest: str, clock: Clock) -> None:
    """The backward computes what the forward did, though by then something else is known to be faster."""
    clock.fastest = fastest
    found: list[dict[str, Tensor | None]] = []
    plain = net(dense).float()
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        for _ in range(4):
            x = numbers(*SHAPE).float().requires_grad_()
            checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        found.append({"x": x.grad} | {k: p.grad for k, p in model.named_parameters()} | dict(model.named_buffers()))
    assert bool(clock.measured) == reentrant  # the other kind has to save the same tensors again
    assert_close(found[1], found[0])


# --- what only fused modules might do wrong --------------------------------------------------------------------------

WRONG: dict[str, Callable[[Any, Tensor], Any]] = {
    "channels": lambda m, x: m.act(m.conv(x[:, :3])),
    "channels of the next": lambda m, x: m.conv2(torch.cat([m.conv(x)] * 2, 1)),
    "channels of the norm": lambda m, x: F.batch_norm(m.conv(x), torch.zeros(3), torch.ones(3), training=True),
    "dtype": lambda m, x: m.act(m.bn(m.conv(x.float()))),
    "dtype of the norm": lambda m, x: m.bn.float()(m.conv(x)),
    "integers": lambda m, x: m.conv(x.long()),
    "too small": lambda m, x: m.act(F.conv2d(x[:, :, :2, :2], m.conv.weight)),
    "one value": lambda m, x: m.bn(F.conv2d(x[:1, :, :3, :3], m.conv.weight)),
    "one pixel": lambda m, x: F.instance_norm(F.conv2d(x[:, :, :3, :3], m.conv.weight)),
    "bias": lambda m, x: F.conv2d(x, m.conv.weight, torch.zeros(3, dtype=x.dtype)),
    "groups": lambda m, x: F.conv2d(x, m.conv.weight, groups=3),
    "stride": lambda m, x: F.conv2d(x, m.conv.weight, stride=0),
    "strides": lambda m, x: F.conv2d(x, m.conv.weight, stride=(1, 1, 1)),
    "padding": lambda m, x: F.conv2d(x, m.conv.weight, padding=-1),
    "output padding": lambda m, x: F.conv_transpose2d(x, m.up.weight, output_padding=1),
    "slope": lambda m, x: F.leaky_relu(m.conv(x), None),
    "argument": lambda m, x: F.conv2d(x, m.conv.weight, strides=1),
    "momentum": lambda m, x: F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, None, None, True, None),
    "no statistics": lambda m, x: F.batch_norm(m.conv(x), None, None),
    "eps": lambda m, x: F.batch_norm(m.conv(x), None, None, None, None, True, 0.1, -1.0),
    "own": lambda m, x: m.bn(m.conv(x)).shape[9],
}


@pytest.mark.parametrize("name", WRONG)
def test_the_same_errors_at_the_same_place(name: str) -> None:
    """Whatever was called before it happened."""
    found = []
    for fused in (False, True):
        reached = []

        def way(m: Any, x: Tensor, reached: list = reached) -> Any:
            h = m.bn2(m.conv2(x))
            reached.append(h)
            try:
                WRONG[name](m, x)
            except Exception as error:
                reached.append(type(error))
                raise
            return h

        model = net(way)
        with pytest.raises(Exception) as raised:  # noqa: PT011
            (fastdcgan.fuse(model) if fused else model)(numbers(*SHAPE))
        found.append((raised.type, reached[1:], model.bn2.running_mean.clone(), reached[0]))
    assert found[1][:2] == found[0][:2]
    torch.testing.assert_close(found[1][2:], found[0][2:])


@pytest.mark.parametrize("shape", [(4, 6, 6), (0, 4, 6, 6)], ids=str)
def test_other_inputs(shape: tuple[int, ...]) -> None:
    plain = net(lambda m, x: m.act(m.conv2(m.act(m.conv(x)))))
    assert_same(run(fastdcgan.fuse(copy.deepcopy(plain)), numbers(*shape)), run(plain, numbers(*shape)))


@pytest.mark.parametrize("kind", ["forward", "output", "full_backward", "full_backward_pre"])
def test_hooks(kind: str) -> None:
    found = []
    plain = net(dense)
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        seen: list[Tensor] = []

        def keep(module: nn.Module, *given: Any, seen: list = seen) -> None:
            seen.extend(leaves(given))

        def replace(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out * 2

        for module in [model, *model.children()]:
            if kind == "output":
                module.register_forward_hook(replace)
            else:
                getattr(module, f"register_{kind}_hook")(keep)
        left = run(model, numbers(*SHAPE), passes=1)
        assert all(type(t) is Tensor for t in seen)
        found.append(left | {f"seen {i}": t.detach() for i, t in enumerate(seen)})
    assert_same(found[1], found[0])


def test_an_output_that_leaves_by_an_exception() -> None:
    def way(m: Any, x: Tensor) -> None:
        m.kept = [m.bn(m.conv(x))]
        raise KeyError

    found = []
    plain = net(way)
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        with pytest.raises(KeyError):
            model(numbers(*SHAPE))
        (kept,) = model.kept
        assert type(kept) is Tensor
        kept.square().sum().backward()
        found.append({"output": kept.detach(), "gradient": model.conv.weight.grad, "mean": model.bn.running_mean})
    assert_same(found[1], found[0])


def test_generators() -> None:
    def way(m: Any, x: Tensor) -> Any:
        for c in (m.conv, m.conv2):
            x = c(x)
            yield x

    plain = net(way)
    fused = fastdcgan.fuse(copy.deepcopy(plain))
    torch.testing.assert_close(list(fused(numbers(*SHAPE))), list(plain(numbers(*SHAPE))))


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_kept(grad: bool) -> None:
    seen: list[weakref.ref] = []
    model = fastdcgan.fuse(net(lambda m, x: dense(m, x) + statistics_of_nothing(m, x)[:, :1]))
    for module in model.children():
        module.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    gc.disable()  # there is no circle of references either
    try:
        x = numbers(*SHAPE)
        seen.append(weakref.ref(x))
        with torch.set_grad_enabled(grad):
            out = model(x)
        del x
        if not grad:
            assert all(ref() is None for ref in seen)
        del out
        assert len(seen) > 8 and all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_calls_leave_nothing_behind() -> None:
    model, x = fastdcgan.fuse(net(dense)), numbers(*SHAPE)
    counts = []
    for _ in range(3):
        for _ in range(20):
            model(x).sum().backward()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] <= counts[1] + 5


def test_gradients_of_gradients() -> None:
    found = []
    plain = net(lambda m, x: m.conv2(dense(m, x)[:, 4:8]).mean((1, 2, 3)))
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        x = numbers(*SHAPE).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward(retain_graph=True)
        slope.sum().backward()
        found.append({"slope": slope.detach(), "x": x.grad} | {k: p.grad for k, p in model.named_parameters()})
    assert_same(found[1], found[0])


def test_threads() -> None:
    model = fastdcgan.fuse(net(dense).eval())
    inputs = [numbers(*SHAPE, seed=i) for i in range(8)]
    expected, found = [model(x).detach() for x in inputs], {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = model(inputs[i]).detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, out in enumerate(expected):
        torch.testing.assert_close(found[i], out)


class Derived(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, Derived)
        return self.bn2(self.conv2(super().forward(x)))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save", "state_dict", "assign", "twice", "unfuse", "derived"])
@pytest.mark.parametrize("called", [False, True])
def test_copies(way: str, called: bool) -> None:
    torch.manual_seed(0)
    plain = prepared(Derived(dense_front))
    model = fastdcgan.fuse(copy.deepcopy(plain))
    if called:
        model(numbers(*SHAPE))
        model.load_state_dict(plain.state_dict())
    file = io.BytesIO()
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif way == "save":
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    elif way in ("state_dict", "assign"):
        state = copy.deepcopy(model.state_dict())
        model = fastdcgan.fuse(prepared(Derived(dense_front), 1))
        model(numbers(*SHAPE))
        model.zero_grad()
        model.load_state_dict(state, assign=way == "assign")
    elif way == "twice":
        assert type(fastdcgan.fuse(model)) is type(model)
    elif way == "unfuse":
        assert type(fastdcgan.unfuse(model)) is Derived and "_plain_calls" not in model.__dict__
    assert_same(run(model, numbers(*SHAPE)), run(plain, numbers(*SHAPE)))


def dense_front(m: Any, x: Tensor) -> Tensor:
    return dense(m, x)[:, 4:8]


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inside", [False, True])
def test_other_modes_see_what_is_called(inside: bool) -> None:
    found = []
    for fused in (False, True):
        seen = Seen()

        def way(m: Any, x: Tensor, seen: Seen = seen) -> Tensor:
            with seen if inside else contextlib.nullcontext():
                return block(m, x)

        model = fastdcgan.fuse(net(way)) if fused else net(way)
        with contextlib.nullcontext() if inside else seen, torch.device("cpu"):
            out = model(numbers(*SHAPE))
        found.append((seen.names, out.detach()))
    blocks = ("conv2d", "batch_norm", "tanh")
    assert [n for n in found[1][0] if n in blocks] == [n for n in found[0][0] if n in blocks] and len(found[0][0]) > 3
    torch.testing.assert_close(found[1][1], found[0][1])


def test_code_that_asks_nobody() -> None:
    """C++ that takes a tensor without asking its class gets an error, not memory that isn't there."""

    def way(m: Any, x: Tensor) -> Tensor:
        h = m.conv(x)
        with torch._C.DisableTorchFunction(), pytest.raises(TypeError, match="waits for what comes after it"):
            torch.relu(h)
        return h

    model = fastdcgan.fuse(net(way))
    x = numbers(*SHAPE)
    torch.testing.assert_close(model(x), F.conv2d(x, model.conv.weight, model.conv.bias, padding=1))


TRACERS: dict[str, Callable[[nn.Module, Tensor], Callable]] = {
    "jit": lambda model, x: torch.jit.trace(model, x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="eager"),
    "vmap": lambda model, x: lambda x: torch.func.vmap(lambda t: model(t[None])[0])(x),
    "functional_call": lambda model, x: lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x),
    "jvp": lambda model, x: lambda x: torch.func.jvp(model, (x,), (x,))[0],
    "replicate": lambda model, x: model._replicate_for_data_parallel(),
    "fake": lambda model, x: model,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracers(tracer: str) -> None:
    plain = net(lambda m, x: m.act(m.bn(m.conv(x))) + m.conv2(x)).eval()
    torch._dynamo.reset()
    x = numbers(*SHAPE)
    found = TRACERS[tracer](fastdcgan.fuse(copy.deepcopy(plain)), x)(x)
    torch.testing.assert_close(found, plain(x))
