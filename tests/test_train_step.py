"""The training step: against the algorithm written out, fused against plain, penalties, precisions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdcgan
from fastdcgan.dcgan import Discriminator, Generator, GradientPenalty, StepMetrics, train_step
from fastdcgan.train_step import frozen

STEPS = 50


def networks(dtype: torch.dtype = torch.float32) -> tuple[Generator, Discriminator]:
    torch.manual_seed(1)
    return Generator(28, 1, nz=8, ngf=4).to(dtype), Discriminator(28, 1, ndf=4).to(dtype)


def adams(*nets: nn.Module) -> list[torch.optim.Adam]:
    return [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in nets]


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Images with a bright half and noise, as (real, z)."""
    random = torch.Generator().manual_seed(2)
    result = []
    for _ in range(count):
        real = torch.rand(8, 1, 28, 28, generator=random) - 1
        real[:, :, :14] += 1
        result.append((real.to(dtype), torch.randn(8, 8, generator=random).to(dtype)))
    return result


def parameters(*nets: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for net in nets for p in net.parameters()])


def by_hand(g: nn.Module, d: nn.Module, opt_g, opt_d, real: Tensor, z: Tensor) -> Tensor:
    """Algorithm 1 as PyTorch's example has it, with plain modules, in two passes, on logits."""

    def bce(logits: Tensor, label: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    opt_d.zero_grad()
    bce(d(real), 0.9).backward()
    fake = g(z)
    bce(d(fake.detach()), 0.0).backward()
    opt_d.step()
    opt_g.zero_grad()
    loss_g = bce(d(fake), 1.0)
    loss_g.backward()
    opt_g.step()
    return loss_g.detach()


@pytest.mark.parametrize("fused", [True, False])
def test_step_is_the_algorithm(fused: bool) -> None:
    ours, theirs = networks(torch.float64), networks(torch.float64)
    for net in theirs if fused else (*ours, *theirs):
        fastdcgan.unfuse(net)
    opt_ours, opt_theirs = adams(*ours), adams(*theirs)
    for real, z in batches(3, torch.float64):
        metrics = train_step(*ours, *opt_ours, real, z)
        loss_g = by_hand(*theirs, *opt_theirs, real, z)
        torch.testing.assert_close(metrics.loss_g, loss_g, rtol=1e-9, atol=1e-9)
    for a, b in zip(ours, theirs, strict=True):
        for (key, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_metrics() -> None:
    """On networks whose answers are known: G gives -1 everywhere, D the mean of its input."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x.mean(dim=(1, 2, 3))

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.tensor(-1.0))

        def forward(self, z: Tensor) -> Tensor:
            return self.level.expand(len(z), 1, 2, 2)

    g, d = Constant(), Mean()
    opt_g, opt_d = torch.optim.SGD(g.parameters(), 0.5), torch.optim.SGD(d.parameters(), 0.5)
    m = train_step(g, d, opt_g, opt_d, torch.ones(4, 1, 2, 2), torch.zeros(4, 3), real_label=0.9)
    p = torch.tensor(2.0).sigmoid()
    assert torch.isclose(m.d_real, p)
    assert torch.isclose(m.d_fake, 1 - p)
    assert torch.isclose(m.loss_d, -(0.9 * p.log() + 0.1 * (1 - p).log()) - p.log())
    scale = 2.0 - 0.5 * ((p - 0.9) - (1 - p))  # dloss/dlogit = p - label; logits are +scale and -scale
    assert torch.isclose(d.scale.detach(), scale)
    after = (-scale).sigmoid()
    assert torch.isclose(m.d_fake_after, after)
    assert torch.isclose(m.loss_g, -after.log())
    assert torch.isclose(g.level.detach(), -1 + 0.5 * (1 - after) * scale)
    assert m.penalty == 0
    assert all(v.dtype == torch.float32 and v.dim() == 0 and not v.requires_grad for v in m)


def test_d_gets_no_gradient_in_gs_part() -> None:
    g, d = networks()
    seen: list[str] = []
    d.blocks.logit.conv.weight.register_hook(lambda grad: seen.append("logit"))
    g.blocks.image.conv.weight.register_hook(lambda grad: seen.append("image"))
    ((real, z),) = batches(1)
    train_step(g, d, *adams(g, d), real, z)
    assert seen == ["logit", "image"]


def test_frozen_gives_back_what_was() -> None:
    _, d = networks()
    d.blocks.image.requires_grad_(False)
    before = [p.requires_grad for p in d.parameters()]
    with frozen(d):
        assert not any(p.requires_grad for p in d.parameters())
    assert [p.requires_grad for p in d.parameters()] == before


def trained(dtype: torch.dtype, fused: bool) -> tuple[Tensor, Tensor, list[StepMetrics]]:
    """How far 50 steps take the parameters from where they started, D's buffers, and what the steps said."""
    nets = networks(dtype)
    for net in nets:
        # Smooth ones: rounding that carries a single value over the kink of a ReLU changes its gradient as a whole.
        for block in (m for m in net.modules() if isinstance(getattr(m, "act", None), (nn.ReLU, nn.LeakyReLU))):
            block.act = nn.SiLU()
        if not fused:
            fastdcgan.unfuse(net)
    start, opts = parameters(*nets), adams(*nets)
    metrics = [train_step(*nets, *opts, real, z) for real, z in batches(STEPS, dtype)]
    return parameters(*nets) - start, torch.cat([b.double().flatten() for b in nets[1].buffers()]), metrics


def test_fused_and_plain_stay_together() -> None:
    """50 steps in float32, fused and plain, against the same steps in float64.

    Every step adds rounding of relative size u = 2^-24 to sums of some hundred terms, and Adam divides each gradient by
    its own size, so errors of a step are carried on at full size: they grow about with the number of steps. Plain
    PyTorch's own distance from float64 measures that growth on these very data; fused may be at twice that distance,
    and no further from it than 50 steps of 64 u each when that should be 0.
    """
    truth, truth_buffers, truth_metrics = trained(torch.float64, fused=False)
    plain, plain_buffers, plain_metrics = trained(torch.float32, fused=False)
    fused, fused_buffers, fused_metrics = trained(torch.float32, fused=True)
    floor = STEPS * 64 * 2.0**-24

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    def losses(metrics: list[StepMetrics]) -> Tensor:
        return torch.stack([torch.stack([m.loss_d, m.loss_g]) for m in metrics]).double()

    assert distance(fused, truth) <= 2 * distance(plain, truth) + floor
    assert distance(fused_buffers, truth_buffers) <= 2 * distance(plain_buffers, truth_buffers) + floor
    t, p, f = map(losses, (truth_metrics, plain_metrics, fused_metrics))
    assert distance(f, t) <= 2 * distance(p, t) + floor
    assert distance(f, t) < 1e-3  # and the yardstick itself is short


# --- penalties and precisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_penalty_of_a_linear_discriminator(kind: str) -> None:
    """Its gradient is its weight, wherever it is taken."""
    d = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).double()
    norm = d[1].weight.norm()
    expected = 10 * (norm - 1) ** 2 if kind == "wgan-gp" else 5 * norm**2
    real, fake = torch.randn(2, 6, 1, 2, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad(expected, d[1].weight)
    penalty = GradientPenalty(10.0, kind)(d, real, fake)
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=1e-9)
    penalty.backward()
    torch.testing.assert_close(d[1].weight.grad, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_penalty_of_fused_and_plain_networks(kind: str) -> None:
    ours, theirs = networks(torch.float64)[1], networks(torch.float64)[1]
    fastdcgan.unfuse(theirs)
    real, fake = torch.randn(2, 4, 1, 28, 28, dtype=torch.float64)
    for d in (ours, theirs):
        torch.manual_seed(3)
        GradientPenalty(10.0, kind)(d, real, fake).backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_penalty_is_part_of_ds_loss() -> None:
    plain, penalised = networks(), networks()
    ((real, z),) = batches(1)
    a = train_step(*plain, *adams(*plain), real, z)
    b = train_step(*penalised, *adams(*penalised), real, z, penalty=GradientPenalty(10.0, "r1"))
    assert b.penalty > 0
    torch.testing.assert_close(b.loss_d, a.loss_d + b.penalty)
    assert not torch.equal(parameters(plain[1]), parameters(penalised[1]))


def test_penalties_are_checked() -> None:
    with pytest.raises(ValueError, match="gradient penalty is 'r2': expected one of wgan-gp, r1"):
        GradientPenalty(1.0, "r2")
    with pytest.raises(ValueError, match="the gradient penalty's weight is nan: expected at least 0"):
        GradientPenalty(float("nan"))


@pytest.mark.parametrize("penalty", [None, GradientPenalty(1.0, "r1")], ids=["", "r1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, penalty: GradientPenalty | None) -> None:
    exact, half = networks(), networks()
    opts_exact, opts_half = adams(*exact), adams(*half)
    # A scale that no gradient here overflows at: the usual first one, 65536, costs skipped steps.
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if dtype == torch.float16 else None
    for real, z in batches(5):
        a = train_step(*exact, *opts_exact, real, z, penalty=penalty)
        b = train_step(*half, *opts_half, real, z, penalty=penalty, dtype=dtype, scaler=scaler)
    # Five steps of a dtype with 8 (bfloat16) or 11 bits.
    for name, x, y in zip(StepMetrics._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.02, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.dtype == torch.float32 for net in half for p in net.parameters())


def test_overflow_skips_the_step_and_lowers_the_scale() -> None:
    nets = networks()
    opts, scaler = adams(*nets), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    start = parameters(*nets)
    ((real, z),) = batches(1)
    penalty = GradientPenalty(10.0)
    metrics = train_step(*nets, *opts, real, z, dtype=torch.float16, scaler=scaler, penalty=penalty)
    assert torch.equal(parameters(*nets), start)
    assert scaler.get_scale() == 2.0**39
    assert metrics.loss_d.isfinite()
    assert metrics.loss_g.isfinite()


def test_any_two_modules() -> None:
    """A plain Sequential pair, with a logit of shape [N, 1, 1, 1]."""
    g, d = networks()
    plain = copy.deepcopy(d)
    ((real, z),) = batches(1)
    a = train_step(g, d, *adams(g, d), real, z)
    g2, _ = networks()
    b = train_step(g2, fastdcgan.unfuse(plain).blocks, *adams(g2, plain), real, z)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "wgan-gp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_labels_go_to_both_networks(kind: str | None, accumulate: int) -> None:
    """A step of conditional networks is that of networks that have the labels built in, and one of other labels is
    another one."""
    torch.manual_seed(1)
    nets = Generator(28, 1, nz=8, ngf=4, classes=3).double(), Discriminator(28, 1, ndf=4, classes=3).double()
    labels = torch.arange(8) % 3
    penalty = None if kind is None else GradientPenalty(1.0, kind)

    class Given(nn.Module):
        """`net` with the labels of the batch, or of its part, for real and for generated images alike."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x: Tensor) -> Tensor:
            part = len(x) * (self.calls % (8 // len(x)))
            return self.net(x, labels[part : part + len(x)])

    def step(*nets: nn.Module, **given: Tensor) -> StepMetrics:
        torch.manual_seed(3)  # of the mixtures
        ((real, z),) = batches(1, torch.float64)
        return train_step(*nets, *adams(*nets), real, z, penalty=penalty, accumulate=accumulate, **given)

    theirs, other = copy.deepcopy(nets), copy.deepcopy(nets)
    if accumulate == 1:
        built_in = step(*map(Given, theirs))
        ours = step(*nets, labels=labels)
        for a, b in zip(ours, built_in, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(parameters(*nets), parameters(*theirs), rtol=1e-7, atol=1e-9)
    else:  # BatchNorm's statistics are of a part: the halves one by one give the same metrics on the average
        ours = step(*nets, labels=labels)
    assert (step(*other, labels=(labels + 1) % 3).loss_d - ours.loss_d).abs() > 1e-6
    assert all((net.embed.weight.grad != 0).any() for net in nets)


def test_labels_are_checked() -> None:
    nets = Generator(28, 1, nz=8, ngf=4, classes=3), Discriminator(28, 1, ndf=4, classes=3)
    start = parameters(*nets)
    ((real, z),) = batches(1)
    for labels, message in (
        (torch.zeros(7, dtype=torch.long), r"one for each of the 8 images, got \[7\]"),
        ([0] * 8, "one for each of the 8 images, got <class 'list'>"),
        (torch.zeros(8), r"labels are torch.float32 \[8\]: expected torch.int64 \[8\]"),
        (None, "the generator is of 3 classes: expected one to be chosen"),
    ):
        with pytest.raises(ValueError, match=message):
            train_step(*nets, *adams(*nets), real, z, labels=labels)
    with pytest.raises(ValueError, match="a network that takes none"):
        train_step(*networks(), *adams(*networks()), real, z, labels=torch.zeros(8, dtype=torch.long))
    assert torch.equal(parameters(*nets), start)
