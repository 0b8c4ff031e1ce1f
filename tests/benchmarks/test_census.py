"""The census: it counts blocks however they are called, times nothing that is wrong, and sums up right."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan.benchmarks import census, tables
from fastdcgan.benchmarks.census import Setting, Watch
from fastdcgan.benchmarks.harness import CPUTimer, Summary, Timing
from fastdcgan.benchmarks.results import Case, Results, Row
from tests.models import MODELS, SMALL
from tests.models.model import Model

TIMING = Timing(2, 1e-4)

# How many convolutions of a small one stand before a norm or an activation, and how many other norms before an
# activation; and how many of those fuse() finds.
BLOCKS = {
    "dcgan generator": (5, 5),
    "dropout discriminator": (4, 4),
    "patchgan, instance norm": (4, 4),
    "pix2pix unet": (8, 7),  # in between the outermost convolution and its LeakyReLU there is a module's border
    "progan generator": (9, 9),
    "mobilenet-v2": (22, 22),
    "residual generator": (8, 8),
    "densenet": (27, 26),  # its first convolution goes into a norm and into a skip, and so that of the next
    "resnet-18, pre-activated": (17, 16),
    "esrgan generator": (11, 11),
    "unet, called one by one": (11, 11),
    "style transfer network": (15, 15),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_counted_however_they_are_called(name: str) -> None:
    factory, shape = SMALL[name]
    blocks = census.blocks_of(factory(), torch.randn(shape))
    assert (blocks.there, blocks.fused) == BLOCKS[name]


class Parts(nn.Module):
    """Blocks with a weight as it is stored, and two that are computed; one is written to before its activation; one
    isn't fused."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        nn.utils.parametrizations.spectral_norm(self.convs[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x).relu()
        x = self.convs[1](x).tanh()
        x = F.conv2d(input=x, weight=self.convs[2].weight * 0.5, padding=1).sigmoid()
        y = self.convs[3](x)
        y += x
        z = self.convs[4](y.relu())
        return F.glu(z.expand(4, 3, 8, 8).repeat(1, 2, 1, 1), 1) + F.layer_norm(z, z.shape[1:])


def test_what_is_left_is_named() -> None:
    blocks = census.blocks_of(Parts(), torch.randn(4, 3, 8, 8))
    assert (blocks.there, blocks.fused) == (4, 3)
    assert blocks.left == [("convs.4", census.WHY_APART)]


