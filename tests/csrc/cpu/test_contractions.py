"""The contractions of csrc/cpu against float64, for this processor and for older ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cpu as cpu_backend
from fastdcgan.backends.base import Backend
from fastdcgan.backends.cpu import CPUBackend
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.geometry import Geometry
from fastdcgan.spec import STORE, Algorithm, Call, Epilogue, Operand, memory_format, says_channels_last
from tests.helpers.contractions import (
    check_constant,
    constant_call,
    conv_call,
    conv_transpose_call,
    run,
    weight_grad_call,
    why_not,
)
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import run_capped

STATUS = backends.status()["cpu"]
if STATUS == "available" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
    STATUS = "the contractions of csrc/cpu need AVX2"
pytestmark = pytest.mark.skipif(STATUS != "available", reason=STATUS)

REFERENCE = ReferenceBackend()
CHANNELS_LAST = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
K4 = Geometry((4, 4), (2, 2), (1, 1))
GROUPS = [1, 2, None]  # of statistics; None: each image is one
# (batch, channels and size of the gathered side, channels of the linear side, geometry): every kind of block of a DCGAN
# (projection, wide, image side, logit), with whole panels of channels and without
BLOCKS = {
    "wide": (3, 64, 8, 96, K4),
    "wide, few pixels": (5, 48, 4, 65, K4),
    "deep": (2, 300, 4, 40, K4),
    "many channels": (2, 64, 8, 528, K4),
    "image": (2, 3, 16, 64, K4),
    "grayscale": (3, 1, 12, 17, K4),
    "projection": (5, 128, 4, 100, Geometry((4, 4))),
    "logit": (7, 96, 4, 1, Geometry((4, 4))),
    "one sample": (1, 64, 8, 32, K4),
    "3x3": (2, 32, 9, 33, Geometry((3, 3), padding=(1, 1))),
    "odd": (2, 5, 11, 7, Geometry((5, 2), (3, 1), (2, 3), (1, 2))),
}


DIRECT = ("col2im", "image_side", "gemm", "unpacked")
WINOGRAD = ("winograd_2x2", "winograd_4x4")


class Kernels(CPUBackend):
    """The algorithms of these names; those that need no transforms and no splitting by default."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.require()
        self.names = names or ("amx_col2im", "amx", *DIRECT)
        if not any("amx" in name or name == "split_bf16" for name in self.names):
            self.amx = False  # else bfloat16 is for AMX tiles alone

    def algorithms(self, op: str) -> Sequence[Algorithm]:
        return [a for a in super().algorithms(op) if a.name.removeprefix("cpu ") in self.names]

    def able(self, call: Call) -> list[str]:
        return [a.name for a in self.algorithms(call.op) if a.why_not(call) is None]


@pytest.fixture
def cpu() -> Kernels:
    return Kernels()


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """channels_last in its strides also where there is one channel."""
    n, channels, height, width = shape
    x = torch.randn(n, height, width, channels, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).permute(0, 3, 1, 2)


