"""`explain`: what runs fused where, what does not and why not; asking changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.dispatch import autotune
from fastdcgan.explain import Explanation, Row
from fastdcgan.spec import Unavailable
from tests.helpers.networks import IMAGE, VARIANTS
from tests.helpers.twins import build, draw, one_thread
from tests.models import SMALL
from tests.models.classifiers import PreactivatedBlock
from tests.models.dcgan import Generator
from tests.models.image_to_image import UNet, resnet_generator

PAIRS = {**SMALL, **VARIANTS}


def rows_of(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, Row]:
    return {row.name: row for row in fastdcgan.explain(model, x)}


def one_backend(device: torch.device) -> str:
    return fastdcgan.backends.select(fastdcgan.backends.requested(), device.type, torch.float32)


@one_thread()
@pytest.mark.parametrize("with_input", [False, True], ids=["without x", "with x"])
@pytest.mark.parametrize("name", PAIRS)
def test_asking_changes_nothing(name: str, with_input: bool, device: torch.device) -> None:
    factory, shape = PAIRS[name]
    model = fastdcgan.fuse(build(factory, torch.float32, device))
    x = draw(shape, torch.float32, device)
    state = {key: value.clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}
    training, random, given = [m.training for m in model.modules()], torch.get_rng_state(), x.clone()

    rows = fastdcgan.explain(model, x if with_input else None)

    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert after.keys() == state.keys()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == training
    assert torch.equal(x, given)
    assert all(p.grad is None for p in model.parameters())

    paths = dict(model.named_modules(remove_duplicate=False))
    assert all(row.name in paths or row.name == "(model)" for row in rows)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.why
        assert (row.backend is not None) == row.fused
        kind = type(paths[row.name]).__name__.removeprefix("Parametrized").removeprefix("Fused")
        assert row.pattern.removeprefix("Upsample + ").split(" + ")[0] == kind


def test_what_is_fused(device: torch.device) -> None:
    rows = rows_of(fastdcgan.fuse(Generator()).to(device))
    assert list(rows) == ["main.0", "main.3", "main.6", "main.9", "main.12"]
    assert all(row.fused and row.backend == one_backend(device) for row in rows.values())
    assert rows["main.0"].pattern == "ConvTranspose2d + BatchNorm2d + ReLU"
    assert rows["main.12"].pattern == "ConvTranspose2d + Tanh"

    rows = rows_of(fastdcgan.fuse(UNet()).to(device))
    inside = "model.model.1.model.3.model.3.model."
    assert rows[inside + "1"].pattern == "Conv2d + ReLU"
    assert rows[inside + "3"].pattern == "ConvTranspose2d + BatchNorm2d"
    assert rows["model.model.0"].why == "no norm, activation or other block next to it"

    rows = rows_of(fastdcgan.fuse(resnet_generator()).to(device))
    assert rows["10.conv_block.5"].pattern == "Conv2d + BatchNorm2d"
    assert all(row.fused for row in rows.values())


def test_blocks_without_a_convolution(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found among modules and in a forward; what ran says that there was nothing to contract."""
    rows = rows_of(fastdcgan.fuse(VARIANTS["norm before conv"][0]()).to(device))
    assert {name: (row.pattern, row.fused) for name, row in rows.items()} == {
        "0": ("BatchNorm2d + ReLU", True),
        "2": ("Conv2d + ReLU", True),
    }
    model, x = fastdcgan.fuse(PreactivatedBlock(3, 4, 1)).to(device), draw(IMAGE, torch.float32, device)
    monkeypatch.setattr(autotune, "_by_rule", True)
    rows = rows_of(model, x)
    assert rows["bn1"].pattern == "BatchNorm2d + ReLU" and rows["bn1"].why.startswith("no contraction")
    assert rows["conv1"].pattern == "Conv2d + BatchNorm2d + ReLU" and rows["conv1"].fused


def with_hook() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].register_forward_hook(lambda *args: None)
    return model


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu()


