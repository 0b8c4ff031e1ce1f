"""The drop-in layers and `FusedSequential`: arguments, names, PyTorch's results, statistics groups, boundaries."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdcgan
from fastdcgan import FusedSequential
from fastdcgan.activations import ACTIVATIONS
from tests.helpers.networks import IMAGE, VARIANTS
from tests.helpers.twins import assert_fuses_right, assert_same, build, draw, one_thread, results
from tests.models.dcgan import Discriminator
from tests.models.image_to_image import UNet

# layer, its arguments, the modules it stands for
LAYERS: dict[str, tuple[type[nn.Module], tuple, dict[str, Any], tuple[type[nn.Module], dict[str, Any]]]] = {
    "ConvBNAct2d": (fastdcgan.ConvBNAct2d, (3, 4, 3, 2, 1), {}, (nn.LeakyReLU, {"negative_slope": 0.2})),
    "ConvTransposeBNAct2d": (fastdcgan.ConvTransposeBNAct2d, (3, 4, 4, 2, 1), {}, (nn.ReLU, {})),
    "ConvBNLeakyReLU2d": (
        fastdcgan.ConvBNLeakyReLU2d,
        (3, 4, 3),
        {"negative_slope": 0.1, "bias": False},
        (nn.LeakyReLU, {"negative_slope": 0.1}),
    ),
    "ConvTransposeBNReLU2d": (fastdcgan.ConvTransposeBNReLU2d, (3, 6, 3, 2, 1, 1, 3), {"bias": False}, (nn.ReLU, {})),
    "ConvAct2d": (fastdcgan.ConvAct2d, (3, 4, 3), {"activation": "silu"}, (nn.SiLU, {})),
    "ConvTransposeAct2d": (fastdcgan.ConvTransposeAct2d, (3, 4, 3), {"activation": "sigmoid"}, (nn.Sigmoid, {})),
    "ConvLeakyReLU2d": (fastdcgan.ConvLeakyReLU2d, (3, 4, 3), {}, (nn.LeakyReLU, {"negative_slope": 0.2})),
    "ConvTransposeTanh2d": (fastdcgan.ConvTransposeTanh2d, (3, 4, 3), {"bias": False}, (nn.Tanh, {})),
}


def vanilla_of(name: str) -> nn.Sequential:
    """The same modules in a plain Sequential, made by the way of PyTorch's constructors."""
    _, args, kwargs, (act, act_kwargs) = LAYERS[name]
    conv_kwargs = {key: value for key, value in kwargs.items() if key == "bias"}
    conv = (nn.ConvTranspose2d if "Transpose" in name else nn.Conv2d)(*args, **conv_kwargs)
    parts = {"conv": conv, "bn": nn.BatchNorm2d(args[1]), "act": act(**act_kwargs)}
    if "BN" not in name:
        del parts["bn"]
    model = nn.Sequential()
    for key, part in parts.items():
        model.add_module(key, part)
    return model


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_modules(name: str, train: bool, device: torch.device) -> None:
    kind, args, kwargs, _ = LAYERS[name]
    x = draw(IMAGE, torch.float64, device)
    vanilla = build(lambda: vanilla_of(name), torch.float64, device).train(train)
    layer = build(lambda: kind(*args, **kwargs), torch.float64, device).train(train)
    assert list(layer.state_dict()) == list(vanilla.state_dict())
    assert [type(m) for m in layer.children()] == [type(m) for m in vanilla.children()]
    assert [m.extra_repr() for m in layer.children()] == [m.extra_repr() for m in vanilla.children()]
    assert_same(results(vanilla, x), results(layer, x))
    (row,) = fastdcgan.explain(layer)
    assert row.fused
    assert row.name == "conv"


@pytest.mark.parametrize(("layer", "conv"), [("ConvBNAct2d", nn.Conv2d), ("ConvTransposeBNAct2d", nn.ConvTranspose2d)])
def test_arguments_are_pytorchs_in_its_order(layer: str, conv: type[nn.Module]) -> None:
    ours = list(inspect.signature(LAYERS[layer][0]).parameters.values())
    theirs = list(inspect.signature(conv).parameters.values())
    norm = [
        p
        for p in inspect.signature(nn.BatchNorm2d).parameters.values()
        if p.name not in ("num_features", "device", "dtype", "bias")
    ]
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    keywords = ours[len(theirs) :]
    assert all(p.kind is p.KEYWORD_ONLY for p in keywords)
    assert [(p.name, p.default) for p in keywords[: len(norm)]] == [(p.name, p.default) for p in norm]
    assert [p.name for p in keywords[len(norm) :]] == ["activation", "slope"]


