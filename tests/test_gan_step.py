"""`GANStep`: equal to the textbook loop; what a capture needs leaves no trace; settings are checked.

On a CPU a recorder stands in for CUDA graphs, which runs again what it was given; on a GPU the graphs are real.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdcgan
from fastdcgan import GANStep, gan_step
from fastdcgan.dcgan import Discriminator, Generator, GradientPenalty
from fastdcgan.dcgan.models import placed
from fastdcgan.optim import FusedAdam
from fastdcgan.train_step import HINGE, LEAST_SQUARES, WASSERSTEIN
from tests.helpers.writes import KEEPS_OBJECTS, Write, by_load_state_dict_that_assigns
from tests.machine import DEVICE

NZ = 8
RATE = 2.0**-12  # the same number as a tensor of float32
Nets = tuple[nn.Module, nn.Module]


def networks(fused: bool = True, dtype: torch.dtype = torch.float32) -> Nets:
    torch.manual_seed(1)
    nets = [placed(net.to(dtype), DEVICE) for net in (Generator(28, 1, nz=NZ, ngf=4), Discriminator(28, 1, ndf=4))]
    return tuple(nets if fused else [fastdcgan.unfuse(net) for net in nets])  # type: ignore[return-value]


def adams(nets: Nets, rate: float = RATE) -> list[FusedAdam]:
    return [FusedAdam(net.parameters(), rate, (0.5, 0.999), capturable=DEVICE.type == "cuda") for net in nets]


def batches(count: int, size: int = 8, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Images with a bright half and noise, as (real, z)."""
    random = torch.Generator().manual_seed(2)
    result = []
    for _ in range(count):
        real = torch.rand(size, 1, 28, 28, generator=random) - 1
        real[:, :, :14] += 1
        z = torch.randn(size, NZ, generator=random)
        result.append((real.to(DEVICE, dtype), z.to(DEVICE, dtype)))
    return result