REASONS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "hook": (with_hook, "0", "hooks"),
    "1d": (VARIANTS["1d"][0], "0", "blocks are of 2-d convolutions"),
    "3d": (VARIANTS["3d"][0], "1", "BatchNorm3d is not fused"),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
        "1",
        "GroupNorm is not fused",
    ),
    "norm alone": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU()),
        "0",
        "no norm, activation or other block next to it",
    ),
    "activation first": (
        lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()),
        "0",
        "no convolution or norm",
    ),
    "alone": (
        lambda: nn.Sequential(*VARIANTS["two blocks"][0](), nn.Dropout(), nn.Conv2d(5, 2, 3)),
        "7",
        "no norm, activation or other block next to it",
    ),
    "own code": (Own, "conv", "called by code of its own"),
    "own forward": (VARIANTS["subclass with a forward"][0], "0.0", "called by code of its own"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), "0", "not initialised yet"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_not(name: str) -> None:
    factory, where, why = REASONS[name]
    row = rows_of(fastdcgan.fuse(factory()))[where]
    assert not row.fused
    assert row.backend is None
    assert why in row.why


def test_before_fuse_and_after_unfuse() -> None:
    model = Generator()
    for change in (lambda m: m, fastdcgan.fuse, fastdcgan.unfuse):
        rows = fastdcgan.explain(change(model))
        assert len(rows) == 5
        assert all(row.fused == (change is fastdcgan.fuse) for row in rows)
        assert change is fastdcgan.fuse or all("call fastdcgan.fuse(model)" in row.why for row in rows)


def test_layers_in_a_plain_sequential_are_fused_as_they_are() -> None:
    layer = fastdcgan.ConvBNLeakyReLU2d(3, 4, 3)
    rows = rows_of(nn.Sequential(layer, nn.Conv2d(4, 4, 3), nn.ReLU()))
    assert {name: row.fused for name, row in rows.items()} == {"0.conv": True, "1": False}


def test_a_shared_module_has_a_row_for_each_use() -> None:
    rows = rows_of(fastdcgan.fuse(VARIANTS["shared block"][0]()))
    assert list(rows) == ["0.0", "1", "3.0"]


def test_an_input_shows_what_ran(device: torch.device) -> None:
    model = fastdcgan.fuse(VARIANTS["two blocks"][0]()).to(device)
    x = draw(IMAGE, torch.float32, device)
    rows = fastdcgan.explain(model, x)
    routes = [row.why.split(f"; input {list(IMAGE)}")[0] for row in rows]
    assert all(route and not route.startswith("input ") and "input " not in route for route in routes)
    assert all(row.backend == one_backend(device) for row in rows)

    class OneBranch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    found = rows_of(fastdcgan.fuse(OneBranch()).to(device), x)
    assert found["used.0"].fused
    assert found["unused.0"].why == "was not reached by this input, or ran module by module"


def test_an_input_that_fails_leaves_no_trace(device: torch.device) -> None:
    model = fastdcgan.fuse(
        build(
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(999, 2)),
            torch.float32,
            device,
        )
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        fastdcgan.explain(model, draw(IMAGE, torch.float32, device))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert fastdcgan.engine.chain.recorder is None


def test_the_backend_asked_for_is_named(backend: str, device: torch.device) -> None:
    rows = fastdcgan.explain(fastdcgan.fuse(VARIANTS["two blocks"][0]()).to(device))
    assert all(row.backend == backend and row.why == "asked for by name" for row in rows)


def test_auto_says_what_it_passed_over(device: torch.device) -> None:
    with fastdcgan.backend("auto"):
        model = fastdcgan.fuse(VARIANTS["two blocks"][0]()).to(device, torch.float64)
        for row in fastdcgan.explain(model):
            assert row.backend == "reference"
            passed_over = {name for name in backends.NAMES if f"not {name}: " in row.why}
            assert passed_over == {"cuda", "triton", "cpu"} - absent().keys()


def absent() -> dict[str, str]:
    return {name: why for name, why in fastdcgan.backends().items() if why != "available"}


