"""Gradients of any order: gradcheck, gradgradcheck, and gradient penalties against vanilla modules, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import fastdcgan
from tests.helpers.tolerance import assert_same_float64
from tests.helpers.twins import assert_same, block, discriminator, generator, numbers, twin

KINDS = [(transposed, norm) for transposed in (False, True) for norm in ("train", "eval", None)]


def as_function(model: nn.Module) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The model as a function of the input and its parameters, and those parameters; buffers are left alone."""
    names = [name for name, _ in model.named_parameters()]
    buffers = dict(model.named_buffers())

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in buffers.items()}
        return functional_call(model, state, (x,))

    return call, tuple(p.detach().requires_grad_() for p in model.parameters())


@pytest.mark.parametrize("act", ["tanh", "leaky_relu", "elu"])
@pytest.mark.parametrize(("transposed", "norm"), KINDS)
def test_gradcheck_of_a_block(transposed: bool, norm: str | None, act: str) -> None:
    geometry = {"kernel_size": 3, "stride": 2, "padding": 1}
    call, parameters = as_function(twin(block(transposed, norm, act, (2, 2), **geometry)))
    x = numbers(2, 2, 3, 3).requires_grad_()
    assert gradcheck(call, (x, *parameters), fast_mode=act != "tanh")


@pytest.mark.parametrize("act", ["tanh", "leaky_relu", "silu", "mish", "softplus", "logsigmoid", "hardswish", "relu6"])
@pytest.mark.parametrize(("transposed", "norm"), KINDS)
def test_gradgradcheck_of_a_block(transposed: bool, norm: str | None, act: str) -> None:
    geometry = {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}
    call, parameters = as_function(twin(block(transposed, norm, act, (2, 2), **geometry)))
    x = numbers(2, 2, 3, 3).requires_grad_()
    assert gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("boundaries", ["finished", "deferred"])
def test_gradcheck_of_a_chain(boundaries: str) -> None:
    model = twin(
        nn.Sequential(
            nn.ConvTranspose2d(2, 3, 3, 1, 0), nn.BatchNorm2d(3), nn.Tanh(),
            nn.Conv2d(3, 2, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2),
        ).double()
    )  # fmt: skip
    model.boundaries = boundaries
    call, parameters = as_function(model)
    x = numbers(2, 2, 3, 3).requires_grad_()
    assert gradcheck(call, (x, *parameters), fast_mode=True)
    assert gradgradcheck(call, (x, *parameters), fast_mode=True)


def penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The gradient penalty of WGAN-GP (Gulrajani et al., 2017, section 4) and its gradients."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    score = model(x)
    slope = torch.autograd.grad(score.sum(), x, create_graph=True)[0]
    loss = ((slope.flatten(1).norm(2, 1) - 1) ** 2).mean() + score.mean()
    loss.backward()
    found = {"loss": loss.detach(), "slope": slope.detach(), "input gradient": x.grad}
    return found | {f"gradient of {name}": p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.parametrize("boundaries", ["finished", "deferred"])
@pytest.mark.parametrize("train", [True, False])
def test_gradient_penalty_is_vanillas(train: bool, boundaries: str) -> None:
    model = discriminator().train(train)
    fused = twin(model)
    fused.boundaries = boundaries
    assert_same(penalty(fused, numbers(4, 3, 16, 16)), penalty(model, numbers(4, 3, 16, 16)))


def test_gradient_penalty_of_a_generator_with_frozen_parts() -> None:
    model = generator()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("0.", "4.")))
    assert_same(penalty(twin(model), numbers(4, 5, 1, 1)), penalty(model, numbers(4, 5, 1, 1)))


def test_gradient_penalty_with_two_statistics_groups() -> None:
    model = discriminator()
    x, results = numbers(4, 3, 16, 16), []
    for kind in ("fused", "vanilla"):
        given, net = x.clone().requires_grad_(), (twin(model) if kind == "fused" else copy.deepcopy(model))
        score = net(given, stat_groups=2) if kind == "fused" else torch.cat([net(half) for half in given.chunk(2)])
        slope = torch.autograd.grad((score * numbers(4, 1, 1, 1)).sum(), given, create_graph=True)[0]
        slope.square().sum().backward()
        results.append({name: p.grad for name, p in net.named_parameters()} | {"x": given.grad})
    assert_same(*results)


