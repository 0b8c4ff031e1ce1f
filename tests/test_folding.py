"""`fold_batchnorm`: a copy for inference with the norms inside the convolutions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import fastdcgan
from tests.helpers.networks import IMAGE, VARIANTS
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.twins import build, draw, one_thread
from tests.helpers.writes import WRITES, Write
from tests.models import SMALL
from tests.models.dcgan import Generator

PAIRS = {**SMALL, **VARIANTS}
# Those in which some norm stays, and why it has to.
NORMS_LEFT = {
    "norm before conv": 1,  # comes before any convolution
    "norm of another width": 1,  # pixels are shuffled in between
    "activation before norm": 1,
    "two norms": 1,  # only the first is next to the convolution
    "1d": 1,
    "3d": 1,
    "no running statistics": 1,  # normalises with the batch's own, in eval too
    "shared conv": 2,  # one convolution under two norms
    "subclass with a forward": 1,  # what it does with its modules is its own
    "indexing": 0,
    "dropout discriminator": 3,  # dropout is in between
    "upsampling generator": 1,  # comes before any convolution
    "residual generator": 4,  # comes before any convolution of its Sequential
    "biggan generator": 7,  # depends on the class, or comes before any convolution
    "unet, called one by one": 10,  # called by code of its own, as those of the next two
    "unet, every step named": 5,
    "resnet-18, called one by one": 16,
    "resnet-18, pre-activated": 17,
    "densenet": 15,  # come before a convolution
}


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@one_thread()
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "vanilla"])
@pytest.mark.parametrize("name", PAIRS)
def test_folded_is_eval(name: str, fused: bool, device: torch.device) -> None:
    factory, shape = PAIRS[name]
    found: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        model = build(factory, dtype, device)
        x = draw(shape, dtype, device)
        model(x.clone())  # in training mode: weight norm and spectral norm leave a computed weight behind
        if fused:
            fastdcgan.fuse(model)
        before = {key: value.detach().clone() for key, value in model.state_dict().items()}
        keys, kinds = list(before), [type(m) for m in model.modules()]

        folded = fastdcgan.fold_batchnorm(model)

        assert model.training
        assert not folded.training
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == kinds
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        mine = {p.data_ptr() for p in [*folded.parameters(), *folded.buffers()] if p.numel()}
        assert not mine & {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
        assert norms(folded) == NORMS_LEFT.get(name, 0)
        with torch.no_grad():
            found[dtype] = folded(x.clone()), model.eval()(x.clone())
            again = fastdcgan.fold_batchnorm(folded)(x.clone())
        assert name == "two norms" or torch.equal(again, found[dtype][0])
    exact, truth = found[torch.float64]
    torch.testing.assert_close(exact, truth, rtol=1e-10, atol=1e-11)
    assert_as_accurate(*found[torch.float32], truth, name, reduction=1000)


def test_what_becomes_of_the_model(device: torch.device) -> None:
    model = fastdcgan.fuse(build(Generator, torch.float32, device))
    folded = fastdcgan.fold_batchnorm(model)
    assert isinstance(folded.main, fastdcgan.FusedSequential)
    assert [type(m) for m in folded.main][:3] == [nn.ConvTranspose2d, nn.Identity, nn.ReLU]
    assert list(folded.state_dict())[:3] == ["main.0.weight", "main.0.bias", "main.3.weight"]
    rows = fastdcgan.explain(folded)
    assert len(rows) == 5
    assert all(row.fused for row in rows)
    assert rows[0].pattern == "ConvTranspose2d + ReLU"


@pytest.mark.parametrize("name", ["weight norm", "weight norm, old style", "spectral norm", "spectral norm, old style"])
def test_norms_of_weights_are_baked(name: str, device: torch.device) -> None:
    folded = fastdcgan.fold_batchnorm(build(VARIANTS[name][0], torch.float64, device))
    for module in folded.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            assert not parametrize.is_parametrized(module)
            assert not module._forward_pre_hooks
            assert sorted(module._parameters) == ["bias", "weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_folded_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    model = build(VARIANTS["two blocks"][0], dtype, device).eval()
    folded = fastdcgan.fold_batchnorm(model)
    assert all(p.dtype == dtype for p in folded.parameters())
    conv, norm = model[0], model[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = conv.weight.double() * scale[:, None, None, None]
    # One rounding to the dtype, of a value computed in float32.
    half_ulp = torch.finfo(dtype).eps / 2 * 1.001
    assert bool(((folded[0].weight.double() - exact).abs() <= half_ulp * exact.abs() + torch.finfo(dtype).tiny).all())


def test_weights_that_a_class_computes_are_baked(device: torch.device) -> None:
    class Standardised(nn.Conv2d):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            del self._parameters["weight"]
            self.raw = nn.Conv2d(*args)

        @property
        def weight(self) -> Tensor:  # type: ignore[override]
            return self.raw.weight - self.raw.weight.mean((1, 2, 3), keepdim=True)

    torch.manual_seed(0)
    model = nn.Sequential(Standardised(3, 5, 3, 1, 0, 1, 1, False), nn.BatchNorm2d(5), nn.ReLU()).to(device)
    x = torch.randn(4, 3, 8, 8, device=device)
    model(x)
    folded = fastdcgan.fold_batchnorm(model)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in folded.named_parameters()] == ["0.bias", "0.weight"]
    assert "0.raw.weight" in dict(model.named_parameters())


def test_channels_last_and_requires_grad_stay(device: torch.device) -> None:
    model = build(Generator, torch.float32, device).to(memory_format=torch.channels_last).requires_grad_(False)
    folded = fastdcgan.fold_batchnorm(model)
    assert folded.main[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in fastdcgan.fold_batchnorm(model.requires_grad_(True)).parameters())


def test_modules_with_hooks_are_left(device: torch.device) -> None:
    model = build(VARIANTS["two blocks"][0], torch.float64, device).eval()
    seen: list[int] = []
    model[1].register_forward_hook(lambda *args: seen.append(1))
    folded = fastdcgan.fold_batchnorm(model)
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert isinstance(folded[4], nn.Identity)
    x = draw(IMAGE, torch.float64, device)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-12)
    assert len(seen) == 2


def test_a_convolution_that_is_used_elsewhere_is_left(device: torch.device) -> None:
    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
            self.again = self.body[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.body(x))

    model = build(Reuses, torch.float64, device).eval()
    folded = fastdcgan.fold_batchnorm(model)
    assert norms(folded) == 1
    x = draw(IMAGE, torch.float64, device)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_copy_of_a_folded_model_is_whole(device: torch.device) -> None:
    model = build(Generator, torch.float64, device).eval()
    folded = fastdcgan.fold_batchnorm(model)
    other = fastdcgan.fold_batchnorm(build(Generator, torch.float64, device, seed=9))
    other.load_state_dict(folded.state_dict())
    x = draw((2, 100, 1, 1), torch.float64, device)
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    assert torch.equal(other(x), folded(x))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_folded_copy_has_nothing_of_the_model(write: Write, device: torch.device) -> None:
    """What is written into the one is not seen in the other."""
    model, x = build(Generator, torch.float32, device).eval(), draw((2, 100, 1, 1), torch.float32, device)
    folded = fastdcgan.fold_batchnorm(model)
    with torch.no_grad():
        before = model(x), folded(x)
        write(model)
        assert not torch.equal(model(x), before[0]) and torch.equal(folded(x), before[1])
        now = model(x)
        write(folded)
        assert torch.equal(model(x), now) and not torch.equal(folded(x), before[1])


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("running_var", torch.Tensor.long, r"running_var of BatchNorm2d in the block '0' must be .* got torch\.int64"),
        ("weight", torch.Tensor.cfloat, r"weight of BatchNorm2d in the block '0' must be .* got torch\.complex64"),
    ],
)
def test_numbers_that_can_not_be_folded(name: str, kind, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    changed = kind(getattr(model[1], name).detach())
    setattr(model[1], name, nn.Parameter(changed) if name == "weight" else changed)
    with pytest.raises(TypeError, match=message):
        fastdcgan.fold_batchnorm(model)