class Case:
    """The tensors of a convolution: `x` the gathered side, `dy` the linear one. `stays`: as of the calls."""

    stays = False

    def __init__(self, batch: int, channels: int, size: tuple[int, int], out: int, g: Geometry, dtype: torch.dtype):
        self.g, self.size = g, size
        self.x = random((batch, channels, *size), dtype, 1)
        self.weight = random((out, channels, *g.kernel), dtype, 2)
        self.dy = random((batch, out, *g.conv_size(*size)), dtype, 3)

    def calls(self, e: Epilogue = STORE, wide: bool = False) -> dict[str, Call]:
        x, weight, dy = (t.double() if wide else t for t in (self.x, self.weight, self.dy))
        if wide and e.coef is not None:
            e = e._replace(coef=e.coef.double())
        return {
            "conv": conv_call(Operand(x), weight, self.g, e),
            "conv_transpose": conv_transpose_call(Operand(dy), weight, self.g, self.size, e),
            "weight_grad": weight_grad_call(Operand(x), Operand(dy), self.g),
        }

    def run(self, on: Backend, wide: bool = False) -> dict[str, Tensor]:
        """The results by the first algorithm that can run them."""
        found = {op: run(on, call) for op, call in self.calls(wide=wide).items()}
        return {op: result if op == "weight_grad" else result[0] for op, result in found.items()}

    def vanilla(self) -> dict[str, Tensor]:
        """PyTorch's own. Numbers of 16 bits are multiplied as float32 and rounded then: PyTorch 2.13's convolutions of
        these leave values unwritten for some geometries on processors with AMX."""
        floats = copy.copy(self)
        floats.x, floats.weight, floats.dy = self.x.float(), self.weight.float(), self.dy.float()
        return {op: result.to(self.x.dtype) for op, result in floats.run(REFERENCE).items()}

    def contract(self, on: Backend, op: str, e: Epilogue = STORE, wide: bool = False) -> tuple[Tensor, Tensor]:
        return run(on, self.calls(e, wide)[op]._replace(stays=self.stays))

    def three(self, cpu: Kernels, op: str, e: Epilogue) -> tuple[tuple[Tensor, Tensor], ...]:
        """`contract` by ours, by the reference, and by the reference in float64."""
        return self.contract(cpu, op, e), self.contract(REFERENCE, op, e), self.contract(REFERENCE, op, e, wide=True)

    def terms(self, op: str) -> int:
        x, dy, area = self.x.shape, self.dy.shape, math.prod(self.g.kernel)
        return {"conv": x[1] * area, "conv_transpose": dy[1] * area, "weight_grad": x[0] * dy[2] * dy[3]}[op]

    def check_threads(self, cpu: Kernels) -> list[Tensor]:
        """The results and the statistics of `conv`, which are the same bits whatever the threads."""
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 2, 5):
                torch.set_num_threads(count)
                stats = self.contract(cpu, "conv", Epilogue("stats"))[1]
                results.append([*self.run(cpu).values(), stats])
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        return results[0]

    def check(self, cpu: Kernels) -> None:
        """Every algorithm that can run."""
        vanilla, truth = self.vanilla(), self.run(REFERENCE, wide=True)
        for op, call in self.calls().items():
            terms = self.terms(op)
            # All taps of a tiny image may read padding, or the sum may cancel.
            scale = float(truth[op].square().mean().sqrt()) or math.sqrt(terms)
            able, other = cpu.able(call), call.b.x if op == "weight_grad" else call.b
            assert able or not (says_channels_last(call.a.x) or says_channels_last(other))  # if all sizes are 1
            for name in able:
                found = run(cpu, call, name)
                result = found if op == "weight_grad" else found[0]
                assert_as_accurate(result, vanilla[op], truth[op], f"{op} by {name}", reduction=terms, scale=scale)
                if op != "weight_grad":
                    assert result.is_contiguous(memory_format=CHANNELS_LAST)
                elif not self.x.is_contiguous():
                    assert memory_format(result) == memory_format(vanilla[op])


def block(name: str, dtype: torch.dtype) -> Case:
    batch, channels, size, out, g = BLOCKS[name]
    return Case(batch, channels, (size, size), out, g, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(cpu: Kernels, name: str, dtype: torch.dtype) -> None:
    block(name, dtype).check(cpu)
    if cpu.amx and dtype == torch.bfloat16:
        block(name, dtype).check(Kernels(*DIRECT))


@settings(max_examples=120)
@given(data=st.data())
def test_drawn_geometries(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(low, high), st.integers(low, high))

    cpu = Kernels()
    g = Geometry(data.draw(pair(1, 5)), data.draw(pair(1, 4)), data.draw(pair(0, 4)), data.draw(pair(1, 3)))
    size = data.draw(pair(1, 9))
    assume(min(g.conv_size(*size)) >= 1)
    channels = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 270]))
    dtype = data.draw(st.sampled_from(DTYPES))
    Case(data.draw(st.integers(1, 5)), data.draw(channels), size, data.draw(channels), g, dtype).check(cpu)