def state_of(nets: Nets, optimizers: list[Any]) -> dict[str, Tensor]:
    """Weights, buffers and optimiser state."""
    found = {f"{i}.{name}": t for i, net in enumerate(nets) for name, t in net.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i}.{j}.{name}": t for name, t in state.items() if isinstance(t, Tensor)}
    return {name: t.detach().clone() for name, t in found.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class Recorder:
    """Stands in for a CUDA graph: replays by running the function again."""

    def __init__(self, function: Callable[[], Tensor], rng: torch.Generator | None) -> None:
        self.function, self.result, self.replays = function, torch.zeros(6, device=DEVICE), 0

    def replay(self) -> None:
        self.result.copy_(self.function())
        self.replays += 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps are captured, for real on a GPU; the list has the graphs."""
    made: list[Any] = []
    if DEVICE.type == "cuda":
        real = gan_step.record

        def record(*args: Any) -> tuple[Any, Tensor]:
            made.append(real(*args))
            return made[-1]
    else:
        monkeypatch.setattr(GANStep, "_capturable", lambda self: True)
        monkeypatch.setattr(GANStep, "_check_capture", lambda self: None)

        def record(function: Callable[[], Tensor], device: torch.device, rng: Any) -> tuple[Any, Tensor]:
            made.append(Recorder(function, rng))
            return made[-1], made[-1].result

    monkeypatch.setattr(gan_step, "record", record)
    return made


# --- equal to the plain loop -------------------------------------------------------------------------------------


def by_hand(g: nn.Module, d: nn.Module, opt_g: Any, opt_d: Any, real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The loop of PyTorch's DCGAN example, on logits: two passes of D, all gradients computed."""

    def bce(logits: Tensor, label: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    d.zero_grad()
    loss_real = bce(d(real), 0.9)
    loss_real.backward()
    fake = g(z)
    loss_fake = bce(d(fake.detach()), 0.0)
    loss_fake.backward()
    opt_d.step()
    g.zero_grad()
    loss_g = bce(d(fake), 1.0)
    loss_g.backward()
    opt_g.step()
    return (loss_real + loss_fake).detach(), loss_g.detach()


def twenty_steps(dtype: torch.dtype, ours: bool, **settings: Any) -> tuple[dict[str, Tensor], Tensor]:
    nets = networks(fused=ours, dtype=dtype)
    if ours:
        opts: list[Any] = adams(nets)
        step = GANStep(*nets, *opts, **settings)
        run = lambda real, z: step(real, z)[:2]  # noqa: E731
    else:
        opts = [torch.optim.Adam(net.parameters(), RATE, (0.5, 0.999)) for net in nets]
        run = lambda real, z: by_hand(*nets, *opts, real, z)  # noqa: E731
    losses = [torch.stack(list(run(real, z))) for real, z in batches(20, dtype=dtype)]
    return state_of(nets, opts), torch.stack(losses)


@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
def test_twenty_steps_are_those_of_the_textbook_loop(capture: bool, recorded: list[Any]) -> None:
    """Against float64, fused and captured may err twice as much as plain PyTorch, and 64 roundings a step."""
    exact, exact_losses = twenty_steps(torch.float64, ours=False)
    plain, plain_losses = twenty_steps(torch.float32, ours=False)
    ours, our_losses = twenty_steps(torch.float32, ours=True, graph=capture)
    assert len(recorded) == capture
    floor = 20 * 64 * 2.0**-24

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm()) if float(b.norm()) else float(a.double().norm())

    assert distance(our_losses, exact_losses) <= 2 * distance(plain_losses, exact_losses) + floor
    names = [name.replace("blocks.", "") for name in ours]
    assert len(names) == len(plain)
    for kind in ("weight", "bias", "running", "num_batches", "exp_avg.", "exp_avg_sq", "step"):
        pairs = [
            (a, p, e)
            for (name, a), p, e in zip(ours.items(), plain.values(), exact.values(), strict=True)
            if kind in name + "."
        ]
        assert pairs, kind
        a, p, e = (torch.cat([t.double().flatten() for t in column]) for column in zip(*pairs, strict=True))
        assert distance(a, e) <= 2 * distance(p, e) + floor, kind


def test_in_float64_it_is_the_textbook_loop() -> None:
    ours, our_losses = twenty_steps(torch.float64, ours=True)
    theirs, losses = twenty_steps(torch.float64, ours=False)
    torch.testing.assert_close(our_losses, losses, rtol=1e-7, atol=1e-9)
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-7)


# --- capturing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["first step", "trained before"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16 with a scaler"])
def test_a_warm_up_leaves_no_trace(again: bool, half: bool) -> None:
    nets = networks()
    opts, rng = adams(nets), torch.Generator(DEVICE).manual_seed(5)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40) if half else None  # it overflows, and is lowered
    settings: dict[str, Any] = {"dtype": torch.float16, "scaler": scaler} if half else {}
    step = GANStep(*nets, *opts, noise=(NZ,), ema=0.9, graph=False, rng=rng, **settings)
    data = batches(3)
    if again:
        step(data[0][0])
    else:
        for optimizer in opts:
            optimizer.prepare()
    before = state_of((*nets, step.ema), opts)  # type: ignore[arg-type]
    own, cpu = rng.get_state(), torch.get_rng_state()
    scale = None if scaler is None else scaler.get_scale()
    step.warm_up(data[1][0])
    assert_equal(state_of((*nets, step.ema), opts), before)  # type: ignore[arg-type]
    assert torch.equal(rng.get_state(), own) and torch.equal(torch.get_rng_state(), cpu)
    assert all(p.grad is None for net in nets for p in net.parameters())
    assert scaler is None or scaler.get_scale() == scale


def test_steps_after_a_warm_up_have_the_same_bits() -> None:
    runs = []
    for warmed in (False, True):
        nets = networks()
        opts: list[Any] = [torch.optim.Adam(net.parameters(), 2e-4) for net in nets]
        step = GANStep(*nets, *opts, graph=False)
        if warmed:
            step.warm_up(*batches(1)[0])
        for real, z in batches(3):
            step(real, z)
        runs.append(state_of(nets, opts))
    assert_equal(*runs)


