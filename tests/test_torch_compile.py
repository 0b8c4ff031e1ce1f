"""`torch.compile(fullgraph=True)`: no graph break, the same numbers, one graph for every batch size."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastdcgan
from tests.helpers.networks import IMAGE, VARIANTS
from tests.helpers.twins import assert_same, build, draw, one_thread, results
from tests.models import SMALL
from tests.models.dcgan import Discriminator, Generator

PAIRS = {**SMALL, **VARIANTS}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@one_thread()
@pytest.mark.parametrize(
    ("name", "train"),
    [
        *((name, True) for name in ("dcgan generator", "pix2pix unet", "two blocks", "momentum none", "affine false")),
        *((name, True) for name in ("no running statistics", "shared conv", "dropout", "reflect", "weight norm")),
        *((name, True) for name in ("transposed groups", "parametrizations", "subclass alone", "residual generator")),
        *((name, False) for name in ("dcgan discriminator", "two blocks", "tied weight", "unbatched")),
    ],
)
def test_one_graph_with_the_same_results(name: str, train: bool, device: torch.device) -> None:
    factory, shape = PAIRS[name]
    x = draw(shape, torch.float64, device)
    eager = fastdcgan.fuse(build(factory, torch.float64, device)).train(train)
    compiled = fastdcgan.fuse(build(factory, torch.float64, device)).train(train)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(fullgraph=True, backend=counter)
    expected, found = results(eager, x), results(compiled, x)
    if name == "dropout" and train:  # the random numbers are drawn by the compiler's own rules
        assert expected.keys() == found.keys()
    else:
        assert_same(expected, found)
    assert counter.frame_count == 1


@one_thread()
def test_dynamic_batch(device: torch.device) -> None:
    counts = []
    for fused in (False, True):
        eager = build(lambda: nn.Sequential(*_up(6, 4), *_up(4, 3)), torch.float64, device)
        if fused:
            fastdcgan.fuse(eager)
        model = copy.deepcopy(eager)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for batch in (4, 3, 7, 5):
            z = draw((batch, 6, 2, 3), torch.float64, device)
            for net in (eager, compiled):
                net.zero_grad()
                net(z).square().mean().backward()
            for (name, a), b in zip(eager.named_parameters(), model.named_parameters(), strict=True):
                torch.testing.assert_close(b[1].grad, a.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert_same(dict(eager.named_buffers()), dict(model.named_buffers()))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0] < 4


def _up(ci: int, co: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(ci, co, 4, 2, 1, bias=False), nn.BatchNorm2d(co), nn.ReLU(True)]


@one_thread()
def test_image_sizes_and_statistics_groups(device: torch.device) -> None:
    eager = fastdcgan.fuse(build(VARIANTS["two blocks"][0], torch.float64, device))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size, groups in ((8, 1), (9, 2), (12, 2)):
        x = draw((4, 3, size, size + 1), torch.float64, device)
        torch.testing.assert_close(
            compiled(x, stat_groups=groups), eager(x, stat_groups=groups), rtol=1e-10, atol=1e-12
        )
    assert_same(dict(eager.named_buffers()), dict(model.named_buffers()))


@one_thread()
def test_a_whole_training_step(device: torch.device) -> None:
    """Forward of both networks, losses and backward, in one graph."""

    def step(g: nn.Module, d: nn.Module, z: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        fake = g(z)
        on_d = nn.functional.softplus(-d(real)).mean() + nn.functional.softplus(d(fake.detach())).mean()
        return on_d, nn.functional.softplus(-d(fake)).mean()

    z, real = draw((3, 100, 1, 1), torch.float64, device), draw((3, 3, 32, 32), torch.float64, device, 2)
    found = []
    for compiled in (False, True):
        g = fastdcgan.fuse(build(lambda: Generator(pixels=32), torch.float64, device))
        d = fastdcgan.fuse(build(lambda: Discriminator(pixels=32, sigmoid=False), torch.float64, device))
        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        losses = run(g, d, z, real)
        losses[0].backward(inputs=list(d.parameters()), retain_graph=True)
        losses[1].backward(inputs=list(g.parameters()))
        gradients = {f"{i}.{name}": p.grad for i, net in enumerate((g, d)) for name, p in net.named_parameters()}
        found.append({"d": losses[0].detach(), "g": losses[1].detach(), **gradients, **dict(g.named_buffers())})
    assert_same(*found)


@one_thread()
@pytest.mark.parametrize("train", [True, False], ids=["train", "no_grad"])
def test_inductor(train: bool, device: torch.device) -> None:
    x = draw(IMAGE, torch.float32, device)
    eager = fastdcgan.fuse(build(VARIANTS["nested"][0], torch.float32, device)).train(train)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    with torch.set_grad_enabled(train):
        outs = [net(x) for net in (eager, compiled)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    if train:
        for out in outs:
            out.square().sum().backward()
        for (name, a), b in zip(eager.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-3, msg=name)
    torch.testing.assert_close(dict(model.named_buffers()), dict(eager.named_buffers()), rtol=1e-5, atol=1e-6)


@one_thread()
def test_autocast_inside_and_outside(device: torch.device) -> None:
    model = fastdcgan.fuse(build(VARIANTS["two blocks"][0], torch.float32, device)).eval()
    x = draw(IMAGE, torch.float32, device)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(x)

    expected = inside(x)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(torch.compile(inside, fullgraph=True, backend="aot_eager")(x), expected)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


@one_thread()
def test_changes_are_noticed(device: torch.device) -> None:
    """Mode, hooks, the backend asked for and fusing itself: the compiled function follows them."""
    model = build(VARIANTS["two blocks"][0], torch.float64, device)
    x = draw(IMAGE, torch.float64, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for change in ("none", "fuse", "eval", "reference", "unfuse", "fuse"):
            if change in ("fuse", "unfuse"):
                getattr(fastdcgan, change)(model)
            elif change == "eval":
                model.eval()
            twin = copy.deepcopy(model)
            with fastdcgan.backend("reference" if change == "reference" else "auto"):
                torch.testing.assert_close(compiled(x), twin(x), rtol=1e-10, atol=1e-12)
    fused = [any("fastdcgan" in str(node.target) for node in graph.graph.nodes) for graph in counter.graphs]
    assert fused[:3] == [False, True, True]  # plain, fused in training mode, fused in eval mode


@one_thread()
def test_a_second_gradient_is_refused_as_pytorch_refuses_it(device: torch.device) -> None:
    x = draw(IMAGE, torch.float64, device).requires_grad_()
    messages = []
    for fused in (False, True):
        model = build(VARIANTS["two blocks"][0], torch.float64, device)
        compiled = torch.compile(fastdcgan.fuse(model) if fused else model, backend="aot_eager")
        (slope,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward") as error:
            slope.sum().backward()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