def test_many_pixels_are_divided_among_tasks(cpu: Kernels) -> None:
    Case(9, 3, (64, 64), 16, K4, torch.float32).check(cpu)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activated_outputs(cpu: Kernels, act: str) -> None:
    slope = ACTIVATIONS[act].default_slope
    for name in ("wide", "image"):
        for dtype in DTYPES:
            case = block(name, dtype)
            for op, channels in (("conv", case.dy.shape[1]), ("conv_transpose", case.x.shape[1])):
                coef = torch.randn(4, 1, channels, generator=torch.Generator().manual_seed(4)) * 0.1
                results = [found[0] for found in case.three(cpu, op, Epilogue("activate", None, coef, act, slope))]
                assert_as_accurate(*results, f"{op} of {name} with {act}", reduction=case.terms(op), scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias(cpu: Kernels, dtype: torch.dtype) -> None:
    for name in ("wide", "image"):
        case = block(name, dtype)
        bias = torch.randn(case.dy.shape[1]).to(dtype)
        results = [found[0] for found in case.three(cpu, "conv", Epilogue("bias", coef=bias))]
        assert_as_accurate(*results, f"{name} with a bias", reduction=case.terms("conv"))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(cpu: Kernels, dtype: torch.dtype, groups: int | None) -> None:
    check_statistics(cpu, dtype, groups, ((4, 4), (2, 16), (32, 8)))


def check_statistics(
    cpu: Kernels, dtype: torch.dtype, groups: int | None, shapes: tuple[tuple[int, int], ...], g: Geometry = K4
) -> None:
    """The epilogue "stats" of 24 -> 50 channels; `shapes`: batches, and the sides of their images."""
    for batch, size in shapes:
        case = Case(batch, 24, (size, size), 50, g, dtype)
        for op in ("conv", "conv_transpose"):
            (out, got), (_, vanilla), (_, truth) = case.three(cpu, op, Epilogue("stats", stat_groups=groups or batch))
            assert torch.equal(out, case.contract(cpu, op)[0])
            for row, name in enumerate(["mean", "biased variance", "unbiased variance"]):
                scale = float(truth[1].mean().sqrt())
                assert_as_accurate(
                    got[row], vanilla[row].float(), truth[row], f"{name} of {op}", reduction=case.terms(op), scale=scale
                )


def test_statistics_of_a_large_mean(cpu: Kernels) -> None:
    """A mean of a thousand deviations."""
    x = 1000 + torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    weight = torch.ones(20, 1, 1, 1).contiguous(memory_format=CHANNELS_LAST)
    x = x.as_strided(x.shape, (32 * 32, 1, 32, 1))
    _, stats = run(cpu, conv_call(Operand(x), weight, Geometry((1, 1)), Epilogue("stats")))
    truth = REFERENCE.batch_stats(x.double(), 1)
    assert ((stats[:, 0].double() - truth[:, 0]) / truth[:, 0]).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("g", [Geometry((4, 4), (2, 2)), Geometry((3, 3))], ids=["k4 s2", "k3 s1"])
def test_statistics_of_a_constant_image(cpu: Kernels, g: Geometry, channels: int, dtype: torch.dtype) -> None:
    call = constant_call(g, (channels, 50), dtype)
    able = [(on, name) for on in (cpu, Kernels(*DIRECT), Kernels(*WINOGRAD)) for name in on.able(call)]
    assert able
    for on, name in able:
        # The outputs of a tile are other sums of the same products; 16 bits hide that.
        differ = name == "cpu winograd_4x4" and dtype == torch.float32
        check_constant(*run(on, call, name), name, 1e-6 if differ else 0.0)


def test_a_weight_may_lie_as_it_likes() -> None:
    cpu = Kernels("col2im", "image_side", "gemm")
    for name in ("wide, few pixels", "image", "logit"):
        case = block(name, torch.float32)
        expected = case.run(cpu)
        plain = case.weight.contiguous(memory_format=torch.contiguous_format)
        reversed_ = plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        apart = torch.zeros(*plain.shape, 2)[..., 0].copy_(plain)
        for case.weight in (plain, reversed_, apart):
            assert all(torch.equal(result, expected[op]) for op, result in case.run(cpu).items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["many channels", "deep", "one sample"])
def test_a_weight_that_is_not_packed(name: str, dtype: torch.dtype) -> None:
    """Its sums are in the order in which it lies, of what it is rounded to, and its gradient lies as PyTorch's."""
    cpu, case = Kernels("unpacked"), block(name, dtype)
    plain = case.weight.contiguous(memory_format=torch.contiguous_format)
    swapped = plain.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)  # another axis is the slowest
    for op in ("conv", "conv_transpose"):
        for case.weight in (plain.as_strided(plain.shape, (plain.stride(0), 1, 1, 1)), swapped, plain):
            results = [found[0] for found in case.three(cpu, op, STORE)]
            assert_as_accurate(*results, op, reduction=case.terms(op))
        case.weight = plain.float() * (1 + 2**-14 * (dtype != torch.float32))  # which is rounded away
        assert torch.equal(case.contract(cpu, op)[0], results[0])
    case.x, case.dy = case.x.contiguous(), case.dy.contiguous()
    found = run(cpu, case.calls()["weight_grad"])
    assert found.is_contiguous() and cpu.able(case.calls()["weight_grad"]) == ["cpu unpacked"]
    results = [each["weight_grad"] for each in (case.vanilla(), case.run(REFERENCE, wide=True))]
    assert_as_accurate(found, *results, "weight_grad", reduction=case.terms("weight_grad"))


