"""Forwards that are kept in channels_last: to whoever gets a tensor of one, it is what plain modules give."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdcgan
from fastdcgan.dispatch import autotune
from fastdcgan.engine import forwards, reordered
from fastdcgan.engine.place import local
from tests.helpers.networks import VARIANTS
from tests.helpers.twins import assert_same, build, numbers, results, settled_input
from tests.models import SMALL

SHAPE = (2, 3, 8, 8)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Tensor]]:
    """Every forward runs in channels_last; what was reordered."""
    monkeypatch.setattr(autotune, "consulted", lambda device: True)
    monkeypatch.setenv("FASTDCGAN_AUTOTUNE_CACHE", str(tmp_path / "autotune.json"))
    found: list[Tensor] = []
    begin, reorder = forwards.Trial.__init__, reordered.reorder

    def decided(trial: forwards.Trial, name: str) -> None:
        begin(trial, name)
        trial.way = forwards.CHANNELS_LAST

    def noted(value: Any) -> Any:
        if type(value) is Tensor:
            found.append(value)
        return reorder(value)

    monkeypatch.setattr(forwards.Trial, "__init__", decided)
    monkeypatch.setattr(reordered, "reorder", noted)
    yield found
    found.clear()


class Net(nn.Module):
    """Convolutions between which `way(self, h)` runs."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(4, 5, 3, 1, 1), nn.LeakyReLU(0.2))
        self.way, self.kept = way, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, self.first(x)))


def attention(m: Any, h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    flat = h.view(n, c, -1)
    return torch.bmm(flat, torch.bmm(flat.transpose(1, 2), flat).softmax(-1)).view(n, c, height, width)


def written_through_a_view(m: Any, h: Tensor) -> Tensor:
    h = h * 1
    h.view(-1)[3] = 7.0
    h[:, 1].mul_(2)
    return h


def strided(m: Any, h: Tensor) -> Tensor:
    return h.as_strided(h.shape, h.stride()) if h.is_contiguous() else h * 0


def kept_aside(m: Any, h: Tensor) -> Tensor:
    m.kept.append(h)
    return h + 1


def split(m: Any, h: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    return torch.cat([a.sigmoid(), b], 1)


def drawn(m: Any, h: Tensor) -> Tensor:
    return F.dropout(h, 0.5) + torch.rand_like(h) + F.dropout2d(h, 0.5)


def pooled(m: Any, h: Tensor) -> Tensor:
    h, where = F.max_pool2d(h, 2, return_indices=True)
    return F.max_unpool2d(F.interpolate(h, scale_factor=1), where, 2) * h.mean((2, 3), keepdim=True)


def checkpointed(m: Any, h: Tensor) -> Tensor:
    return checkpoint(lambda h: F.pad(h, (1, 1, 1, 1), "reflect")[:, :, 1:-1, 1:-1].relu(), h, use_reentrant=False)


def copied(m: Any, h: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(h.detach(), file)
    file.seek(0)
    return h + torch.load(file) + copy.deepcopy(h.detach())


def asked(m: Any, h: Tensor) -> Tensor:
    return h.clone(memory_format=torch.contiguous_format) if h.stride()[1] == 64 else h * 0


def hooked(m: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda grad: grad.view(-1).sin().view(grad.shape))
    return h


def into_numpy(m: Any, h: Tensor) -> Tensor:
    return h + torch.from_numpy(h.detach().numpy().reshape(-1).copy()).view(h.shape)


WAYS = [
    attention, written_through_a_view, strided, kept_aside, split, drawn, pooled, checkpointed, copied, asked, hooked,
    into_numpy,
]  # fmt: skip


def outcome(net: Net, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, as torch.autograd.grad gives them, and what was kept."""
    torch.manual_seed(0)
    net.kept.clear()
    x = x.clone().requires_grad_()
    out = net(x)
    assert type(out) is Tensor
    parameters = dict(net.named_parameters())
    grads = torch.autograd.grad(out.square().sum(), [x, *net.kept, *parameters.values()])
    names = ["input", *(f"kept {i}" for i in range(len(net.kept))), *parameters]
    return {"output": out, **{f"value of kept {i}": t for i, t in enumerate(net.kept)}} | dict(
        zip(names, grads, strict=True)
    )


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", WAYS)
def test_as_plain_modules(way: Callable, train: bool, made: list[Tensor]) -> None:
    """Values, and strides that code may go by."""
    torch.manual_seed(0)
    plain = Net(way).double().train(train)
    fused, x = fastdcgan.fuse(copy.deepcopy(plain)), numbers(*SHAPE)
    expected, found = outcome(plain, x), outcome(fused, x)
    assert made
    assert_same(found, expected)
    for name, value in expected.items():
        # A gradient of what was asked for only later comes as what went on from it gives it.
        assert found[name].stride() == value.stride() or name.startswith("kept"), name
    assert torch.equal(found["output"].view(-1), found["output"].reshape(-1))


@pytest.mark.parametrize("name", [*SMALL, *VARIANTS])
def test_networks(name: str, made: list[Tensor], device: torch.device) -> None:
    factory, shape = (SMALL | VARIANTS)[name]
    x = settled_input(build(factory, torch.float64, device), shape, device)
    found = [results(build(factory, torch.float64, device), x)]
    found.append(results(fastdcgan.fuse(build(factory, torch.float64, device)), x))
    assert_same(found[1], found[0])


def test_what_plain_modules_keep_in_channels_last(made: list[Tensor]) -> None:
    """A contiguous image and a weight that is channels_last, behind a norm too."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Tanh()).to(
        memory_format=torch.channels_last
    )
    fused, x = fastdcgan.fuse(copy.deepcopy(plain)), torch.randn(SHAPE)
    assert fused(x).stride() == plain(x).stride()
    assert not made


def test_nothing_lives_longer(made: list[Tensor]) -> None:
    net, x = fastdcgan.fuse(Net(kept_aside)), torch.ones(SHAPE)
    for _ in range(2):
        net(x).sum().backward()
        net.kept.clear()
    assert made
    made.clear()
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is reordered.Reordered]


def test_an_error_leaves_plain_tensors(made: list[Tensor]) -> None:
    def fails(m: Any, h: Tensor) -> Tensor:
        m.kept.append(h)
        raise RuntimeError("no more")

    net = fastdcgan.fuse(Net(fails))
    with pytest.raises(RuntimeError, match="no more"):
        net(torch.ones(SHAPE))
    assert type(net.kept[0]) is Tensor and net.kept[0].is_contiguous() and not local.within


def test_inside_a_transform(made: list[Tensor]) -> None:
    def way(m: Any, h: Tensor) -> Tensor:
        return torch.func.grad(lambda t: (t * h).sin().sum())(h) + torch.func.vmap(lambda t: t.view(-1).sum())(h).sum()

    torch.manual_seed(0)
    plain = Net(way).double()
    fused, x = fastdcgan.fuse(copy.deepcopy(plain)), numbers(*SHAPE)
    expected, found = outcome(plain, x), outcome(fused, x)
    assert made
    assert_same(found, expected)


def test_second_derivatives(made: list[Tensor]) -> None:
    torch.manual_seed(0)
    plain, x, found = Net(kept_aside).double(), numbers(*SHAPE), []
    for net in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        leaf = x.clone().requires_grad_()
        out = net(leaf)
        (slope,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
        assert net.kept[-1].view(-1).shape == (2 * 4 * 64,)
        slope.square().sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters()} | {"input": leaf.grad})
        net.kept.clear()
    assert made
    assert_same(found[1], found[0])
