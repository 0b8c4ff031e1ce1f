"""The networks: shapes, initialisation, statistics per half."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan.dcgan import (
    IMAGE_SIZES,
    Discriminator,
    Generator,
    TrainConfig,
)
from fastdcgan.dcgan.config import PRESETS
from fastdcgan.dcgan.trained import new_discriminator, new_generator


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_shapes(size: int, channels: int) -> None:
    generator = Generator(size, channels, nz=6, ngf=2)
    discriminator = Discriminator(size, channels, ndf=2)
    fake = generator(torch.randn(2, 6))
    assert fake.shape == (2, channels, size, size)
    assert fake.abs().max() <= 1
    assert discriminator(fake).shape == (2,)


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (28, [7, 2, 1]),
        (32, [4, 4, 2, 1]),
        (64, [4, 8, 4, 2, 1]),
        (128, [4, 16, 8, 4, 2, 1]),
        (256, [4, 16, 16, 8, 4, 2, 1]),
    ],
)
def test_ladder(size: int, widths: list[int]) -> None:
    base, *multiples = widths
    convs = [block.conv for _, block in Generator(size, ngf=3).stages()]
    assert convs[0].kernel_size == (base, base)
    assert [conv.out_channels for conv in convs] == [3 * m for m in multiples] + [3]
    convs = [block.conv for _, block in Discriminator(size, ndf=3).stages()]
    assert convs[-1].kernel_size == (base, base)
    assert [conv.out_channels for conv in convs] == [3 * m for m in reversed(multiples)] + [1]


def test_the_maps_of_the_papers_first_figure() -> None:
    """Radford et al. (2015): 100 numbers, and the maps that they are projected and convolved to, with the kernels 5x5
    of the figure's strided convolutions."""
    config = TrainConfig(**PRESETS["paper"], channels=3)
    maps: list[tuple[int, ...]] = []
    with torch.device("meta"):
        nets = new_generator(config), new_discriminator(config)
        for net in nets:
            for _, block in net.stages():
                block.register_forward_hook(lambda block, inputs, output: maps.append(tuple(output.shape[1:])))
        image = nets[0](torch.empty(2, 100))
        sizes = [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (3, 64, 64)]
        assert maps == sizes
        nets[1](image)
        assert maps[len(sizes) :] == [*reversed(sizes[:-1]), (1, 1, 1)]
    kernels = [[block.conv.kernel_size[0] for _, block in net.stages()] for net in nets]
    assert kernels == [[4, 5, 5, 5, 5], [5, 5, 5, 5, 4]]
    assert (config.batch_size, config.lr_g, config.lr_d, config.beta1, config.real_label) == (128, 2e-4, 2e-4, 0.5, 1)


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_the_other_kernel(size: int) -> None:
    """The same maps, and in a fused block the same numbers as by PyTorch's modules: a step forward and backward."""
    torch.manual_seed(0)
    nets = [Generator(size, 1, 6, 2, kernel=5).double(), Discriminator(size, 1, 2, kernel=5).double()]
    plain = [fastdcgan.unfuse(copy.deepcopy(net)) for net in nets]
    z = torch.randn(3, 6, dtype=torch.float64)
    fused_logits, logits = nets[1](nets[0](z)), plain[1](plain[0](z))
    torch.testing.assert_close(fused_logits, logits, rtol=1e-9, atol=1e-9)
    assert nets[0](z).shape == (3, 1, size, size)
    fused_logits.sum().backward(), logits.sum().backward()
    for net, other in zip(nets, plain, strict=True):
        for (key, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("projection", ["conv", "linear"])
def test_networks_of_classes(projection: str) -> None:
    """Labels change what both networks give, image by image; one chosen label stands for all."""
    torch.manual_seed(0)
    nets = Generator(28, 1, 6, 2, projection, classes=4).eval(), Discriminator(28, 1, 2, classes=4).eval()
    images = torch.rand(3, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    for net, x in zip(nets, (torch.randn(3, 6), images), strict=True):
        first, second = (net(x, torch.tensor(labels)) for labels in ([0, 1, 3], [0, 2, 3]))
        assert (first[1] - second[1]).abs().max() > 1e-6
        torch.testing.assert_close(first[[0, 2]], second[[0, 2]], rtol=1e-5, atol=1e-6)
        net.label = 2
        torch.testing.assert_close(net(x), net(x, torch.tensor([2, 2, 2])), rtol=0, atol=0)
        shared = copy.deepcopy(net)
        assert shared.label == 2
        torch.testing.assert_close(fastdcgan.fold_batchnorm(shared)(x), net(x), rtol=1e-4, atol=1e-5)
    assert nets[1].with_class(images, torch.tensor([0, 1, 2])).is_contiguous(memory_format=torch.channels_last)
    assert nets[0](torch.randn(3, 6)).shape == images.shape


@pytest.mark.parametrize("projection", ["conv", "linear"])
def test_noise_of_either_shape(projection: str) -> None:
    generator = Generator(28, 1, nz=5, ngf=2, projection=projection).eval()
    z = torch.randn(3, 5)
    assert torch.equal(generator(z), generator(z[:, :, None, None]))


@pytest.mark.parametrize("shape", [(5,), (2, 4), (2, 5, 2, 1), (2, 5, 1)])
def test_noise_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z has shape .*: expected \[N, 5\]"):
        Generator(28, 1, nz=5, ngf=2)(torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 32, 32)])