def test_inputs_of_other_strides(cpu: Kernels) -> None:
    case = block("wide", torch.float32)
    expected = case.run(cpu)
    batch, channels, height, width = case.x.shape
    case.x = torch.zeros(batch, height, width, 2 * channels)[..., ::2].permute(0, 3, 1, 2).copy_(case.x)
    assert all(torch.equal(result, expected[op]) for op, result in case.run(cpu).items())
    case.x = case.x.contiguous()  # the weight says channels_last
    assert torch.equal(case.run(cpu)["conv"], expected["conv"])


@pytest.mark.parametrize("name", ["wide", "image", "projection", "one sample"])
def test_what_is_not_finite_stays_where_it_is(cpu: Kernels, name: str) -> None:
    case = block(name, torch.float32)
    case.x[-1, 1, 2, 3] = math.nan
    height, width = case.dy.shape[2:]
    case.dy[0, 0, height // 2, width // 2] = math.inf  # no tap reads padding there: PyTorch multiplies that with zeros
    got, expected = case.run(cpu), case.run(REFERENCE, wide=True)
    for op in got:
        assert torch.equal(got[op].isnan(), expected[op].isnan()), op
        assert torch.equal(got[op].isinf(), expected[op].isinf()), op


def test_denormal_numbers(cpu: Kernels) -> None:
    case = block("image", torch.float32)
    case.x *= 1e-39
    case.weight.copy_(case.weight.sign())
    for got, truth in zip(case.run(cpu).values(), case.run(REFERENCE, wide=True).values(), strict=True):
        assert (got.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("name", BLOCKS)
def test_same_bits_whatever_the_threads(cpu: Kernels, name: str) -> None:
    case = block(name, torch.float32)
    case.check_threads(cpu)


def test_what_can_not_run_goes_to_pytorch(cpu: Kernels) -> None:
    x, weight = random((2, 4, 8, 8), torch.float32, 1), torch.zeros(6, 4, 4, 4)

    def reason(x: Tensor, weight: Tensor, g: Geometry = K4) -> str | None:
        return why_not(cpu, conv_call(Operand(x), weight, g))

    assert reason(x, weight) is None
    assert "no groups, and here are 2" in (reason(x, weight[:, :2], Geometry((4, 4), groups=2)) or "")
    assert "not [0, 4, 8, 8]" in (reason(x[:0], weight) or "")
    assert "torch.float16" in (reason(x, weight.half()) or "")
    empty, stats = run(cpu, conv_call(Operand(x[:0]), weight, K4, Epilogue("stats")))
    assert empty.shape == (0, 6, 4, 4) and torch.equal(stats, torch.zeros(3, 1, 6))


def why_last(cpu: Kernels, call: Call) -> str | None:
    """Why the algorithms that can run a call are likely to be slower than PyTorch's own, or None."""
    reasons = [a.why_last(call) for a in cpu.algorithms(call.op) if a.why_not(call) is None]
    return None if None in reasons else reasons[-1]


def test_the_rule_where_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Kernels(*WINOGRAD, "col2im", "image_side", "gemm")
    cpu._processor_has_amx = False
    few = block("wide", torch.float32).calls()["conv"]
    assert why_last(cpu, few) is not None
    monkeypatch.setattr(cpu_backend, "FEW_PRODUCTS", 2**30)
    assert why_last(cpu, few) is None  # setting PyTorch's own up takes longer
    monkeypatch.setattr(cpu_backend, "FEW_PRODUCTS", 0)
    small, large = Case(32, 32, (8, 8), 8, K4, torch.float32), Case(1, 32, (32, 32), 8, K4, torch.float32)
    half, bf16 = Case(2, 32, (32, 32), 8, K4, torch.half), Case(2, 32, (32, 32), 8, K4, torch.bfloat16)
    for case, expected in [
        (block("wide", torch.float32), "faster for 3 times 16 pixels"),
        (block("projection", torch.float32), None),
        (block("logit", torch.float32), None),
        (block("image", torch.float32), None),
        (block("image", torch.bfloat16), None),
        (Case(2, 8, (16, 16), 64, K4, torch.bfloat16), "faster for 8 channels"),
        (Case(2, 3, (16, 16), 64, Geometry((10, 10)), torch.float32), "faster for 3 channels"),
        (Case(2, 3, (16, 16), 64, Geometry((1, 1)), torch.float32), "between 3 channels and one pixel"),
        (Case(2, 3, (4, 4), 64, Geometry((4, 4)), torch.bfloat16), "between 3 channels and one pixel"),
        (Case(2, 3, (16, 16), 7, K4, torch.float32), "between 3 and 7 channels"),
        (Case(2, 3, (16, 16), 7, K4, torch.bfloat16), None),
        (Case(2, 3, (16, 16), 7, Geometry((1, 1)), torch.float16), None),
        (small, None),
        (large, "as fast for 16x16 pixels"),
        (Case(2, 32, (32, 32), 16, K4, torch.float32), None),
        (half, None),
        (bf16, None),
    ]:
        why = why_last(cpu, case.calls()["conv"])
        assert why is None if expected is None else expected in (why or ""), why
    assert why_last(cpu, large.calls()["weight_grad"]) is None
    # Packing is most of the work for few pixels, and is done once where weights stay as they are.
    wide = block("wide", torch.float32)
    generating = Epilogue("bias", coef=torch.zeros(64))
    assert "3 times 16 pixels" in (why_last(cpu, wide.calls()["conv_transpose"]) or "")
    changes, stays = (wide.calls(generating)["conv_transpose"]._replace(stays=stays) for stays in (False, True))
    assert "3 times 16 pixels" in (why_last(cpu, changes) or "")
    assert why_last(cpu, stays) is None
    wide.x = wide.x[:1]
    assert "1 times 16 pixels" in (why_last(cpu, wide.calls(generating)["conv"]._replace(stays=True)) or "")
    assert why_last(cpu, block("image", torch.float32).calls()["conv_transpose"]) is None
    contiguous = copy.copy(block("wide", torch.float32))
    contiguous.x, contiguous.weight = contiguous.x.contiguous(), contiguous.weight.contiguous()
    assert "channels_last" in (why_last(cpu, contiguous.calls()["conv"]) or "")
    few = Case(1, 256, (4, 4), 512, K4, torch.float32)
    assert "packing" in (why_last(Kernels("unpacked"), few.calls()["conv"]._replace(stays=True)) or "")
    few.x, few.dy, few.weight = few.x.contiguous(), few.dy.contiguous(), few.weight.contiguous()
    assert {why_last(Kernels("unpacked"), call) for call in few.calls().values()} == {None}
    few.x = few.x.repeat(17, 1, 1, 1)
    assert "here are 68" in (why_not(Kernels("unpacked"), few.calls()["conv"]) or "")
    cpu._processor_has_amx = True
    assert "AMX" in (why_last(cpu, bf16.calls()["conv"]) or "")


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 4, 4)], ids=str)
def test_channels_last_is_what_pytorch_takes_for_it(shape: tuple[int, ...]) -> None:
    plain = torch.empty(shape)
    for x in (plain, plain.to(memory_format=CHANNELS_LAST), plain.contiguous(memory_format=CHANNELS_LAST)):
        # empty_like keeps the strides of a dense tensor; a permuted sum asks for the suggested format.
        if x.numel():
            weight = torch.empty(2, shape[1], 1, 1)
            out = torch.nn.functional.conv2d(x, weight)
            if out.shape[2] * out.shape[3] > 1:
                assert says_channels_last(x) == (not out.is_contiguous())


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
def test_whole_nets_run_in_channels_last(layout: torch.memory_format) -> None:
    """Contiguous images and weights: channels_last in between, and the output is contiguous as PyTorch's is."""
    net = nn.Sequential(
        nn.ConvTranspose2d(10, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh(),
        nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 4),
    ).to(memory_format=layout)  # fmt: skip
    for first, last, shape in [(0, 8, (32, 10, 1, 1)), (8, 14, (32, 3, 16, 16))]:
        vanilla = net[first:last]
        wide, ours = copy.deepcopy(vanilla).double(), fastdcgan.fuse(copy.deepcopy(vanilla))
        x = torch.randn(shape).contiguous(memory_format=layout)
        results = []
        for model in (ours, vanilla, wide):
            source = x.detach().clone().to(next(model.parameters()).dtype).requires_grad_()
            out = model(source)
            out.square().sum().backward()
            results.append([out, source.grad, *(p.grad for p in model.parameters())])
        got, expected = results[0][0], results[1][0]
        assert memory_format(got) == memory_format(expected)
        for i, (mine, theirs, truth) in enumerate(zip(*results, strict=True)):
            assert_as_accurate(mine, theirs, truth, f"result {i}", reduction=32 * 16 * 16)
        assert "PyTorch's convolution" not in fastdcgan.explain(ours, x)[1].why


