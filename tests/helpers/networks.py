"""Sequentials with one peculiarity each, for the tests of `fuse()`; whole networks are in `tests/models`.

`VARIANTS` maps a name to (a function that builds the model, the shape of its input).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

Factory = Callable[[], nn.Module]


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


def _with_norm(kind: type[nn.Module] = nn.BatchNorm2d, **kwargs: object) -> Factory:
    return lambda: nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, **kwargs), nn.ReLU(), nn.Conv2d(4, 2, 3))  # type: ignore[call-arg]


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


def _one_prelu() -> nn.Sequential:
    act = nn.PReLU()
    return nn.Sequential(*_block(3, 4, act), *_block(4, 4, act), nn.ConvTranspose2d(4, 3, 4, 2, 1), act)


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
        lambda: nn.Sequential(
            *_block(3, 4, nn.Hardsigmoid()),
            *_block(4, 3, nn.GELU(approximate="tanh")),
            *_block(3, 4, nn.Softplus(2.0)),
            nn.Conv2d(4, 3, 1),
            nn.Hardtanh(-2.0, 2.0),
        ),
        IMAGE,
    ),
    "prelu": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(4), *_block(4, 3, nn.PReLU()), nn.Conv2d(3, 2, 1), nn.PReLU(2)
        ),
        IMAGE,
    ),
    "one prelu for all": (_one_prelu, IMAGE),
    "prelu of other channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.PReLU(2), nn.Conv2d(2, 4, 1), nn.PReLU()),
        IMAGE,
    ),
    "silu, gelu, elu": (
        lambda: nn.Sequential(*_block(3, 4, nn.SiLU()), *_block(4, 3, nn.GELU()), nn.Conv2d(3, 2, 1), nn.ELU(0.5)),
        IMAGE,
    ),
    "relu6 to logsigmoid": (
        lambda: nn.Sequential(
            *_block(3, 4, nn.ReLU6(True)),
            *_block(4, 3, nn.Hardswish(True)),
            *_block(3, 4, nn.Mish()),
            nn.Conv2d(4, 4, 1),
            nn.Hardtanh(),
            *_block(4, 3, nn.Softplus()),
            nn.Conv2d(3, 2, 1),
            nn.LogSigmoid(),
        ),
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
    "upsampling": (
        lambda: nn.Sequential(*_block(3, 4), nn.Upsample(scale_factor=2), *_block(4, 5), nn.Conv2d(5, 3, 3)),
        IMAGE,
    ),
    "momentum none": (_with_norm(momentum=None), IMAGE),
    "momentum 1": (_with_norm(momentum=1.0, eps=1e-2), IMAGE),
    "affine false": (_with_norm(affine=False), IMAGE),
    "no running statistics": (_with_norm(track_running_stats=False), IMAGE),
    "frozen norm": (_frozen_norm, IMAGE),
    "instance norm": (_with_norm(nn.InstanceNorm2d), IMAGE),
    "instance norm of its own": (_with_norm(nn.InstanceNorm2d, affine=True, track_running_stats=True), IMAGE),
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