def test_a_warm_up_that_could_not_be_undone_is_refused() -> None:
    nets = networks()
    before = state_of(nets, [])
    for make in (lambda p: torch.optim.NAdam(p), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)):
        opts = [make(list(net.parameters())) for net in nets]
        step = GANStep(*nets, *opts, graph=False)
        with pytest.raises(ValueError, match="makes its state at its first step"):
            step.warm_up(*batches(1)[0])
        assert_equal(state_of(nets, []), before)
    opts = [torch.optim.SGD(net.parameters(), 0.1) for net in nets]
    GANStep(*nets, *opts, graph=False).warm_up(*batches(1)[0])
    assert_equal(state_of(nets, []), before)


def test_captured_and_eager_steps_have_the_same_bits(recorded: list[Any]) -> None:
    runs = []
    for graph in (False, True):
        nets = networks()
        opts = adams(nets)
        step = GANStep(*nets, *opts, graph=graph, ema=0.5)
        metrics = [torch.stack(step(real, z)) for real, z in batches(4)]
        runs.append(({**state_of((*nets, step.ema), opts)}, torch.stack(metrics)))  # type: ignore[arg-type]
    assert len(recorded) == 1
    assert_equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_metrics_outlive_the_next_step(recorded: list[Any]) -> None:
    nets = networks()
    step = GANStep(*nets, *adams(nets, 1e-2))
    (first, z), (second, z2) = batches(2)
    a = step(first, z)
    kept = torch.stack(a).clone()
    step(second, z2)
    assert torch.equal(torch.stack(a), kept)


def test_noise_is_drawn_anew_and_repeats_with_the_seed(recorded: list[Any]) -> None:
    runs = []
    for _ in range(2):
        nets = networks()
        rng = torch.Generator(DEVICE).manual_seed(3)
        step = GANStep(*nets, *adams(nets, 0.0), noise=(NZ,), rng=rng)
        real = batches(1)[0][0]
        runs.append(torch.stack([step(real).loss_g for _ in range(3)]))
    assert torch.equal(runs[0], runs[1])
    assert len(set(runs[0].tolist())) == 3