def test_norm_and_factory_arguments_arrive(device: torch.device) -> None:
    layer = fastdcgan.ConvBNAct2d(
        3, 4, 3, device=device, dtype=torch.float64, eps=1e-3, momentum=None, affine=False, track_running_stats=False,
        activation="elu", slope=0.3,
    )  # fmt: skip
    assert (layer.bn.eps, layer.bn.momentum, layer.bn.affine, layer.bn.track_running_stats) == (
        1e-3,
        None,
        False,
        False,
    )
    assert layer.act.alpha == 0.3
    assert layer.conv.weight.dtype == torch.float64
    meta = fastdcgan.ConvTransposeBNAct2d(3, 4, 4, 2, 1, device="meta")
    assert meta(torch.empty(2, 3, 5, 6, device="meta")).shape == (2, 4, 10, 12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_the_table(activation: str, device: torch.device) -> None:
    layer = fastdcgan.ConvBNAct2d(3, 4, 3, activation=activation).to(device, torch.float64)
    plain = fastdcgan.unfuse(copy.deepcopy(layer))
    assert type(plain) is nn.Sequential
    assert len(plain) == (2 if activation == "identity" else 3)
    x = draw(IMAGE, torch.float64, device)
    assert_same(results(plain, x), results(layer, x))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'prelu': expected one of 'identity', 'relu'"):
        fastdcgan.ConvBNAct2d(3, 4, 3, activation="prelu")
    for name, value, error in (
        ("stride", 0, ValueError), ("stride", (1, 0), ValueError), ("padding", -1, ValueError),
        ("dilation", 0, ValueError), ("groups", 0, ValueError), ("stride", "two", TypeError),
        ("eps", "small", TypeError), ("momentum", math.nan, ValueError), ("slope", "steep", TypeError),
        ("slope", math.inf, ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match=name):
            fastdcgan.ConvBNAct2d(3, 4, **({"kernel_size": 3} | {name: value}))
    with pytest.raises(TypeError, match="slope"):
        fastdcgan.ConvTransposeBNReLU2d(3, 4, 3, negative_slope=0.2)
    with pytest.raises(ValueError, match=r"groups|divisible"):
        fastdcgan.ConvAct2d(3, 4, 3, groups=2)


@pytest.mark.parametrize("name", LAYERS)
def test_round_trips(name: str, device: torch.device) -> None:
    kind, args, kwargs, _ = LAYERS[name]
    layer = build(lambda: kind(*args, **kwargs), torch.float64, device)
    x = draw(IMAGE, torch.float64, device)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is kind
        torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-14)
    model = nn.ModuleList([layer])
    assert type(fastdcgan.unfuse(model)[0]) is nn.Sequential
    torch.testing.assert_close(model[0](x), expected, rtol=1e-10, atol=1e-12)
    assert type(copy.deepcopy(model)[0]) is nn.Sequential
    assert type(fastdcgan.fuse(copy.deepcopy(model))[0]) is kind
    assert fastdcgan.fuse(model)[0] is layer
    assert type(layer) is kind
    assert type(layer[:1]) is FusedSequential  # a part of a layer is no such layer


TRANSPOSED = [name for name in LAYERS if "Transpose" in name]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(19, 17), (18, 16), [4, 3, 19, 17]], ids=str)
@pytest.mark.parametrize("name", ["ConvTransposeBNAct2d", "ConvTransposeAct2d"])
def test_an_output_size(name: str, size: Any, train: bool, device: torch.device) -> None:
    kind, parts, found = LAYERS[name][0], 2 if train else 1, []
    x = draw(IMAGE, torch.float64, device).repeat(parts, 1, 1, 1)
    for fused in (False, True):
        model = build(lambda: kind(3, 3, 4, 2, 1), torch.float64, device).train(train)
        leaf = x.clone().requires_grad_()
        if fused:
            out = model(leaf, size, stat_groups=parts) if train else model(leaf, output_size=size)
        else:
            conv, *others = fastdcgan.unfuse(model)
            assert type(model) is nn.Sequential
            outs = [nn.Sequential(*others)(conv(part, size)) for part in leaf.chunk(parts)]
            out = torch.cat(outs)
        out.square().sum().backward()
        state = dict(model.named_buffers()) | {k: p.grad for k, p in model.named_parameters()}
        found.append({"output": out.detach(), "input": leaf.grad} | state)
    assert found[1]["output"].shape[2:] == tuple(size)[-2:]
    assert_same(found[1], found[0])