def test_gradient_penalty_in_float32_on_each_backend(backend: str) -> None:
    low = discriminator().float()
    x = numbers(4, 3, 16, 16, dtype=torch.float32)
    truth = penalty(copy.deepcopy(low).double(), x.double())
    vanilla, found = penalty(low, x), penalty(twin(low), x)
    for name, right in truth.items():
        if right is None or not right.dtype.is_floating_point:
            continue
        got, usual = found[name], vanilla[name]
        assert got is not None and usual is not None
        scale = max(1.0, float(right.abs().max()))
        allowed = 2 * float((usual - right).abs().max()) + 64 * torch.finfo(torch.float32).eps * scale
        assert float((got - right).abs().max()) <= allowed, name


class PlainBatchNorm(nn.Module):
    """Batch statistics in elementary operations: third derivatives of PyTorch's own batch norm are not right."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, y: Tensor) -> Tensor:
        mean = y.mean((0, 2, 3), keepdim=True)
        xhat = (y - mean) / ((y - mean).square().mean((0, 2, 3), keepdim=True) + self.norm.eps).sqrt()
        return xhat * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


@pytest.mark.parametrize(("transposed", "norm"), KINDS)
def test_third_order(transposed: bool, norm: str | None) -> None:
    model = block(transposed, norm, "tanh", (2, 3), kernel_size=3, stride=2)
    plain = copy.deepcopy(model)
    if norm == "train":
        plain[1] = PlainBatchNorm(plain[1])
    results = []
    for net in (twin(model), plain):
        x = numbers(2, 2, 4, 3).requires_grad_()
        value, leaves = net(x).square().sum(), [x, *net.parameters()]
        for order in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=order < 2)
            value = sum((g * numbers(*g.shape, seed=order)).sum() for g in grads)
        results.append(grads)
    for found, expected in zip(*results, strict=True):
        assert_same_float64(found, expected, "third derivative")


def test_the_gradient_of_the_outer_gradient() -> None:
    """create_graph also differentiates with respect to the incoming gradient."""
    model, x = block(True, "train", "silu"), numbers(3, 4, 5, 5)
    results = []
    for net in (twin(model), copy.deepcopy(model)):
        given = x.clone().requires_grad_()
        out = net(given)
        upstream = numbers(*out.shape, seed=3).requires_grad_()
        slope = torch.autograd.grad(out, given, upstream, create_graph=True)[0]
        results.append(torch.autograd.grad(slope.square().sum(), [upstream, given, *net.parameters()]))
    for found, expected in zip(*results, strict=True):
        assert_same_float64(found, expected, "gradient")


def test_forward_mode_is_vanillas() -> None:
    model, x, tangent = block(False, "train", "tanh"), numbers(2, 4, 6, 6), numbers(2, 4, 6, 6, seed=4)
    with torch.autograd.forward_ad.dual_level():
        found, expected = (
            torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(x, tangent))).tangent
            for net in (twin(model), copy.deepcopy(model))
        )
        assert_same_float64(found, expected, "tangent")


def test_a_gradient_of_a_sum_over_several_heads(backend: str) -> None:
    """The chain's output feeding two losses, one of them without a gradient."""
    net = fastdcgan.ConvBNLeakyReLU2d(4, 6, 4, 2, 1).to(numbers(1).device)
    x = numbers(3, 4, 6, 6, dtype=torch.float32).requires_grad_()
    out = net(x)
    (out.sum() + out.square().sum() + (out.detach() * 3).sum()).backward()
    again = x.detach().requires_grad_()
    copied = copy.deepcopy(net)
    copied.zero_grad()
    out = copied(again)
    (out + out.square()).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize(("make", "size"), [(generator, (2, 5, 1, 1)), (discriminator, (2, 3, 16, 16))])
def test_batches_of_gradients(make: Callable[..., nn.Sequential], size: tuple[int, ...], how: str) -> None:
    """As `torch.autograd.functional.jacobian(vectorize=True)` takes them: what one after the other gives."""
    model = twin(make())
    wanted = (numbers(*size).requires_grad_(), model[0].weight)
    out = model(wanted[0])
    batch = numbers(3, *out.shape)

    def grad(da: Tensor, **how: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, wanted, da, retain_graph=True, **how)

    found = torch.vmap(grad)(batch) if how == "vmap" else grad(batch, is_grads_batched=True)
    for i, da in enumerate(batch):
        for got, truth in zip(found, grad(da), strict=True):
            assert_same_float64(got[i], truth)
            assert not got.requires_grad