def test_most_blocks_of_what_people_write_are_fused(capsys: pytest.CaptureFixture[str]) -> None:
    assert census.main(["--blocks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = [re.fullmatch(r"(.{36}) +(\d+) of +(\d+) fused", line) for line in lines]
    found = {match[1].strip(): (int(match[3]), int(match[2])) for match in counts if match}
    assert found.keys() == MODELS.keys()
    left = [line for line in lines if line.startswith("    ")]
    assert sum(there - fused for there, fused in found.values()) == len(left) == len(lines) - len(MODELS) - 1
    fused, there, percent = map(float, re.fullmatch(r"blocks: (\d+) of (\d+) fused, ([\d.]+) %", lines[-1]).groups())
    assert (there, fused) == tuple(map(sum, zip(*found.values(), strict=True)))
    assert percent == pytest.approx(100 * fused / there, abs=0.05) and percent >= 95


def test_kinks_are_counted_in_functions_and_pooling() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU6(True), nn.MaxPool2d(2), nn.PReLU(), nn.Tanh())
    with Watch() as watch:
        torch.relu(model(torch.randn(2, 3, 8, 8))[:1])
    assert watch.kinks == [2 * 4 * 64, 2 * 4 * 64, 2 * 4 * 16, 4 * 16]


class Noisy(nn.Module):
    """Has what differs from one pass to the next: dropout, and spectral norm, which iterates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.utils.spectral_norm(nn.Conv2d(3, width, 3)), nn.BatchNorm2d(width), nn.Tanh(),
            nn.Dropout(0.5), nn.Conv2d(width, 1, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


NOISY = Model(Noisy, 4, (3, 8, 8), (4, (3, 8, 8)), input_grad=True)


def measured(model: Model, dtype: str = "fp32", form: str = "channels_last", mode: str = "eager") -> Case:
    return census.measure("it", model, Setting(2, dtype, form, mode), TIMING, CPUTimer())


@pytest.mark.parametrize("form", census.FORMATS)
@pytest.mark.parametrize("dtype", census.DTYPES)
def test_a_right_row_is_timed(dtype: str, form: str) -> None:
    case = measured(NOISY, dtype, form)
    assert [row.status for row in case.rows] == ["ok", "ok"], case.rows
    found = census.gain(case)
    assert found is not None
    plain, fused = ([1e-3 * ms for ms in row.samples_ms] for row in case.rows)
    assert found.median == pytest.approx(sum(a / b for a, b in zip(plain, fused, strict=True)) / 2)


@pytest.mark.parametrize("part", ["output", "gradient"])
def test_a_wrong_net_is_not_timed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: nn.Module) -> nn.Module:
        weight = module.block[-1].weight
        if part == "output":
            weight.data.mul_(1.5)
        else:
            weight.register_hook(lambda grad: grad * 1.5)
        return module

    def is_fused(peer: Any, module: nn.Module, *args: Any) -> nn.Module:
        module = transform(peer, module, *args)
        return wrong(module) if peer.fused else module

    transform = census.Peer.transform
    monkeypatch.setattr(census.Peer, "transform", is_fused)
    case = measured(NOISY)
    assert [row.status for row in case.rows] == ["ok", "wrong"]
    assert census.gain(case) is None
    assert "fused wrong: " in census.line(case, (2, 1))


def case_of(name: str, ratio: float, batch: int = 4, dtype: str = "fp32") -> Case:
    """A row that was timed."""
    times = {"plain": ratio, "fused": 1.0}
    rows = [Row(peer, peer, dtype, ms=Summary(ms, ms, ms)) for peer, ms in times.items()]
    rows[0].ratio, rows[1].ratio = Summary(ratio, ratio, ratio), Summary(1, 1, 1)
    return Case("census", name, "contiguous, eager", batch, dtype, "fused", rows)


def test_the_summary_is_over_networks_of_one_setting() -> None:
    cases = [case_of(name, ratio) for name, ratio in zip("abcde", (0.5, 0.96, 1.0, 1.02, 3.0), strict=True)]
    failed = case_of("f", 9.0)
    failed.rows[0].ratio = None
    lines = list(census.summary([*cases, failed, case_of("a", 2.0, 16)]))
    four, sixteen = (line.removeprefix("fp32, contiguous, eager, batch ") for line in lines)
    worst = "worst: a 0.50, b 0.96, c 1.00"
    assert four == f"4: median 1.00 (0.96-1.02) of 5, 2 under 0.97, 1 over 1.03; {worst}"
    assert sixteen == "16: median 2.00 (2.00-2.00) of 1, 0 under 0.97, 1 over 1.03; worst: a 2.00"


def test_a_table_of_many_settings_has_medians_alone() -> None:
    failed = case_of("c", 9.0)
    failed.rows[0].ratio, failed.rows[0].status, failed.rows[0].detail = None, "failed", "no memory"
    few = [case_of("a", 1.5), case_of("b", 0.5), failed]
    extra = {"blocks": dict.fromkeys("abc", (3, 2))}
    _, lines = tables.census_cells(Results("census", {}, few, extra=extra))
    assert [line[2] for line in lines] == [
        "1.50x (1.50-1.50)",
        "0.50x (0.50-0.50)",
        "failed: no memory",
        "**1.00x**",
        "**0.50x**",
    ]
    many = [*few, *(case_of("a", 2.0, batch) for batch in (1, 8, 16, 32))]
    header, lines = tables.census_cells(Results("census", {}, many, extra=extra))
    assert len(header) == 7 and header[3] == "fp32, contiguous, eager, batch 1"
    assert [line[2] for line in lines] == ["1.50x", "0.50x", "failed: no memory", "**1.00x**", "**0.50x**"]
    assert [line[3] for line in lines] == ["2.00x", "-", "-", "**2.00x**", "**2.00x**"]
    assert tables.markdown(Results("bench", {}, []), "census") == ""


def test_rows_are_written_and_an_earlier_run_is_shown_beside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(census, "_models", lambda: {"noisy": NOISY})
    arguments = ["--batch", "2", "--dtype", "fp32", "--mode", "eager", "--seconds", "0.01"]
    before = tmp_path / "before.json"
    assert census.main([*arguments, "--json", str(before)]) == 0
    found = Results.read(before)
    assert [case.part for case in found.cases] == ["contiguous, eager", "channels_last, eager"]
    assert found.extra["blocks"] == {"noisy": [1, 1]}
    assert found.environment["threads"] == torch.get_num_threads()
    assert before.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "->" not in capsys.readouterr().out

    found.cases[0].rows[0].ratio = Summary(7.25, 7.25, 7.25)
    found.write(before)
    assert census.main([*arguments, "--against", str(before)]) == 0
    rows = capsys.readouterr().out.splitlines()[:2]
    assert re.search(r"7\.25x \(7\.25-7\.25\) -> \d", rows[0])
    assert "7.25" not in rows[1] and "->" in rows[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nosuchnet"], "--models has 'nosuchnet'"),
        (["--batch", "0"], "--batch has to be more than 0, not 0"),
        (["--seconds", "-1"], "--seconds has to be more than 0, not -1.0"),
        (["--against", "nosuchfile.json"], "nosuchfile.json"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert census.main(arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_outside_of_a_checkout_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tests.models", None)
    assert census.main([]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "run it from the root of a checkout" in said


def test_names_can_be_given_in_part() -> None:
    assert list(census._chosen(MODELS, ["resnet", "unet, t"])) == [
        "unet, transposed", "resnet-18", "resnet-18, called one by one", "resnet-18, pre-activated",
    ]  # fmt: skip
    assert census._chosen(MODELS, None) == MODELS