def test_bad_calls(cpu: Kernels) -> None:
    op = torch.ops.fastdcgan_cpu
    x, weight = torch.zeros(2, 4, 8, 8), torch.zeros(6, 4, 4, 4)
    numbers = ((2, 2), (1, 1), (1, 1), (4, 4))
    with pytest.raises(ValueError, match="4 input channels"):
        op.conv(x, weight[:, :3], *numbers, None, 0, 0.0, 0, "gemm")
    with pytest.raises(TypeError, match="dtype Float, got Half"):
        op.conv(x, weight.half(), *numbers, None, 0, 0.0, 0, "gemm")
    with pytest.raises(TypeError, match="got Double"):
        op.conv(x.double(), weight.double(), *numbers, None, 0, 0.0, 0, "gemm")
    with pytest.raises(ValueError, match="can't have 3 statistics groups"):
        op.conv(x, weight, *numbers, None, 0, 0.0, 3, "gemm")
    with pytest.raises(ValueError, match=r"expected a bias \[6\]"):
        op.conv(x, weight, *numbers, torch.zeros(5), 0, 0.0, 0, "gemm")
    with pytest.raises(ValueError, match="unknown activation id 99"):
        op.conv(x, weight, *numbers, None, 99, 0.0, 0, "gemm")
    with pytest.raises(ValueError, match="make no output"):
        op.conv(x, weight, (0, 2), (1, 1), (1, 1), (4, 4), None, 0, 0.0, 0, "gemm")
    with pytest.raises(ValueError, match="with elements"):
        op.conv(x[:0], weight, *numbers, None, 0, 0.0, 0, "gemm")
    with pytest.raises(ValueError, match="one batch size, got 2 and 1"):
        op.weight_grad(x, torch.zeros(1, 6, 4, 4), (4, 4), (2, 2), (1, 1), (1, 1), "gemm")


