"""Weights converted: the state_dict of PyTorch's example, one projection into the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdcgan.dcgan import (
    Discriminator,
    Generator,
    convert_projection,
    example_state_dict,
    load_example_state_dict,
)


def example_generator(nz: int = 100, ngf: int = 64, nc: int = 3) -> nn.Module:
    """The generator of PyTorch's DCGAN example, as one flat Sequential called `main`."""
    widths = [ngf * 8, ngf * 4, ngf * 2, ngf]
    layers: list[nn.Module] = [nn.ConvTranspose2d(nz, widths[0], 4, 1, 0, bias=False)]
    for before, after in zip(widths, [*widths[1:], nc], strict=True):
        layers += [nn.BatchNorm2d(before), nn.ReLU(True), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
    return nn.ModuleDict({"main": nn.Sequential(*layers, nn.Tanh())})


def example_discriminator(ndf: int = 64, nc: int = 3) -> nn.Module:
    """Its discriminator; the sigmoid at its end has no parameters."""
    layers: list[nn.Module] = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for before in (ndf, ndf * 2, ndf * 4):
        after = before * 2
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2, True)]
    return nn.ModuleDict({"main": nn.Sequential(*layers, nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid())})


def randomise(net: nn.Module) -> None:
    """Values of every parameter and buffer that no initialisation gives, so that a lost one shows."""
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.1 if value.dim() == 1 else 0.1 * torch.randn_like(value))
            else:
                value.fill_(7)


@pytest.mark.parametrize("training", [True, False])
def test_example_generator(training: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = example_generator(12, 4, 3), Generator(64, 3, nz=12, ngf=4)
    randomise(theirs)
    load_example_state_dict(ours, theirs.state_dict())
    exported = example_state_dict(ours)
    assert list(exported) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(exported[key], value), key
    theirs.double().train(training), ours.double().train(training)
    z = torch.randn(3, 12, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(ours(z), theirs["main"](z), rtol=1e-9, atol=1e-9)
    for key, value in theirs.state_dict().items():  # running statistics too
        torch.testing.assert_close(example_state_dict(ours)[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_example_discriminator(training: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = example_discriminator(4), Discriminator(64, 3, ndf=4)
    randomise(theirs)
    for prefix in ("_orig_mod.", "module._orig_mod.", "module."):
        load_example_state_dict(ours, {f"{prefix}{key}": value for key, value in theirs.state_dict().items()})
    assert list(example_state_dict(ours)) == list(theirs.state_dict())
    theirs.double().train(training), ours.double().train(training)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x).sigmoid(), theirs["main"](x).flatten(), rtol=1e-9, atol=1e-9)


def test_example_loads_ours() -> None:
    theirs, ours = example_generator(10, 2, 1), Generator(64, 1, nz=10, ngf=2, projection="linear")
    randomise(ours)
    theirs.load_state_dict(example_state_dict(ours))
    again = Generator(64, 1, nz=10, ngf=2, projection="linear")
    load_example_state_dict(again, theirs.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_example_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_example_state_dict(Generator(64, 3, nz=10, ngf=2), example_generator(10, 4).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_example_state_dict(Generator(32, 3, nz=10, ngf=4), example_generator(10, 4).state_dict())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("main.0.weight", torch.ones(10, 16, 4, 4, dtype=torch.int8), "is torch.int8: expected torch.float32"),
        ("main.0.weight", torch.full((10, 16, 4, 4), torch.nan), "not finite"),
        ("main.1.running_var", -torch.ones(16), "values below 0"),
        ("main.0.weight", 3, "'main.0.weight' is of type int: expected tensors by their names"),
        (3, torch.ones(1), "3 is of type Tensor: expected tensors by their names"),
    ],
)
def test_example_of_other_values_is_refused(name: str, value: object, message: str) -> None:
    net = Generator(64, 3, nz=10, ngf=2)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        load_example_state_dict(net, {**example_state_dict(net), name: value})
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    halves = {key: x.half() if x.is_floating_point() else x for key, x in example_state_dict(net).items()}
    load_example_state_dict(net, halves)


def test_linear_weights_of_other_shapes_are_refused() -> None:
    for rows in ({}, {"blocks.project.bn.weight": torch.ones(5)}):
        with pytest.raises(ValueError, match="expected squares of them"):
            convert_projection({"blocks.project.conv.linear.weight": torch.ones(32, 8), **rows}, "conv")


@pytest.mark.parametrize("size", [28, 32])
def test_projections_are_the_same_function(size: int) -> None:
    torch.manual_seed(0)
    conv, linear = Generator(size, 1, nz=6, ngf=3), Generator(size, 1, nz=6, ngf=3, projection="linear")
    randomise(conv)
    linear.load_state_dict(convert_projection(conv.state_dict(), "linear"))
    back = convert_projection(linear.state_dict(), "conv")
    assert set(back) == set(conv.state_dict())
    for key, value in conv.state_dict().items():
        assert torch.equal(back[key], value), key

    conv.double(), linear.double()
    z = torch.randn(4, 6, dtype=torch.float64)
    a, b = conv(z), linear(z)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    grads = convert_projection({k: p.grad for k, p in linear.named_parameters()}, "conv")
    for key, parameter in conv.named_parameters():
        torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-9, atol=1e-10)


def test_linear_projection_is_a_linear_layer() -> None:
    torch.manual_seed(0)
    generator = Generator(32, 1, nz=6, ngf=2, projection="linear").double()
    block = generator.blocks.project
    z = torch.randn(5, 6, dtype=torch.float64)
    by_hand = nn.functional.linear(z, block.conv.linear.weight).view(5, 8, 4, 4)
    torch.testing.assert_close(block.conv(z[:, :, None, None]), by_hand, rtol=1e-12, atol=1e-12)


def test_projections_are_checked() -> None:
    with pytest.raises(ValueError, match="projection is 'x'"):
        convert_projection({}, "x")
