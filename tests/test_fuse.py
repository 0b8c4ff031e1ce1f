"""`fuse` and `unfuse`: what they change (the class of some Sequentials) and what they leave alone (all else)."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdcgan
from fastdcgan import FusedSequential
from fastdcgan.dispatch import router
from tests.helpers.networks import IMAGE, VARIANTS, Named, Scaled
from tests.helpers.twins import assert_as_good, assert_same, build, draw, one_thread, results, settled_input
from tests.models import SMALL
from tests.models.dcgan import Discriminator, Generator, dcgan_weights
from tests.models.image_to_image import UNet, resnet_generator

PAIRS = {**SMALL, **VARIANTS}


def waits(module: nn.Module) -> bool:
    """Whether it is of a class that `fuse` made of one that calls convolutions in a forward of its own."""
    return getattr(type(module), "_defers", False)


def fused_sequentials(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FusedSequential)]


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_but_classes_changes(name: str) -> None:
    model = PAIRS[name][0]()
    keys, parameters, buffers = list(model.state_dict()), dict(model.named_parameters()), dict(model.named_buffers())
    modules, training = dict(model.named_modules()), [m.training for m in model.modules()]
    text = repr(model)
    kinds = {key: type(module) for key, module in modules.items()}

    assert fastdcgan.fuse(model) is model
    assert list(model.state_dict()) == keys
    assert [m.training for m in model.modules()] == training
    for found, before in ((dict(model.named_parameters()), parameters), (dict(model.named_buffers()), buffers)):
        assert found.keys() == before.keys()
        assert all(found[key] is before[key] for key in before)
    for key, module in model.named_modules():
        assert module is modules[key]
        assert isinstance(module, kinds[key])
        assert type(module) is kinds[key] or isinstance(module, FusedSequential) or hasattr(module, "_plain_class")

    once = {key: type(module) for key, module in model.named_modules()}
    fastdcgan.fuse(model)
    assert {key: type(module) for key, module in model.named_modules()} == once

    assert fastdcgan.unfuse(model) is model
    assert {key: type(module) for key, module in model.named_modules()} == kinds
    assert repr(model) == text
    assert all("_fastdcgan_class" not in module.__dict__ for module in model.modules())


def test_what_is_fused() -> None:
    assert fused_sequentials(fastdcgan.fuse(Generator())) == ["main"]
    assert len(fused_sequentials(fastdcgan.fuse(UNet()))) == 4
    assert len(fused_sequentials(fastdcgan.fuse(resnet_generator()))) == 3
    for name in ("1d", "3d"):
        assert fused_sequentials(fastdcgan.fuse(VARIANTS[name][0]())) == []
    assert fused_sequentials(fastdcgan.fuse(VARIANTS["convolutions only"][0]())) == [""]
    outer = fastdcgan.fuse(VARIANTS["subclass with a forward"][0]())
    assert fused_sequentials(outer) == [""]
    assert isinstance(outer[0], Scaled) and waits(outer[0])
    assert not waits(fastdcgan.fuse(Generator()))  # it calls no convolution itself


@pytest.mark.parametrize("call", [fastdcgan.fuse, fastdcgan.unfuse, fastdcgan.explain, fastdcgan.fold_batchnorm])
@pytest.mark.parametrize("value", [None, 3, nn.Conv2d, torch.zeros(1)])
def test_only_modules_are_taken(call, value) -> None:
    with pytest.raises(TypeError, match=f"torch.nn.Module, got {type(value).__name__}"):
        call(value)


@pytest.mark.parametrize("call", [fastdcgan.fuse, fastdcgan.unfuse, fastdcgan.explain, fastdcgan.fold_batchnorm])
def test_a_module_that_contains_itself(call) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = nn.Sequential(inner, nn.ReLU())
    inner.append(model)
    with pytest.raises(ValueError, match=r"module '0\.2' is 'the model' itself: a module can't contain itself"):
        call(model)
    assert type(inner) is nn.Sequential


def test_a_model_without_blocks_is_left_alone() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())):
        kind = type(model)
        assert type(fastdcgan.fuse(model)) is kind


# --- the example DCGAN -----------------------------------------------------------------------------------------------


@one_thread()
def train_dcgan(dtype: torch.dtype, device: torch.device, fused: bool, steps: int) -> tuple[Tensor, list[Tensor]]:
    """[steps, 3] losses (D on real, D on fake, G) of the example's loop, and all parameters at the end."""
    nets = [
        build(lambda kind=kind: kind(pixels=32).apply(dcgan_weights), dtype, device)
        for kind in (Generator, Discriminator)
    ]
    generator, discriminator = (fastdcgan.fuse(net) for net in nets) if fused else nets
    optimizers = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in nets]
    noise = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        real = torch.rand(4, 3, 1, 1, generator=noise).expand(4, 3, 32, 32).to(device, dtype)
        z = torch.randn(4, 100, 1, 1, generator=noise).to(device, dtype)
        discriminator.zero_grad()
        fake = generator(z)
        on_real, on_fake = discriminator(real), discriminator(fake.detach())
        loss_real = F.binary_cross_entropy(on_real, torch.ones_like(on_real))
        loss_real.backward()
        loss_fake = F.binary_cross_entropy(on_fake, torch.zeros_like(on_fake))
        loss_fake.backward()
        optimizers[1].step()
        generator.zero_grad()
        judged = discriminator(fake)
        loss = F.binary_cross_entropy(judged, torch.ones_like(judged))
        loss.backward()
        optimizers[0].step()
        losses.append(torch.stack([loss_real, loss_fake, loss]).detach().double())
    return torch.stack(losses), [p.detach().double() for net in nets for p in net.parameters()]