def test_algorithms_that_can_not_run() -> None:
    op, x = torch.ops.fastdcgan_cpu, torch.zeros(2, 4, 8, 8)
    for kernel, stride, dilation in [((3, 3), (2, 2), (1, 1)), ((6, 6), (3, 3), (1, 1)), ((4, 4), (2, 2), (1, 2))]:
        size = Geometry(kernel, stride, (1, 1), dilation).conv_size(8, 8)
        for name in WINOGRAD:
            assert name not in op.algorithms("conv", 4, 6, kernel, stride, dilation, torch.float32, False)
            with pytest.raises(ValueError, match=rf"no algorithm '{name}' .*; there are: image_side, gemm"):
                op.conv(x, torch.zeros(6, 4, *kernel), stride, (1, 1), dilation, size, None, 0, 0.0, 0, name)
            with pytest.raises(ValueError, match=f"no algorithm '{name}'"):
                op.weight_grad(x, torch.zeros(2, 6, *size), kernel, stride, (1, 1), dilation, name)
    numbers = ((4, 4), (2, 2), (1, 1))
    assert op.algorithms("conv", 64, 64, *numbers, torch.float16, False) == ["gemm", "unpacked", *WINOGRAD]
    assert op.algorithms("conv_transpose", 64, 3, *numbers, torch.float16, False)[0] == "col2im"
    assert op.algorithms("conv_transpose", 64, 3, *numbers, torch.float16, True)[0] == "gemm"
    assert op.algorithms("weight_grad", 3, 64, *numbers, torch.float16, False)[0] == "image_side"
    with pytest.raises(ValueError, match="expected 'conv', 'conv_transpose' or 'weight_grad', got 'convolve'"):
        op.algorithms("convolve", 3, 64, *numbers, torch.float16, False)


def test_avx2() -> None:
    """The same tests on the library for an older processor."""
    tests = ["blocks", "drawn", "statistics", "activated", "same_bits", "what_is_not", "a_weight"]
    run_capped(__file__, "avx2", " or ".join(f"test_{name}" for name in tests))
