"""Networks as people write them in plain PyTorch, for the tests of `fuse()`.

`MODELS` are the well-known generators and discriminators, small; `VARIANTS` are Sequentials with one peculiarity each.
Both map a name to (a function that builds the model, the shape of its input).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

Factory = Callable[[], nn.Module]


# --- the well-known networks -----------------------------------------------------------------------------------------


class Generator(nn.Module):
    """The generator of PyTorch's DCGAN example for 64x64 pixels; `pixels=32` has one block less."""

    def __init__(self, nz: int = 100, ngf: int = 4, nc: int = 3, pixels: int = 64) -> None:
        super().__init__()
        width = ngf * pixels // 8
        modules = [nn.ConvTranspose2d(nz, width, 4, 1, 0, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
        while width > ngf:
            modules += [nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width // 2)]
            modules += [nn.ReLU(True)]
            width //= 2
        self.main = nn.Sequential(*modules, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, input: Tensor) -> Tensor:
        return self.main(input)


class Discriminator(nn.Module):
    """The discriminator of the same example; `sigmoid=False` gives logits."""

    def __init__(self, ndf: int = 4, nc: int = 3, pixels: int = 64, sigmoid: bool = True) -> None:
        super().__init__()
        modules = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        width = ndf
        while width < ndf * pixels // 8:
            modules += [nn.Conv2d(width, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2)]
            modules += [nn.LeakyReLU(0.2, inplace=True)]
            width *= 2
        modules.append(nn.Conv2d(width, 1, 4, 1, 0, bias=False))
        self.main = nn.Sequential(*modules, *([nn.Sigmoid()] if sigmoid else []))

    def forward(self, input: Tensor) -> Tensor:
        return self.main(input).view(-1, 1).squeeze(1)


def dcgan_weights(module: nn.Module) -> None:
    """N(0, 0.02) weights (Radford et al., 2015, section 4); `model.apply(dcgan_weights)`."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class SkipBlock(nn.Module):
    """One level of pix2pix's U-Net (Isola et al., 2017): down, the level below, up, and the input beside the result.

    Its first module is an in-place LeakyReLU, so what is concatenated is the input after that LeakyReLU.
    """

    def __init__(
        self,
        outer: int,
        inner: int,
        below: SkipBlock | None,
        norm: type[nn.Module],
        where: str = "",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.outermost = where == "outermost"
        bias = norm is nn.InstanceNorm2d
        down = nn.Conv2d(3 if self.outermost else outer, inner, 4, 2, 1, bias=bias)
        wide = inner if where == "innermost" else inner * 2
        up = nn.ConvTranspose2d(wide, outer, 4, 2, 1, bias=bias or self.outermost)
        if self.outermost:
            parts: list[nn.Module | None] = [down, below, nn.ReLU(True), up, nn.Tanh()]
        elif where == "innermost":
            parts = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, norm(outer)]
        else:
            parts = [nn.LeakyReLU(0.2, True), down, norm(inner), below, nn.ReLU(True), up, norm(outer)]
            parts += [nn.Dropout(dropout)] if dropout else []
        self.model = nn.Sequential(*(part for part in parts if part is not None))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class UNet(nn.Module):
    """pix2pix's generator with `depth` levels."""

    def __init__(
        self, norm: type[nn.Module] = nn.BatchNorm2d, ngf: int = 4, depth: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        block = SkipBlock(ngf * 2, ngf * 2, None, norm, "innermost")
        for _ in range(depth - 3):
            block = SkipBlock(ngf * 2, ngf * 2, block, norm, dropout=dropout)
        block = SkipBlock(ngf, ngf * 2, block, norm)
        self.model = SkipBlock(3, ngf, block, norm, "outermost")

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


def patch_gan(norm: type[nn.Module] = nn.BatchNorm2d, ndf: int = 4) -> nn.Sequential:
    """pix2pix's 70x70 discriminator: one logit per patch."""
    bias = norm is nn.InstanceNorm2d
    modules: list[nn.Module] = [nn.Conv2d(6, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for i, stride in enumerate((2, 2, 1)):
        modules += [nn.Conv2d(ndf << i, ndf << (i + 1), 4, stride, 1, bias=bias), norm(ndf << (i + 1))]
        modules += [nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*modules, nn.Conv2d(ndf * 8, 1, 4, 1, 1))


class ResidualBlock(nn.Module):
    """CycleGAN's (Zhu et al., 2017): reflection padding as a module or as the convolution's own, and a sum."""

    def __init__(self, width: int, norm: type[nn.Module], pad_in_conv: bool) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for i in range(2):
            if pad_in_conv:
                modules.append(nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"))
            else:
                modules += [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3)]
            modules.append(norm(width))
            if i == 0:
                modules.append(nn.ReLU(True))
        self.conv_block = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def resnet_generator(norm: type[nn.Module] = nn.BatchNorm2d, pad_in_conv: bool = False, ngf: int = 4) -> nn.Sequential:
    """CycleGAN's generator: 7x7, two strided convolutions down, residual blocks, two transposed ones up, 7x7."""
    modules: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), norm(ngf), nn.ReLU(True)]
    for i in range(2):
        modules += [nn.Conv2d(ngf << i, ngf << (i + 1), 3, 2, 1), norm(ngf << (i + 1)), nn.ReLU(True)]
    modules += [ResidualBlock(ngf * 4, norm, pad_in_conv) for _ in range(2)]
    for i in (1, 0):
        up = nn.ConvTranspose2d(ngf << (i + 1), ngf << i, 3, 2, 1, output_padding=1)
        modules += [up, norm(ngf << i), nn.ReLU(True)]
    return nn.Sequential(*modules, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())


def sn_discriminator(norm: Callable[[nn.Module], nn.Module], ndf: int = 4) -> nn.Sequential:
    """SN-GAN's discriminator (Miyato et al., 2018): spectral norm on every convolution and on the last layer."""
    modules: list[nn.Module] = []
    for ci, co, k, s in ((3, ndf, 3, 1), (ndf, ndf * 2, 4, 2), (ndf * 2, ndf * 2, 3, 1), (ndf * 2, ndf * 4, 4, 2)):
        modules += [norm(nn.Conv2d(ci, co, k, s, 1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*modules, nn.Flatten(), norm(nn.Linear(ndf * 4 * 4 * 4, 1)))


MODELS: dict[str, tuple[Factory, tuple[int, ...]]] = {
    "dcgan generator": (partial(Generator, pixels=32), (4, 100, 1, 1)),
    "dcgan discriminator": (partial(Discriminator, pixels=32), (4, 3, 32, 32)),
    "pix2pix unet": (UNet, (2, 3, 32, 32)),
    "pix2pix unet, instance norm": (partial(UNet, nn.InstanceNorm2d), (2, 3, 32, 32)),
    "patchgan": (patch_gan, (2, 6, 32, 32)),
    "patchgan, instance norm": (partial(patch_gan, nn.InstanceNorm2d), (2, 6, 32, 32)),
    "cyclegan generator": (resnet_generator, (2, 3, 16, 16)),
    "cyclegan generator, padding in conv": (partial(resnet_generator, pad_in_conv=True), (2, 3, 16, 16)),
    "cyclegan generator, instance norm": (partial(resnet_generator, nn.InstanceNorm2d), (2, 3, 16, 16)),
    "sngan discriminator": (partial(sn_discriminator, parametrizations.spectral_norm), (2, 3, 16, 16)),
    "sngan discriminator, old style": (partial(sn_discriminator, old_spectral_norm), (2, 3, 16, 16)),
}


# --- one peculiarity each --------------------------------------------------------------------------------------------


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return w / 2


class Pairs(nn.Module):
    """Takes a pair of tensors: what a Sequential passes on need not be one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * 2


class Sum(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


class Named(nn.Sequential):
    """A subclass of nn.Sequential with arguments of its own."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__(OrderedDict(conv=nn.Conv2d(3, width, 3, padding=1), norm=nn.BatchNorm2d(width), act=act))

    @property
    def width(self) -> int:
        return self.norm.num_features


class Scaled(nn.Sequential):
    """A subclass with a forward of its own: not ours to change."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class Indexing(nn.Module):
    """Indexes, slices and iterates its Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _two_blocks()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[:3](x)
        x = self.body[4](self.body[3](x))
        for module in self.body[5:]:
            x = module(x)
        return x


def _two_blocks() -> nn.Sequential:
    return nn.Sequential(*_block(3, 4), *_block(4, 5, nn.LeakyReLU(0.2)))


def _block(ci: int, co: int, act: nn.Module | None = None, **conv: object) -> list[nn.Module]:
    return [nn.Conv2d(ci, co, 3, **{"padding": 1, **conv}), nn.BatchNorm2d(co), act or nn.ReLU()]  # type: ignore[arg-type]


def _with_conv(kind: type[nn.Module] = nn.Conv2d, *args: object, **kwargs: object) -> Factory:
    """conv(3 or 4 -> 6), BN, LeakyReLU with the convolution's arguments given."""
    return lambda: nn.Sequential(kind(*args, **kwargs), nn.BatchNorm2d(6), nn.LeakyReLU(0.2))  # type: ignore[call-arg]


def _with_norm(**kwargs: object) -> Factory:
    return lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **kwargs), nn.ReLU(), nn.Conv2d(4, 2, 3))  # type: ignore[arg-type]


def _wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Factory:
    """A conv and a transposed conv, each wrapped (weight norm, ...), with BatchNorm."""

    def build() -> nn.Module:
        up = wrap(nn.ConvTranspose2d(4, 3, 4, 2, 1))
        return nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), up, nn.BatchNorm2d(3), nn.Tanh())

    return build


def _parametrized() -> nn.Module:
    model = _two_blocks()
    parametrize.register_parametrization(model[0], "weight", Halved())
    parametrize.register_parametrization(model[1], "bias", Halved())
    return model


def _shared_block() -> nn.Module:
    block = nn.Sequential(*_block(3, 3))
    return nn.Sequential(block, nn.Conv2d(3, 3, 3), nn.ReLU(), block)


def _shared_conv() -> nn.Module:
    conv, act = nn.Conv2d(3, 3, 3, padding=1), nn.LeakyReLU(0.2, True)
    return nn.Sequential(conv, nn.BatchNorm2d(3), act, conv, nn.BatchNorm2d(3), act, conv)


def _tied_weight() -> nn.Module:
    model = nn.Sequential(*_block(3, 3), *_block(3, 3))
    model[3].weight = model[0].weight
    return model


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """For fine-tuning: `train()` leaves it in eval mode."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)


def _frozen_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU(), *_block(4, 3)).train()


IMAGE = (4, 3, 9, 8)
VARIANTS: dict[str, tuple[Factory, tuple[int, ...]]] = {
    "two blocks": (_two_blocks, IMAGE),
    "no norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 3, 3), nn.Sigmoid()), IMAGE),
    "convolutions only": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)), IMAGE),
    "norm only": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), IMAGE),
    "norm before conv": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE),
    "norm of another width": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2d(2), nn.ReLU()),
        IMAGE,
    ),
    "activation before norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.BatchNorm2d(4)), IMAGE),
    "two norms": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ELU()), IMAGE),
    "identities": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), *_block(4, 3), nn.Identity()), IMAGE),
    "activations beyond the table": (
        lambda: nn.Sequential(*_block(3, 4, nn.PReLU()), *_block(4, 3, nn.GELU(approximate="tanh"))),
        IMAGE,
    ),
    "silu, gelu, elu": (
        lambda: nn.Sequential(*_block(3, 4, nn.SiLU()), *_block(4, 3, nn.GELU()), nn.Conv2d(3, 2, 1), nn.ELU(0.5)),
        IMAGE,
    ),
    "dropout": (lambda: nn.Sequential(*_block(3, 4), nn.Dropout2d(0.5), *_block(4, 3), nn.Dropout(0.2)), IMAGE),
    "flatten and linear": (lambda: nn.Sequential(*_block(3, 2), nn.Flatten(), nn.Linear(144, 5)), IMAGE),
    "tuples": (lambda: nn.Sequential(*_block(3, 4), Pairs(), Sum(), *_block(4, 3)), IMAGE),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), nn.ReLU()),
        IMAGE,
    ),
    "module list": (lambda: nn.Sequential(*nn.ModuleList(_block(3, 4))), IMAGE),
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (4, 3, 9)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()), (2, 3, 5, 6, 4)),
    "unbatched": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()), (3, 9, 8)),
    "groups": (_with_conv(nn.Conv2d, 3, 6, 3, groups=3, bias=False), IMAGE),
    "transposed groups": (_with_conv(nn.ConvTranspose2d, 4, 6, 3, 2, 1, 1, 2), (4, 4, 5, 6)),
    "dilation": (_with_conv(nn.Conv2d, 3, 6, 3, 1, 2, 2), IMAGE),
    "transposed dilation": (_with_conv(nn.ConvTranspose2d, 4, 6, (3, 2), 2, 1, (1, 0), dilation=2), (4, 4, 5, 6)),
    "same, odd kernel": (_with_conv(nn.Conv2d, 3, 6, 3, padding="same", dilation=2), IMAGE),
    "same, even kernel": (_with_conv(nn.Conv2d, 3, 6, (4, 3), padding="same"), IMAGE),
    "valid": (_with_conv(nn.Conv2d, 3, 6, 3, 2, padding="valid"), IMAGE),
    "reflect": (_with_conv(nn.Conv2d, 3, 6, 3, padding=(2, 1), padding_mode="reflect"), IMAGE),
    "replicate": (_with_conv(nn.Conv2d, 3, 6, 4, 2, 1, padding_mode="replicate"), IMAGE),
    "circular": (_with_conv(nn.Conv2d, 3, 6, 3, padding=1, padding_mode="circular"), IMAGE),
    "same, reflect": (_with_conv(nn.Conv2d, 3, 6, 2, padding="same", padding_mode="reflect"), IMAGE),
    "padding inside a chain": (lambda: nn.Sequential(*_block(3, 4), *_block(4, 3, padding_mode="circular")), IMAGE),
    "momentum none": (_with_norm(momentum=None), IMAGE),
    "momentum 1": (_with_norm(momentum=1.0, eps=1e-2), IMAGE),
    "affine false": (_with_norm(affine=False), IMAGE),
    "no running statistics": (_with_norm(track_running_stats=False), IMAGE),
    "frozen norm": (_frozen_norm, IMAGE),
    "weight norm": (_wrapped(parametrizations.weight_norm), IMAGE),
    "weight norm, old style": (_wrapped(old_weight_norm), IMAGE),
    "spectral norm": (_wrapped(parametrizations.spectral_norm), IMAGE),
    "spectral norm, old style": (_wrapped(old_spectral_norm), IMAGE),
    "parametrizations": (_parametrized, IMAGE),
    "shared block": (_shared_block, IMAGE),
    "same block in a row": (lambda: nn.Sequential(*[nn.Sequential(*_block(3, 3))] * 3), IMAGE),
    "shared conv": (_shared_conv, IMAGE),
    "tied weight": (_tied_weight, IMAGE),
    "subclass": (lambda: nn.Sequential(Named(4, nn.ReLU()), nn.Conv2d(4, 3, 3)), IMAGE),
    "subclass alone": (lambda: Named(4, nn.LeakyReLU(0.1, True)), IMAGE),
    "subclass with a forward": (lambda: nn.Sequential(Scaled(*_block(3, 4)), *_block(4, 3)), IMAGE),
    "indexing": (Indexing, IMAGE),
}