def eager_and_captured(
    train: Callable[[GANStep, Nets, list[FusedAdam]], None], **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `train(step, nets, optimizers)` leaves, without a graph and with one."""
    left = []
    for graph in (False, True):
        nets = networks()
        opts = adams(nets)
        train(GANStep(*nets, *opts, graph=graph, **settings), nets, opts)
        left.append(state_of(nets, opts))
    return left[0], left[1]


@pytest.mark.parametrize(("other_shapes", "graphs_made"), [("eager", 1), ("capture", 2)])
def test_a_last_short_batch(other_shapes: str, graphs_made: int, recorded: list[Any]) -> None:
    def train(step: GANStep, nets: Nets, opts: list[FusedAdam]) -> None:
        for size in (8, 8, 3) * 2:
            step(*batches(1, size)[0])

    assert_equal(*eager_and_captured(train, other_shapes=other_shapes))
    assert len(recorded) == graphs_made


def test_learning_rates_change_without_a_new_capture(recorded: list[Any]) -> None:
    def train(step: GANStep, nets: Nets, opts: list[FusedAdam]) -> None:
        schedule = torch.optim.lr_scheduler.StepLR(opts[0], 1, 0.5)
        for i, (real, z) in enumerate(batches(4)):
            step(real, z)
            schedule.step()
            opts[1].param_groups[0]["lr"] = 1e-3 / (i + 1)  # by hand
        assert float(opts[0].param_groups[0]["lr"]) == RATE / 16

    eager, captured = eager_and_captured(train)
    assert len(recorded) == 1
    for name, value in eager.items():  # a rate in a tensor is float32
        torch.testing.assert_close(captured[name], value, rtol=1e-5, atol=1e-7)


def _change(net: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    weight = next(net.parameters())
    weight.data = function(weight.data)


def _first_of(net: nn.Module, kind: type) -> nn.Module:
    return next(module for module in net.modules() if isinstance(module, kind))


@pytest.mark.parametrize(
    "change",
    [
        lambda g, d, opt: _change(d, torch.clone),
        lambda g, d, opt: _change(d, lambda weight: weight.transpose(2, 3)),
        lambda g, d, opt: g.eval(),
        lambda g, d, opt: opt.param_groups[0].update(betas=(0.9, 0.99)),
        lambda g, d, opt: next(d.parameters()).requires_grad_(False),
        lambda g, d, opt: setattr(_first_of(d, nn.LeakyReLU), "negative_slope", 0.5),
        lambda g, d, opt: setattr(_first_of(g, nn.BatchNorm2d), "momentum", None),
        lambda g, d, opt: g.blocks[-1].__setitem__(-1, nn.Hardsigmoid()),
    ],
    ids=["weights moved", "turned", "eval", "betas", "frozen", "slope", "momentum", "another module"],
)
def test_what_a_graph_took_for_granted_is_captured_anew(change: Callable, recorded: list[Any]) -> None:
    def train(step: GANStep, nets: Nets, opts: list[FusedAdam]) -> None:
        for i, (real, z) in enumerate(batches(4)):
            if i == 2:
                change(*nets, opts[0])
            step(real, z)

    assert_equal(*eager_and_captured(train))
    assert len(recorded) == 2


def _where(net: nn.Module) -> list[tuple]:
    return [(p.data_ptr(), p.stride()) for p in net.parameters()]


@pytest.mark.parametrize("name", ["generator", "discriminator", "ema"])
@pytest.mark.parametrize("write", KEEPS_OBJECTS.values(), ids=KEEPS_OBJECTS)
def test_what_was_written_is_trained_on(write: Write, name: str, recorded: list[Any]) -> None:
    """Where it lies in other memory, a graph that knew the old one is captured anew."""
    averages, moved = [], False

    def train(step: GANStep, nets: Nets, opts: list[FusedAdam]) -> None:
        nonlocal moved
        net = getattr(step, name)
        for i, (real, z) in enumerate(batches(3)):
            if i == 2:
                before = _where(net)
                write(net)
                moved = _where(net) != before
            step(real, z)
        averages.append(state_of((step.ema, step.ema), []))  # type: ignore[arg-type]

    assert_equal(*eager_and_captured(train, ema=0.5))
    assert_equal(*averages)
    assert len(recorded) == 1 + moved


def test_parameters_that_an_optimizer_does_not_know_are_refused() -> None:
    nets = networks()
    step = GANStep(*nets, *adams(nets), graph=False)
    step(*batches(1)[0])
    by_load_state_dict_that_assigns(nets[1])
    with pytest.raises(ValueError, match="optimizer_d updates none of the discriminator's parameters"):
        step(*batches(1)[0])


def test_loaded_weights_are_trained_on(recorded: list[Any]) -> None:
    def train(step: GANStep, nets: Nets, opts: list[FusedAdam]) -> None:
        data = batches(4)
        step(*data[0])
        saved = [copy.deepcopy(x.state_dict()) for x in (*nets, *opts)]
        step(*data[1])
        for x, state in zip((*nets, *opts), saved, strict=True):
            x.load_state_dict(state)
        step(*data[2])

    assert_equal(*eager_and_captured(train))
    assert len(recorded) == 2  # the optimisers' state is in other memory now


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [None, GradientPenalty(1.0, "r1")])
def test_accumulated_gradients_are_those_of_the_whole_batch(penalty: GradientPenalty | None) -> None:
    """Of networks without BatchNorm, whose statistics are of a part."""
    runs = []
    for parts in (1, 4):
        nets = networks(dtype=torch.float64)
        for net in nets:
            net.eval()
        opts = [torch.optim.SGD(net.parameters(), 0.1) for net in nets]
        step = GANStep(*nets, *opts, accumulate=parts, penalty=penalty, graph=False)
        metrics = [torch.stack(step(real, z)) for real, z in batches(2, dtype=torch.float64)]
        runs.append((state_of(nets, opts), torch.stack(metrics)))
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-9, atol=1e-12)
    for name, value in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_the_average_of_weights() -> None:
    nets = networks()
    step = GANStep(*nets, *adams(nets, 1e-2), ema=0.75, graph=False)
    assert step.ema is not None and not step.ema.training
    expected = [p.detach().clone() for p in nets[0].parameters()]
    for real, z in batches(3):
        step(real, z)
        for mean, p in zip(expected, nets[0].parameters(), strict=True):
            mean.lerp_(p.detach(), 0.25)
    for mean, p in zip(step.ema.parameters(), expected, strict=True):
        torch.testing.assert_close(mean, p)
        assert not mean.requires_grad
    for mean, buffer in zip(step.ema.buffers(), nets[0].buffers(), strict=True):
        assert torch.equal(mean, buffer)


LOSSES = {
    "hinge": (HINGE, lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(), lambda f: -f.mean()),
    "wasserstein": (WASSERSTEIN, lambda r, f: f.mean() - r.mean(), lambda f: -f.mean()),
    "least squares": (
        LEAST_SQUARES,
        lambda r, f: (F.mse_loss(r, torch.ones_like(r)) + F.mse_loss(f, torch.zeros_like(f))) / 2,
        lambda f: F.mse_loss(f, torch.ones_like(f)) / 2,
    ),
}


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_other_losses(name: str, grouped: bool) -> None:
    loss, of_d, of_g = LOSSES[name]
    nets, twins = networks(dtype=torch.float64), networks(dtype=torch.float64)
    opts = [torch.optim.SGD(net.parameters(), 0.1) for net in nets]
    d = nets[1] if grouped else nn.Sequential(fastdcgan.unfuse(nets[1]).blocks)
    ((real, z),) = batches(1, dtype=torch.float64)
    metrics = GANStep(nets[0], d, *opts, loss=loss, graph=False)(real, z)
    g, d = twins
    fake = g(z)
    on_real, on_fake = d(real), d(fake.detach())
    torch.testing.assert_close(metrics.loss_d, of_d(on_real, on_fake).detach())
    torch.testing.assert_close(metrics.d_real, on_real.sigmoid().mean().detach())
    torch.testing.assert_close(metrics.d_fake, on_fake.sigmoid().mean().detach())
    torch.testing.assert_close(metrics.loss_g, of_g(nets[1](fake)).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_compiled_networks() -> None:
    nets, twins = networks(), networks()
    step = GANStep(*nets, *adams(nets), compile=True, graph=False)
    plain = GANStep(*twins, *adams(twins), graph=False)
    for i, (real, z) in enumerate(batches(3)):
        n = len(real) - i // 2  # the last one is short
        a, b = step(real[:n], z[:n]), plain(real[:n], z[:n])
    torch.testing.assert_close(torch.stack(a), torch.stack(b), rtol=1e-3, atol=1e-4)


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"other_shapes": "recapture"}, ValueError, "other_shapes is 'recapture': expected one of eager, capture"),
        ({"generator": "G"}, TypeError, "generator must be an nn.Module, got str"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    nets = networks()
    opts = adams(nets)
    given = {"generator": nets[0], "discriminator": nets[1], "optimizer_g": opts[0], "optimizer_d": opts[1]}
    with pytest.raises(error, match=message):
        GANStep(**{**given, **settings})


def test_calls_are_checked() -> None:
    nets = networks()
    step = GANStep(*nets, *adams(nets), graph=False)
    ((real, _),) = batches(1)
    with pytest.raises(
        ValueError, match=r"no z given: pass it, or give GANStep the shape of one, as in noise=\(100,\)"
    ):
        step(real)
    with pytest.raises(TypeError, match=r"expected real images as a floating-point tensor, got torch\.uint8"):
        step(real.to(torch.uint8))


def test_a_graph_needs_a_gpu_and_capturable_optimizers() -> None:
    nets = networks()
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="graph=True needs networks on a GPU, these are on cpu"):
            GANStep(*nets, *adams(nets), graph=True)
    plain = [torch.optim.Adam(net.parameters()) for net in nets]
    with pytest.raises(ValueError, match=r"Adam can't be captured.*capturable=True.*graph=False"):
        gan_step.check_optimizers(*plain)
    gan_step.check_optimizers(*[torch.optim.SGD(net.parameters(), 0.1) for net in nets])
    gan_step.check_optimizers(*[torch.optim.Adam(net.parameters(), capturable=True) for net in nets])