def test_what_is_absent_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "no such machine " * 9
    monkeypatch.setitem(backends._loaded, "triton", Unavailable(why))
    model, x = fastdcgan.fuse(VARIANTS["two blocks"][0]()), torch.randn(IMAGE)
    for rows in (fastdcgan.explain(model), fastdcgan.explain(model, x)):
        assert rows.absent == absent() and rows.absent["triton"] == why
        assert not any(reason in row.why for row in rows for reason in rows.absent.values())
        table = " ".join(str(rows).split())
        assert all(table.count(" ".join(reason.split())) == 1 for reason in rows.absent.values())
    with fastdcgan.backend("reference"):
        assert not fastdcgan.explain(model).absent


def test_the_table() -> None:
    text = str(fastdcgan.explain(fastdcgan.fuse(REASONS["norm alone"][0]())))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "pattern", "runs", "why"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "2"]
    column = lines[0].index("runs")
    assert all(line[column:].startswith(("fused on ", "as it is")) and line[column - 1] == " " for line in lines[1:3])
    assert lines[3] == "1 of 2 fused"
    assert str(Explanation()).endswith("0 of 0 fused")


@one_thread()
@pytest.mark.parametrize("name", PAIRS)
def test_the_table_fits_a_terminal_and_leaves_nothing_out(name: str, device: torch.device) -> None:
    factory, shape = PAIRS[name]
    rows = fastdcgan.explain(fastdcgan.fuse(build(factory, torch.float32, device)), draw(shape, torch.float32, device))
    lines = str(rows).splitlines()
    assert max(map(len, lines)) < 120
    table = " ".join(" ".join(lines).split())
    for row in rows:
        runs = f"fused on {row.backend}" if row.fused else "as it is"
        assert f"{row.name} {row.pattern} {runs} {row.why}" in table


class Scaled(nn.Module):
    """A convolution whose weight is computed at each call, as for an equalised learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight * 0.1)


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3)
        self.second, self.third = Scaled(), nn.utils.spectral_norm(nn.Conv2d(4, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.norm(self.first(x)).relu()).tanh()).sigmoid()


def test_weights_that_are_computed_at_each_call(device: torch.device) -> None:
    rows = fastdcgan.explain(fastdcgan.fuse(Computed()).to(device), draw(IMAGE, torch.float32, device))
    assert {row.name: row.pattern for row in rows} == {
        "first": "Conv2d + BatchNorm2d + ReLU", "second": "Scaled + Tanh", "third": "Conv2d + Sigmoid",
    }  # fmt: skip
    assert all(row.fused for row in rows)


def test_convolutions_of_somebody_elses_in_a_sequential(device: torch.device) -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(Scaled(), nn.LeakyReLU(0.2))])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](x)

    (row, *others) = fastdcgan.explain(fastdcgan.fuse(Grown()).to(device), draw(IMAGE, torch.float32, device))
    assert (row.name, row.pattern, row.fused, others) == ("blocks.0.0", "Scaled + LeakyReLU", True, [])


@pytest.mark.parametrize("x", ["image", 3, [1.0]])
def test_an_input_is_a_tensor(x) -> None:
    model = fastdcgan.fuse(VARIANTS["two blocks"][0]())
    with pytest.raises(TypeError, match=f"expected a torch.Tensor as input, or None, got {type(x).__name__}"):
        fastdcgan.explain(model, x)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor, scale: float, other: torch.Tensor | None = None) -> torch.Tensor:
            out = torch.tanh(self.conv(x)) * scale
            return out if other is None else out + other

    model, x = fastdcgan.fuse(Two()), torch.randn(2, 3, 8, 8)
    for rows in (fastdcgan.explain(model, x, 2.0), fastdcgan.explain(model, x, scale=2.0, other=torch.ones(1))):
        assert [(row.name, row.pattern, row.fused) for row in rows] == [("conv", "Conv2d + Tanh", True)]
    assert not fastdcgan.explain(model)[0].fused
    with pytest.raises(TypeError, match=r"expected a torch.Tensor as input"):
        fastdcgan.explain(model, 3)