@pytest.mark.parametrize("name", TRANSPOSED)
def test_an_output_size_that_there_is_not(name: str) -> None:
    kind, args, kwargs, _ = LAYERS[name]
    layer, x = kind(*args, **kwargs), torch.randn(IMAGE)
    before = copy.deepcopy(layer.state_dict())
    for size in ([99, 17], [1, 2, 3]):
        with pytest.raises(ValueError) as theirs:  # noqa: PT011
            layer.conv(x, size)
        with pytest.raises(ValueError) as ours:  # noqa: PT011
            layer(x, size)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="stat_groups=3 must divide the batch size, got a batch of 4"):
        layer(x, layer.conv(x).shape[2:], 3)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_an_output_size_runs_as_one_block(device: torch.device) -> None:
    layer = fastdcgan.ConvTransposeBNReLU2d(3, 4, 3, 2, 1).to(device)
    for model in (layer, nn.Sequential(layer)):
        assert type(fastdcgan.fuse(model)) in (type(layer), FusedSequential)
        assert type(layer) is fastdcgan.ConvTransposeBNReLU2d
    (row,) = fastdcgan.explain(layer, draw(IMAGE, torch.float32, device), [18, 16])
    assert (row.name, row.pattern, row.fused) == ("conv", "ConvTranspose2d + BatchNorm2d + ReLU", True)


def test_layers_make_a_chain(device: torch.device) -> None:
    def factory() -> nn.Module:
        up = fastdcgan.ConvTransposeBNReLU2d(5, 8, 4, 1, 0, bias=False), fastdcgan.ConvTransposeTanh2d(8, 3, 4, 2, 1)
        return fastdcgan.unfuse(nn.Sequential(*up))

    assert_fuses_right(factory, (4, 5, 1, 1), device)
    model = FusedSequential(fastdcgan.fuse(factory())).to(device)
    rows = fastdcgan.explain(model)
    assert [row.name for row in rows] == ["0.0.conv", "0.1.conv"]
    out = model(torch.randn(4, 5, 1, 1, device=device))
    assert "Chain" in out.grad_fn.name()
    assert all(fn is None or "Chain" not in fn.name() for fn, _ in out.grad_fn.next_functions)


# --- statistics groups -----------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """Vanilla PyTorch's two passes, as one function of the joined batch."""

    def __init__(self, model: nn.Module, parts: int) -> None:
        super().__init__()
        self.model, self.parts = model, parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.model(part) for part in x.chunk(self.parts)])


class Grouped(Halves):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, stat_groups=self.parts)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(
    "name", ["two blocks", "momentum none", "no running statistics", "norm before conv", "nested", "reflect",
             "subclass with a forward", "flatten and linear", "frozen norm", "shared conv"]
)  # fmt: skip
def test_statistics_groups_are_separate_passes(name: str, parts: int, train: bool, device: torch.device) -> None:
    factory, _ = VARIANTS[name]
    x = draw((6, *IMAGE[1:]), torch.float64, device)
    vanilla = Halves(build(factory, torch.float64, device).train(train), parts)
    fused = Grouped(fastdcgan.fuse(build(factory, torch.float64, device)).train(train), parts)
    assert_same(results(vanilla, x), results(fused, x))


@pytest.mark.parametrize("name", ["shared block", "same block in a row"])
def test_a_norm_used_twice_is_updated_in_another_order(name: str, device: torch.device) -> None:
    """Use by use, each for all groups, where separate passes go group by group: only running statistics can tell."""
    x, found = draw(IMAGE, torch.float64, device), []
    for kind in (Halves, Grouped):
        model = build(VARIANTS[name][0], torch.float64, device)
        found.append(results(kind(fastdcgan.fuse(model) if kind is Grouped else model, 2), x))
    running = [key for key in found[0] if "running" in key]
    differ = [key for key in running if not torch.allclose(found[1].pop(key), found[0].pop(key))]
    assert differ
    assert_same(*found)