def test_twenty_steps_of_the_example_dcgan(device: torch.device) -> None:
    """In float64 the same losses; in float32 within twice vanilla's own distance from them, step by step.

    Adam divides by the gradient's own size, so an element whose gradient is mere rounding moves by lr in a direction
    of its own: after k steps two float32 runs differ by up to 2*k*lr there, and the losses by its effect. That drift
    has no useful bound in closed form; vanilla's own drift measures it.
    """
    steps, eps = 20, torch.finfo(torch.float32).eps
    truth, parameters = train_dcgan(torch.float64, device, False, steps)
    exact, exact_parameters = train_dcgan(torch.float64, device, True, steps)
    vanilla, _ = train_dcgan(torch.float32, device, False, steps)
    fused, _ = train_dcgan(torch.float32, device, True, steps)
    assert truth[-1, 0] < 0.8 * truth[0, 0], "the discriminator has not learnt: the test would show little"
    torch.testing.assert_close(exact, truth, rtol=1e-8, atol=1e-10)
    for found, expected in zip(exact_parameters, parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    # First step, before any update: rounding only, of a chain of at most 10 layers with sums of up to 512 terms.
    assert float((fused[0] - truth[0]).abs().max()) <= 10 * 512**0.5 * eps * float(truth[0].max())
    error, usual = (fused - truth).abs(), (vanilla - truth).abs()
    drift = usual.cummax(0).values.max(1, keepdim=True).values
    assert bool((error <= 2 * drift + 10 * 512**0.5 * eps * truth.abs()).all()), f"{error}, vanilla's {usual}"


@one_thread()
def gradient_penalty(discriminator: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """WGAN-GP's penalty (Gulrajani et al., 2017) on `x`, its gradients, and the gradient with respect to `x`."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean() * 10
    penalty.backward()
    found = {f"gradient of {name}": p.grad for name, p in discriminator.named_parameters() if p.grad is not None}
    return {"penalty": penalty.detach(), "slope": slope.detach(), "input gradient": x.grad, **found}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_gradient_penalty(norm: type[nn.Module], device: torch.device) -> None:
    def factory() -> nn.Module:
        modules = [
            nn.Conv2d(3, 4, 4, 2, 1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(4, 6, 4, 2, 1),
            norm(6),
            nn.LeakyReLU(0.2),
        ]
        return nn.Sequential(*modules, nn.Conv2d(6, 1, 4))

    found = {}
    settled = settled_input(build(factory, torch.float64, device), (3, 3, 16, 16), device)
    for dtype in (torch.float64, torch.float32):
        x = settled.to(dtype)
        vanilla = gradient_penalty(build(factory, dtype, device), x)
        fused = gradient_penalty(fastdcgan.fuse(build(factory, dtype, device)), x)
        found[dtype] = fused, vanilla
    truth = found[torch.float64][1]
    assert_same(*found[torch.float64])
    assert_as_good(*found[torch.float32], truth)


def test_no_weight_gradients_of_a_frozen_discriminator(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    calls: list[str] = []
    original = router.Route.run
    monkeypatch.setattr(router.Route, "run", lambda route, call: calls.append(call.op) or original(route, call))
    discriminator = fastdcgan.fuse(Discriminator(pixels=32)).to(device)
    x = draw((2, 3, 32, 32), torch.float32, device).requires_grad_()
    discriminator(x).sum().backward()
    assert calls.count("weight_grad") == 4
    calls.clear()
    discriminator.requires_grad_(False).zero_grad()
    x.grad = None
    discriminator(x).sum().backward()
    assert calls and "weight_grad" not in calls
    assert x.grad is not None
    assert all(p.grad is None for p in discriminator.parameters())
    with torch.no_grad():
        assert discriminator(x).grad_fn is None
    assert discriminator(x.detach()).grad_fn is None


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dcgan generator", "pix2pix unet", "spectral norm, old style", "subclass alone"])
def test_checkpoints_go_both_ways(name: str, device: torch.device) -> None:
    factory, shape = PAIRS[name]
    x = draw(shape, torch.float64, device)
    for source_fused in (True, False):
        source, target = build(factory, torch.float64, device), build(factory, torch.float64, device, seed=5)
        fastdcgan.fuse(source if source_fused else target)
        source(x)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=1e-10, atol=1e-12)


@one_thread()
def test_an_optimizer_continues(device: torch.device) -> None:
    x = draw(IMAGE, torch.float64, device)
    found = []
    for fused in (False, True):
        model = build(VARIANTS["two blocks"][0], torch.float64, device)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(6):
            if fused and step == 2:
                fastdcgan.fuse(model)
            if fused and step == 4:
                fastdcgan.unfuse(model)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        found.append({name: p.detach() for name, p in model.named_parameters()})
    # Adam turns a bias's rounding noise in front of a norm into steps, where fused ones have a gradient of exactly 0.
    moved = {name: value for name, value in found[0].items() if name not in ("0.bias", "3.bias")}
    torch.testing.assert_close({name: found[1][name] for name in moved}, moved, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name", ["dcgan discriminator", "two blocks", "subclass alone", "spectral norm", "pix2pix unet"]
)
@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies(name: str, way: str, device: torch.device) -> None:
    factory, shape = PAIRS[name]
    if way in ("pickle", "torch.save") and name == "spectral norm":
        pytest.skip("PyTorch serialises no parametrized module, fused or not")
    model = fastdcgan.fuse(build(factory, torch.float64, device))
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "copy":
        other = copy.copy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    shared = {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    assert bool(shared) == (way == "copy")
    if way == "copy":
        return
    x = draw(shape, torch.float64, device)
    assert_same(results(model, x), results(other, x))
    fastdcgan.unfuse(other)
    assert not fused_sequentials(other)
    assert fused_sequentials(model)


class Stateful(nn.Sequential):
    """Has state, an index and a pickle of its own."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.cache = {"not": "kept"}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "cache": {}}

    def __getitem__(self, index: int | slice | str):
        return self._modules[index] if isinstance(index, str) else super().__getitem__(index)


def test_a_subclass_keeps_what_it_defines(device: torch.device) -> None:
    named = fastdcgan.fuse(Named(4, nn.ReLU()))
    assert isinstance(named, Named)
    assert isinstance(named, FusedSequential)
    assert named.width == 4
    assert type(fastdcgan.fuse(Named(3, nn.Tanh()))) is type(named)
    assert type(named).__name__ == "FusedNamed"
    assert type(named).__module__ == Named.__module__
    model = fastdcgan.fuse(Stateful(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert model["0"] is model[0]
    assert type(model[:1]) is FusedSequential
    assert copy.deepcopy(model).cache == {}
    assert pickle.loads(pickle.dumps(model)).cache == {}
    assert model.cache == {"not": "kept"}


def test_the_list_interface() -> None:
    model = fastdcgan.fuse(
        nn.Sequential(OrderedDict(a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4), c=nn.ReLU(), d=nn.Flatten()))
    )
    assert len(model) == 4
    assert model.a is model[0]
    assert model[-1] is model.d
    assert list(model) == [model.a, model.b, model.c, model.d]
    part = model[1:3]
    assert type(part) is FusedSequential
    assert list(part._modules) == ["b", "c"]
    assert part.b is model.b
    model.append(nn.Linear(4, 2))
    assert len(model) == 5
    del model[-1]
    assert len(model) == 4
    assert isinstance(model + nn.Sequential(nn.ReLU()), nn.Sequential)


@one_thread()
def test_modes_switch(device: torch.device) -> None:
    x = draw(IMAGE, torch.float64, device)
    vanilla, fused = (build(VARIANTS["two blocks"][0], torch.float64, device) for _ in range(2))
    fastdcgan.fuse(fused)
    for change in ("train", "eval", "train", "freeze first", "eval"):
        for model in (vanilla, fused):
            model[1].eval() if change == "freeze first" else model.train(change == "train")
        torch.testing.assert_close(fused(x), vanilla(x), rtol=1e-10, atol=1e-12)
        assert_same(dict(vanilla.named_buffers()), dict(fused.named_buffers()))


@pytest.mark.parametrize("call_first", [False, True])
def test_lazy_modules(call_first: bool, device: torch.device) -> None:
    def factory() -> nn.Sequential:
        return nn.Sequential(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConvTranspose2d(3, 3), nn.LazyBatchNorm2d()
        )

    x = draw(IMAGE, torch.float64, device)
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = factory().to(device, torch.float64)
        if call_first:
            model(x)
        models.append(fastdcgan.fuse(model) if fused else model)
    assert fused_sequentials(models[1]) == [""]
    if not call_first:
        with pytest.raises(ValueError, match="uninitialized"):
            fastdcgan.explain(models[1], x)
        assert "not initialised yet" in fastdcgan.explain(models[1])[0].why
    for _ in range(3):
        outs = []
        for model in models:
            torch.manual_seed(1)  # the first call draws the parameters
            outs.append(model(x))
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-10, atol=1e-12)
        assert_same(dict(models[0].named_buffers()), dict(models[1].named_buffers()))
    assert sum(row.fused for row in fastdcgan.explain(models[1])) == 2


def test_a_model_of_which_nothing_is_fused_is_said_so() -> None:
    with pytest.warns(UserWarning, match=r"fuse\(\) found nothing to fuse in this model: explain\(model\) says why"):
        fastdcgan.fuse(nn.Conv2d(3, 4, 3))