def test_images_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape .*: expected \[N, 1, 28, 28\]"):
        Discriminator(28, 1, ndf=2)(torch.randn(shape))


def test_unknown_settings() -> None:
    with pytest.raises(ValueError, match="image_size is 48: expected one of 28, 32, 64, 128, 256"):
        Generator(48)
    with pytest.raises(ValueError, match="projection is 'dense': expected one of conv, linear"):
        Generator(projection="dense")
    for net in (Generator, Discriminator):
        with pytest.raises(ValueError, match="kernel is 3: expected one of 4, 5"):
            net(kernel=3)


@pytest.mark.parametrize("projection", ["conv", "linear"])
def test_initialisation(projection: str) -> None:
    torch.manual_seed(0)
    nets = [Generator(32, 3, ngf=32, projection=projection), Discriminator(32, 3, ndf=32)]
    weights = [(name, p) for net in nets for name, p in net.named_parameters()]
    convolutions = torch.cat([p.flatten() for name, p in weights if ".conv." in name])
    gammas = torch.cat([p for name, p in weights if name.endswith("bn.weight")])
    betas = torch.cat([p for name, p in weights if name.endswith("bn.bias")])
    assert len(convolutions) + len(gammas) + len(betas) == sum(p.numel() for _, p in weights)
    # Five standard errors of the mean and of the standard deviation.
    for values, mean in ((convolutions, 0.0), (gammas, 1.0)):
        error = 0.02 / len(values) ** 0.5
        assert abs(values.mean() - mean) < 5 * error
        assert abs(values.std() - 0.02) < 5 * error / 2**0.5
    assert (betas == 0).all()


@pytest.mark.parametrize("net", [Generator(32, 1, nz=6, ngf=2), Discriminator(32, 1, ndf=2)], ids=["G", "D"])
def test_unfused(net: nn.Module) -> None:
    net = copy.deepcopy(net).double().eval()
    x = torch.randn(3, 6, dtype=torch.float64) if isinstance(net, Generator) else torch.randn(3, 1, 32, 32).double()
    fused, keys = net(x), list(net.state_dict())
    fastdcgan.unfuse(net)
    assert not any(isinstance(m, fastdcgan.FusedSequential) for m in net.modules())
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net(x), fused, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_statistics_per_half(fused: bool) -> None:
    """One batch of two halves is two passes: logits, gradients, running statistics."""
    torch.manual_seed(0)
    halves = Discriminator(32, 1, ndf=3).double()
    passes = copy.deepcopy(halves)
    if not fused:
        fastdcgan.unfuse(halves)
    real, fake = torch.randn(2, 6, 1, 32, 32, dtype=torch.float64)
    fake = fake * 3 + 1
    a = halves(torch.cat([real, fake]), stat_groups=2)
    b = torch.cat([passes(real), passes(fake)])
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    def loss(logits: Tensor) -> Tensor:
        return (logits * torch.linspace(-1, 2, 12, dtype=torch.float64)).sum()

    loss(a).backward(), loss(b).backward()
    for (key, p), q in zip(halves.named_parameters(), passes.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=key)
    for (key, p), q in zip(halves.named_buffers(), passes.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=key)


def test_an_odd_batch_has_no_halves() -> None:
    with pytest.raises(ValueError, match="stat_groups"):
        fastdcgan.unfuse(Discriminator(28, 1, ndf=2))(torch.randn(3, 1, 28, 28), stat_groups=2)