def test_statistics_groups_reach_modules_in_between(device: torch.device) -> None:
    x = draw((4, 3, 32, 32), torch.float64, device)
    found = []
    for kind in (Halves, Grouped):
        model = build(UNet, torch.float64, device)
        tail = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        whole = build(lambda model=model, tail=tail: nn.Sequential(model, *tail), torch.float64, device)
        found.append(results(kind(fastdcgan.fuse(whole) if kind is Grouped else whole, 2), x))
    assert_same(*found)


@one_thread()
def test_real_and_fake_as_one_batch(device: torch.device) -> None:
    real, fake = (draw((3, 3, 32, 32), torch.float64, device, seed) for seed in (1, 2))
    apart = fastdcgan.fuse(build(lambda: Discriminator(pixels=32, sigmoid=False), torch.float64, device))
    joined = copy.deepcopy(apart)
    losses = [
        F.binary_cross_entropy_with_logits(apart(real), torch.ones(3, device=device, dtype=torch.float64)),
        F.binary_cross_entropy_with_logits(apart(fake), torch.zeros(3, device=device, dtype=torch.float64)),
    ]
    sum(losses).backward()
    logits = joined.main(torch.cat([real, fake]), stat_groups=2).flatten()
    target = torch.tensor([1.0] * 3 + [0.0] * 3, device=device, dtype=torch.float64)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").reshape(2, 3).mean(1).sum()
    loss.backward()
    torch.testing.assert_close(loss, sum(losses), rtol=1e-12, atol=0)
    for (name, a), b in zip(apart.named_parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert_same(dict(apart.named_buffers()), dict(joined.named_buffers()))


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_bad_statistics_groups(value: Any) -> None:
    model = fastdcgan.fuse(VARIANTS["two blocks"][0]())
    with pytest.raises(ValueError if type(value) is int else TypeError, match="stat_groups"):
        model(torch.randn(IMAGE), stat_groups=value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="must divide the batch size, got a batch of 4"):
        model(torch.randn(IMAGE), stat_groups=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- boundaries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "two blocks",
        "no norm",
        "shared conv",
        "silu, gelu, elu",
        "relu6 to logsigmoid",
        "frozen norm",
        "padding inside a chain",
    ],
)
@pytest.mark.parametrize("stat_groups", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_boundaries_change_nothing(name: str, stat_groups: int, train: bool, device: torch.device) -> None:
    found = []
    for boundaries in ("finished", "deferred", "auto"):
        model = fastdcgan.fuse(build(VARIANTS[name][0], torch.float64, device)).train(train)
        model.boundaries = boundaries
        found.append(results(Grouped(model, stat_groups), draw(IMAGE, torch.float64, device)))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("boundaries", ["lazy", None, 1])
def test_an_unknown_boundary(boundaries: Any) -> None:
    model = fastdcgan.fuse(VARIANTS["two blocks"][0]())
    model.boundaries = boundaries
    with pytest.raises(ValueError, match="boundaries must be 'auto', 'finished' or 'deferred', got"):
        model(torch.randn(IMAGE))


def test_the_tutorials_initialiser_takes_them() -> None:
    """`weights_init` of PyTorch's DCGAN tutorial, which goes by the names of classes."""

    def weights_init(m: nn.Module) -> None:
        name = type(m).__name__
        if name.find("Conv") != -1:
            nn.init.normal_(m.weight.data, 0.0, 0.02)
        elif name.find("BatchNorm") != -1:
            nn.init.normal_(m.weight.data, 1.0, 0.02)
            nn.init.constant_(m.bias.data, 0)

    layer = fastdcgan.ConvTransposeBNReLU2d(64, 64, 4)
    keys = list(layer.state_dict())
    layer.apply(weights_init)
    assert 0.018 < float(layer.conv.weight.std()) < 0.022
    assert layer.weight is layer.conv.weight and list(layer.state_dict()) == keys
