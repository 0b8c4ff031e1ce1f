"""Plan once, run many: what is kept on a module, and that whatever may change a plan is noticed at the next call."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastdcgan
from fastdcgan import FusedSequential, backends
from fastdcgan.engine import chain, planner, run
from tests.helpers.writes import WRITES, Write
from tests.machine import DEVICE


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ELU(0.5)),
        nn.Dropout(0.0),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    ).to(DEVICE)


def image(dtype: torch.dtype = torch.float32, size: int = 8, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator).to(DEVICE, dtype)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for every plan that is made."""
    made: list[object] = []
    real = planner.plan
    monkeypatch.setattr(planner, "plan", lambda *args: made.append(args) or real(*args))
    return made


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a pass."""
    x = x.detach().requires_grad_(x.is_floating_point())
    out = model(x)
    model.zero_grad()
    if out.requires_grad:
        out.float().square().sum().backward()
    grads = [p.grad for p in (x, *model.parameters()) if p.grad is not None]
    return [t.detach().clone() for t in (out, *grads, *model.buffers())]


def test_a_plan_is_made_once(planned: list) -> None:
    model, x = fastdcgan.fuse(net()), image()
    model(x)
    chains = len(planned)
    assert chains == 2  # before and after the Dropout
    for _ in range(3):
        model(x).sum().backward()
    assert len(planned) == chains
    model.eval()
    model(x)
    assert len(planned) == 2 * chains
    model.train()
    model(x)
    assert len(planned) == 2 * chains  # both states are kept


def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    return 2 * out


def replace_convolution(model: nn.Sequential) -> None:
    torch.manual_seed(5)
    model[4] = nn.ConvTranspose2d(8, 4, 6, 2, 2, bias=False).to(DEVICE)


def weights_elsewhere(model: nn.Sequential) -> None:
    for p in model.parameters():
        p.data = p.data.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p.data.clone()


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "eval": lambda m: m.eval(),
    "eval of one norm": lambda m: m[5].eval(),
    "momentum": lambda m: setattr(m[5], "momentum", 0.5),
    "cumulative average": lambda m: setattr(m[5], "momentum", None),
    "eps": lambda m: setattr(m[2][1], "eps", 0.1),
    "running statistics not tracked": lambda m: setattr(m[5], "track_running_stats", False),
    "no running statistics": lambda m: [setattr(m[5], name, None) for name in ("running_mean", "running_var")],
    "another buffer": lambda m: setattr(m[5], "running_mean", torch.ones(4, device=DEVICE)),
    "slope": lambda m: setattr(m[1], "negative_slope", 0.9),
    "alpha": lambda m: setattr(m[2][2], "alpha", 2.0),
    "activation replaced": lambda m: m.__setitem__(6, nn.Tanh()),
    "convolution replaced": replace_convolution,
    "module in a nested Sequential replaced": lambda m: m[2].__setitem__(2, nn.Sigmoid()),
    "module appended": lambda m: m.append(nn.Sigmoid()),
    "module taken out": lambda m: m.__delitem__(6),
    "stride": lambda m: setattr(m[2][0], "stride", (2, 2)),
    "padding mode": lambda m: (
        setattr(m[2][0], "padding_mode", "reflect"),
        setattr(m[2][0], "_reversed_padding_repeated_twice", [1, 1, 1, 1]),
    ),
    "forward hook": lambda m: m[1].register_forward_hook(hook),
    "forward pre-hook": lambda m: m[4].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "backward hook": lambda m: m[6].register_full_backward_hook(lambda module, given, out: (3 * given[0],)),
    "hook of a nested Sequential": lambda m: m[2].register_forward_hook(hook),
    "forward replaced on the instance": lambda m: setattr(m[6], "forward", torch.tanh),
    "parameter replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones_like(m[0].weight))),
    "bias removed": lambda m: setattr(m[0], "bias", None),
    "parametrization": lambda m: parametrizations.weight_norm(m[0]),
    "weight norm of the old style": lambda m: nn.utils.weight_norm(m[0]),
    "some parameters frozen": lambda m: m[2].requires_grad_(False),
    "all parameters frozen": lambda m: m.requires_grad_(False),
    "data replaced": weights_elsewhere,
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "half of the dtype": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_change_of_the_modules_is_noticed(change: str) -> None:
    """A model that ran before gives, bit for bit, what one gives that is changed before it first runs."""
    ran, fresh = fastdcgan.fuse(net()), fastdcgan.fuse(net())
    ran(image())
    fresh.load_state_dict(ran.state_dict())
    CHANGES[change](ran)
    CHANGES[change](fresh)
    x = image(next(fresh.parameters()).dtype)
    for found, expected in zip(outcome(ran, x), outcome(fresh, x), strict=True):
        assert torch.equal(found, expected), change


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_change_taken_back_is_noticed(change: str) -> None:
    """The other way round: a model that ran with the change gives what one gives that never had it."""
    other, usual = net(), net()
    CHANGES[change](other)
    ran = fastdcgan.fuse(other)
    ran(image(next(ran.parameters()).dtype))
    plain = fastdcgan.fuse(net())
    ran._modules = plain._modules  # the very modules of an unchanged net
    for found, expected in zip(outcome(ran, image()), outcome(fastdcgan.fuse(usual), image()), strict=True):
        assert torch.equal(found, expected), change


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_no_weight_is_kept_that_was_written_since(write: Write, mode: str, autocast: bool) -> None:
    """Also within one autocast region, where PyTorch itself keeps what it cast."""
    model, x = fastdcgan.fuse(net()).train(mode == "train"), image()
    grad_mode = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with grad_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        before = outcome(model, x)
        with torch.inference_mode(False):
            write(model)
        new = copy.deepcopy(model)  # has neither plans nor memory of the model's
        found = outcome(model, x)
        for got, expected in zip(found, outcome(new, x), strict=True):
            assert torch.equal(got, expected)
    assert not torch.equal(found[0], before[0])


def test_a_forward_given_to_a_class_is_noticed() -> None:
    class Own(nn.Conv2d):
        pass

    model, x = fastdcgan.fuse(nn.Sequential(Own(3, 4, 3), nn.ReLU())).to(DEVICE), image()
    model(x)
    Own.forward = lambda self, input: torch.full_like(input, 7.0)  # type: ignore[method-assign, assignment]
    assert (model(x) == 7).all()


SETTINGS: dict[str, Callable[[], object]] = {
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast(DEVICE.type, torch.bfloat16),
    "inference mode": torch.inference_mode,
    "reference": lambda: fastdcgan.backend("reference"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_change_of_settings_is_noticed(setting: str) -> None:
    ran, fresh = fastdcgan.fuse(net()), fastdcgan.fuse(net())
    ran(image())
    fresh.load_state_dict(ran.state_dict())
    with SETTINGS[setting]():  # type: ignore[attr-defined]
        found, expected = ran(image()), fresh(image())
    assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad
    assert torch.equal(found, expected)
    assert torch.equal(ran(image()), fresh(image()))


@pytest.mark.parametrize("x", [image(size=16), image(batch=6), image().requires_grad_(), image().flip(3)[:, :, ::2]])
def test_another_input_is_noticed(x: Tensor) -> None:
    ran, fresh = fastdcgan.fuse(net()), fastdcgan.fuse(net())
    ran(image())
    fresh.load_state_dict(ran.state_dict())
    for found, expected in zip(outcome(ran, x), outcome(fresh, x), strict=True):
        assert torch.equal(found, expected)


def test_a_later_bad_call_is_refused_as_the_first_is(planned: list) -> None:
    model = fastdcgan.fuse(net())
    model(image())
    before = copy.deepcopy(model.state_dict())
    for bad, message in (
        (image()[:, :2], "expects 3 input channels, got 2"),
        (image().double(), "one dtype"),
        (image(size=1, batch=1), "too small"),
    ):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                model(bad)
    with pytest.raises(ValueError, match="stat_groups=3 must divide"):
        model(image(), stat_groups=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_of_it_is_saved_or_copied() -> None:
    model = fastdcgan.fuse(net())
    size = len(pickle.dumps(model))
    expected = set(model.state_dict())
    model(image())
    assert set(model.state_dict()) == expected
    assert len(pickle.dumps(model)) < size + 200
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert torch.equal(other.eval()(image()), model.eval()(image()))
    fastdcgan.unfuse(model)
    assert "_plans" not in model.__dict__


def test_so_many_signatures_are_kept() -> None:
    model = FusedSequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for size in range(3, 3 + chain._PLANS + 5):
        model(image(size=size))
    (found,) = model._plans[0].parts
    assert len(found._plans) <= chain._PLANS
    for _ in range(10):
        model.append(nn.ReLU())
        model(image())
    assert len(model._plans) <= run._STRUCTURES


def test_a_model_that_is_given_up_is_freed_at_once() -> None:
    model = fastdcgan.fuse(net())
    model(image()).sum().backward()
    gone = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    gc.disable()
    try:
        del model
        assert all(ref() is None for ref in gone)
    finally:
        gc.enable()


def test_threads_that_share_what_is_kept_run_their_own_modules() -> None:
    """As DataParallel's replicas do: copies of a module, which share its attributes, with other children."""
    model = fastdcgan.fuse(net()).eval()
    replicas, expected = [], []
    for scale in (1.0, 2.0, 3.0):
        other = fastdcgan.fuse(net()).eval()
        with torch.no_grad():
            other[0].weight.mul_(scale)
        replica = copy.copy(model)
        replica._modules = other._modules
        replicas.append(replica)
        expected.append(other(image()))
    model(image())
    for replica in replicas:
        replica.__dict__["_plans"] = model._plans
    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            for got, right in zip(pool.map(lambda m: m(image()), replicas), expected, strict=True):
                assert torch.equal(got, right)


# --- without a compiled backend ---------------------------------------------------------------------------------------


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(run, "_warned", set())
    reason = "backend 'cpu' needs the C++ extension: it was not built"
    monkeypatch.setitem(backends._loaded, "cpu", backends.Unavailable(reason))
    return reason


@pytest.mark.skipif(DEVICE.type != "cpu", reason="it is about the C++ extension for CPUs")
def test_without_the_extension_modules_run_as_they_are_with_one_warning(without_extension: str, planned: list) -> None:
    plain, x = net(), image()
    model = fastdcgan.fuse(copy.deepcopy(plain))
    with pytest.warns(UserWarning, match=re.escape(without_extension)) as warned:
        found = [outcome(model, x) for _ in range(3)]
    assert len(warned) == 1
    assert not planned
    for got, expected in zip(found[0], outcome(plain, x), strict=True):
        assert torch.equal(got, expected)
    rows = fastdcgan.explain(model, x)
    assert without_extension in rows.absent["cpu"] and all("no backend 'cpu' here" in row.why for row in rows)
    with fastdcgan.backend("reference"):  # asked for by name it runs all the same
        model(x)
    assert planned
