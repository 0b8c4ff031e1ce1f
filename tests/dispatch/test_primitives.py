"""The primitives on every backend that is here, in every prologue and epilogue form, against plain float64 formulas."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdcgan
from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.cpu import CPUBackend
from fastdcgan.backends.cuda import CUDABackend
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.backends.triton import TritonBackend
from fastdcgan.dispatch import primitives
from fastdcgan.geometry import Geometry
from fastdcgan.spec import STORE, Epilogue, Operand, Update
from tests.helpers import formulas
from tests.helpers.tolerance import assert_as_accurate, assert_same_float64
from tests.machine import DEVICE, backends_here

N = 4
PLAIN = Geometry((4, 4), (2, 2), (1, 1))
GEOMETRIES = {
    "dcgan": PLAIN,
    "one_pixel": Geometry((4, 4)),
    "uneven": Geometry((3, 2), (2, 1), (1, 0), (1, 2), 2),
}
OPERANDS = ["tensor", "activate", "gradient_bn", "gradient_act"]
EPILOGUES = ["none", "bias", "activate", "stats", "grad_stats_bn", "grad_stats_act"]
FORMS = [*itertools.product(OPERANDS, ["none"]), *itertools.product(["tensor"], EPILOGUES[1:])]
ACT, SLOPE = "leaky_relu", 0.2


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def coef_of(rows: int, groups: int, channels: int, dtype: torch.dtype) -> Tensor:
    vectors = 0.5 * random(rows, groups, channels, seed=3)
    if rows == 4:
        vectors[3] = vectors[3].abs() + 0.5
    return vectors.to(torch.float64 if dtype == torch.float64 else torch.float32)


def make_operand(form: str, shape: tuple[int, ...], dtype: torch.dtype, groups: int) -> Operand:
    x = random(*shape, dtype=dtype)
    if form == "tensor":
        return Operand(x)
    if form == "activate":
        return Operand(x, None, coef_of(4, groups, shape[1], dtype), ACT, SLOPE)
    rows = 4 if form == "gradient_bn" else 2
    return Operand(x, random(*shape, dtype=dtype, seed=1), coef_of(rows, groups, shape[1], dtype), ACT, SLOPE)


def make_epilogue(form: str, shape: tuple[int, ...], dtype: torch.dtype, groups: int) -> Epilogue:
    if form in ("none", "stats"):
        return Epilogue(form, stat_groups=groups if form == "stats" else 1)
    if form == "bias":
        return Epilogue("bias", coef=random(shape[1], dtype=dtype))
    if form == "activate":
        return Epilogue("activate", None, coef_of(4, groups, shape[1], dtype), ACT, SLOPE)
    y = random(*shape, dtype=dtype, seed=2)
    rows = 4 if form == "grad_stats_bn" else 2
    return Epilogue("grad_stats", y, coef_of(rows, groups, shape[1], dtype), ACT, SLOPE, groups)


class Case:
    """One contraction with its operands; `run` is the primitive, `formula` the float64 formula."""

    def __init__(
        self,
        op: str,
        geometry: Geometry,
        operand: str,
        epilogue: str,
        groups: int,
        dtype: torch.dtype,
        layout: Callable,
    ) -> None:
        g, ci, co = geometry, 4, 6
        self.op, self.g = op, g
        big, small = (N, ci, 8, 7), (N, co, *g.conv_size(8, 7))
        if op == "weight_grad":
            self.a = self.laid_out(make_operand(operand, big, dtype, groups), layout)
            self.b = self.laid_out(make_operand(epilogue, small, dtype, groups), layout)
            return
        self.weight = layout(random(co, ci // g.groups, *g.kernel, dtype=dtype))
        source, self.out = (big, small) if op == "conv" else (small, big)
        self.a = self.laid_out(make_operand(operand, source, dtype, groups), layout)
        e = make_epilogue(epilogue, self.out, dtype, groups)
        self.e = e if e.y is None else e._replace(y=layout(e.y))

    @staticmethod
    def laid_out(a: Operand, layout: Callable) -> Operand:
        return a._replace(x=layout(a.x), y=None if a.y is None else layout(a.y))

    def run(self, backend: str) -> tuple[Tensor, ...]:
        if self.op == "conv":
            return primitives.conv(self.a, self.weight, self.g, self.e, backend)
        if self.op == "conv_transpose":
            return primitives.conv_transpose(self.a, self.weight, self.g, (self.out[2], self.out[3]), self.e, backend)
        return (primitives.weight_grad(self.a, self.b, self.g, backend),)

    def formula(self) -> tuple[Tensor, ...]:
        a = formulas.finished(self.a)
        if self.op == "weight_grad":
            return (formulas.weight_grad(a, formulas.finished(self.b), self.g),)
        weight = self.weight.double()
        if self.op == "conv":
            return formulas.epilogue(formulas.conv(a, weight, self.g), self.e)
        out = formulas.conv_transpose(a, weight, self.g, (self.out[2], self.out[3]))
        return formulas.epilogue(out, self.e)

    @property
    def reduction(self) -> int:
        if self.op == "weight_grad":
            return N * 8 * 7
        return max(self.weight.shape[:2]) * self.g.kernel[0] * self.g.kernel[1] * N * 8 * 7  # the sums: over pixels too


@pytest.mark.parametrize("name", backends.NAMES)
def test_each_backend_is_tested_or_says_why_not(name: str) -> None:
    reason = backends.reasons(DEVICE.type, torch.float32)[name]
    if reason is not None:
        pytest.skip(f"backend {name!r}: {reason}")
    assert name in backends_here()


def contraction_cases() -> list[tuple[str, str, str]]:
    shifted = [(op, a, e) for op in ("conv", "conv_transpose") for a in OPERANDS for e in EPILOGUES]
    return shifted + [("weight_grad", a, b) for a in OPERANDS for b in OPERANDS]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("op", "operand", "epilogue"), contraction_cases())
def test_contraction_is_the_formula(op: str, operand: str, epilogue: str, groups: int, backend: str) -> None:
    for dtype in dtypes_of(backend):
        for geometry, layout in itertools.product(GEOMETRIES.values(), (torch.Tensor.contiguous, channels_last)):
            if geometry is not PLAIN and layout is channels_last:
                continue
            case = Case(op, geometry, operand, epilogue, groups, dtype, layout)
            check_accuracy(case.run(backend), case.run("reference"), case.formula(), dtype, case.reduction)


def dtypes_of(backend: str) -> list[torch.dtype]:
    """The reference is proved in float64 here (and against vanilla modules in all dtypes), the others in their own."""
    dtypes = [torch.float64] if backend == "reference" else [torch.float64, torch.float32, torch.bfloat16]
    return [dtype for dtype in dtypes if backend in backends_here(dtype)]


def check_accuracy(
    got: tuple[Tensor, ...],
    reference: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
    dtype: torch.dtype,
    reduction: int,
) -> None:
    """float64 agrees with the formula; other dtypes err at most twice as much as PyTorch's kernels in that dtype."""
    for i, (found, usual, right) in enumerate(zip(got, reference, truth, strict=True)):
        if dtype == torch.float64:
            assert_same_float64(found, right, f"result {i}", 1e-12)
        else:
            # Sums are judged by the rounding of the values they are taken over.
            found, usual = (v.to(dtype) if i else v for v in (found, usual))
            assert_as_accurate(found, usual, right, f"result {i}", reduction=reduction)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_norm_act_and_its_reduction_are_the_formulas(act: str, groups: int, backend: str) -> None:
    slope = ACTIVATIONS[act].default_slope
    for dtype in dtypes_of(backend):
        for layout in (torch.Tensor.contiguous, channels_last):
            y, da = (layout(random(N, 5, 7, 3, dtype=dtype, seed=seed)) for seed in (0, 9))
            for rows, a in itertools.product((2, 4), ("activate", "gradient")):
                coef = coef_of(rows, groups, 5, dtype)
                operand = Operand(y, None, coef, act, slope) if a == "activate" else Operand(da, y, coef, act, slope)
                got, usual = primitives.norm_act(operand, backend), primitives.norm_act(operand, "reference")
                assert got.stride() == y.stride()
                check_accuracy((got,), (usual,), (formulas.finished(operand),), dtype, 1)
                arguments = (da, y, coef, act, slope)
                found = (
                    primitives.norm_act_reduce(*arguments, backend),
                    primitives.norm_act_reduce(*arguments, "reference"),
                )
                g = formulas.masked_gradient(*arguments)
                check_accuracy(
                    (found[0],),
                    (found[1],),
                    (formulas.sums(g, y, coef),),
                    torch.float64 if dtype == torch.float64 else torch.float32,
                    N * 21,
                )


@pytest.mark.parametrize(
    "given", [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
def test_coefficients_are_the_formulas(given: tuple[bool, ...], backend: str) -> None:
    eps = 1e-3
    mean, var = random(2, 6), random(2, 6, seed=5).abs() + 0.1
    weight, bias, shift = (random(6, seed=i) if there else None for i, there in enumerate(given))
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        if backend not in backends_here(dtype):
            continue
        arguments = [None if v is None else v.to(dtype) for v in (mean, var, weight, bias, shift)]
        s, t, m, r = primitives.coefficients(*arguments, eps, backend)  # type: ignore[misc]
        assert r.dtype == dtype
        y = random(2, 6, seed=8)
        expected = (y + (0 if shift is None else shift) - mean) / (var + eps).sqrt()
        assert_close(r * (y - m), expected, tolerance)
        z = expected * (1 if weight is None else weight) + (0 if bias is None else bias)
        assert_close(s * y + t, z, tolerance)


def test_grad_coefficients_are_the_gradient_of_a_normalisation(backend: str) -> None:
    eps, groups = 1e-5, 2
    y, da = random(N, 5, 4, 3).requires_grad_(), random(N, 5, 4, 3, seed=4)
    weight = random(5, seed=6)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        if backend not in backends_here(dtype):
            continue
        halves = [torch.nn.functional.batch_norm(h, None, None, weight, None, True, 0.0, eps) for h in y.chunk(groups)]
        expected = torch.autograd.grad(torch.cat(halves), y, da)[0]
        stats = formulas.stats(y.detach(), groups).to(dtype)
        coef = primitives.coefficients(stats[0], stats[1], weight.to(dtype), None, None, eps, backend)
        sums = formulas.sums(da, y.detach(), coef).to(dtype)
        grad_coef = primitives.grad_coefficients(sums, coef, y.numel() // 5 // groups, backend)
        assert grad_coef.shape == (4, groups, 5)
        assert_close(formulas.finished(Operand(da, y.detach(), grad_coef)), expected, tolerance)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_several_primitives_in_one_are_what_they_are_made_of(layout: Callable, watched: bool, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        if backend not in backends_here(dtype):
            continue
        y, da = (layout(random(N, 5, 4, 3, dtype=dtype, seed=seed)) for seed in (0, 1))
        weight, bias, stats = random(5, dtype=dtype, seed=2), random(5, dtype=dtype, seed=3), coef_of(3, 2, 5, dtype)
        stats[1:].abs_()
        running = [
            [random(5, dtype=dtype, seed=seed), random(5, dtype=dtype, seed=seed).abs()] for seed in (4, 4, 5, 5)
        ]
        shift = random(5, dtype=dtype, seed=6)

        coef = primitives.coefficients(stats[0], stats[1], weight, bias, None, 1e-3, backend)
        a = primitives.norm_act(Operand(y, None, coef, ACT, SLOPE), backend)
        sums = primitives.norm_act_reduce(da, y, coef, ACT, SLOPE, backend)
        dy = primitives.norm_act(
            Operand(da, y, primitives.grad_coefficients(sums, coef, 24, backend), ACT, SLOPE), backend
        )
        primitives.update_running(*running[0], stats, None, None, 0.1, backend)
        primitives.update_running(*running[2], stats, shift, None, 0.2, backend)
        one = torch.ones(5, device=DEVICE, dtype=coef.dtype)
        runs = primitives.Registered(backend) if watched else backends.get(backend)
        found_a, found_coef = runs.normalize(y, stats, weight, bias, 1e-3, ACT, SLOPE)
        found_dy, found_sums = runs.normalize_backward(da, y, coef, 24, ACT, SLOPE)
        updates = [Update(*running[1], stats, None, None, 0.1), Update(*running[3], stats, shift, None, 0.2)]
        runs.update_all_running(updates)
        plain, shifted = (runs.bias_coefficients(y, b, 5) for b in (None, bias))
        for found, expected in (
            (found_a, a),
            (found_coef, coef),
            (found_dy, dy),
            (found_sums, sums),
            (torch.stack(running[1]), torch.stack(running[0])),
            (torch.stack(running[3]), torch.stack(running[2])),
            (plain, torch.stack([one, 0 * one])[:, None]),
            (shifted, torch.stack([one, bias.to(coef.dtype)])[:, None]),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            assert found.stride() == expected.stride()


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", ["conv", "weight_grad"])
def test_padding_of_an_activated_operand_is_zero(op: str, backend: str) -> None:
    """act(0*s + t) is not 0: a prologue must leave the padding alone."""
    coef = torch.stack([torch.ones(1, 3), torch.full((1, 3), 5.0)]).to(DEVICE)
    a = Operand(torch.zeros(2, 3, 4, 4, device=DEVICE), None, coef, "relu", 0.0)
    g = Geometry((3, 3), (1, 1), (1, 1))
    ones = torch.ones(2, 1, 4, 4, device=DEVICE)
    if op == "conv":
        out = primitives.conv(a, torch.ones(1, 3, 3, 3, device=DEVICE), g, STORE, backend)[0]
        assert out[0, 0].tolist() == [[60, 90, 90, 60], [90, 135, 135, 90], [90, 135, 135, 90], [60, 90, 90, 60]]
    else:
        out = primitives.weight_grad(a, Operand(ones), g, backend)
        assert out[0, 0].tolist() == [[90, 120, 90], [120, 160, 120], [90, 120, 90]]


@pytest.mark.parametrize(("op", "operand", "epilogue"), contraction_cases()[::3])
def test_two_runs_give_the_same_bits(op: str, operand: str, epilogue: str, backend: str) -> None:
    case = Case(op, PLAIN, operand, epilogue, 2, torch.float32, channels_last)
    for first, second in zip(case.run(backend), case.run(backend), strict=True):
        assert torch.equal(first, second)


def strided(x: Tensor) -> Tensor:
    """The same values, in every second column of a wider tensor."""
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


def permuted(x: Tensor) -> Tensor:
    """The same values, laid out as [H, W, N, C]."""
    return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


@pytest.mark.parametrize("layout", [strided, permuted])
@pytest.mark.parametrize(("op", "operand", "epilogue"), contraction_cases()[::4])
def test_any_strides_are_taken(op: str, operand: str, epilogue: str, layout: Callable, backend: str) -> None:
    usual = Case(op, PLAIN, operand, epilogue, 2, torch.float32, torch.Tensor.contiguous).run(backend)
    case = Case(op, PLAIN, operand, epilogue, 2, torch.float32, layout)
    check_accuracy(case.run(backend), usual, case.formula(), torch.float32, case.reduction)


def test_an_expanded_gradient_is_taken(backend: str) -> None:
    y, coef = random(N, 5, 4, 3, dtype=torch.float32), coef_of(4, 1, 5, torch.float32)
    for da in (
        random(1, dtype=torch.float32).expand(N, 5, 4, 3),
        random(5, 1, 1, dtype=torch.float32).expand(N, 5, 4, 3),
    ):
        for operand in (Operand(da, y, coef, ACT, SLOPE), Operand(da.contiguous(), channels_last(y), coef, ACT, SLOPE)):
            torch.testing.assert_close(
                primitives.norm_act(operand, backend).double(), formulas.finished(operand), rtol=1e-5, atol=1e-5
            )
            found = primitives.norm_act_reduce(operand.x, operand.y, coef, ACT, SLOPE, backend)  # type: ignore[arg-type]
            g = formulas.masked_gradient(da, y, coef, ACT, SLOPE)
            torch.testing.assert_close(found.double(), formulas.sums(g, y, coef), rtol=1e-5, atol=1e-4)


# --- torch.library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "operand", "epilogue"),
    [("conv", *f) for f in FORMS] + [("conv_transpose", *f) for f in FORMS] + [("weight_grad", f, f) for f in OPERANDS],
)
def test_opcheck_of_a_contraction(
    op: str, operand: str, epilogue: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layout in (torch.Tensor.contiguous, channels_last):
        case = Case(op, GEOMETRIES["uneven"], operand, epilogue, 2, torch.float32, layout)
        if case.a.y is not None and layout is channels_last:
            case.a = case.a._replace(x=case.a.x.contiguous())  # a gradient may come in any format
        opcheck_of(op, lambda: case.run(backend), monkeypatch, compiled=layout is channels_last)  # noqa: B023


def opcheck_of(op: str, call: Callable, monkeypatch: pytest.MonkeyPatch, compiled: bool = True) -> None:
    """opcheck on the arguments that `call` gives to the primitive `op`."""
    seen: list[tuple] = []
    overload = getattr(torch.ops.fastdcgan, op).default
    with monkeypatch.context() as patch:
        patch.setattr(primitives, "unwatched", lambda *tensors: False)
        patch.setattr(torch.ops.fastdcgan, op, lambda *args: seen.append(args) or overload(*args))
        call()
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(overload, seen[0], test_utils=[*checks, "test_aot_dispatch_dynamic"] if compiled else checks)


def test_opcheck_of_the_others(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y, da = random(N, 5, 4, 3, dtype=torch.float32), random(N, 5, 4, 3, dtype=torch.float32, seed=1)
    coef, two = coef_of(4, 2, 5, torch.float32), coef_of(2, 1, 5, torch.float32)
    mean, var, stats = random(5, dtype=torch.float32), torch.ones(5, device=DEVICE), coef_of(3, 2, 5, torch.float32)
    calls: list[tuple[str, Callable]] = [
        ("norm_act", lambda: primitives.norm_act(Operand(y, None, coef, ACT, SLOPE), backend)),
        ("norm_act", lambda: primitives.norm_act(Operand(da, channels_last(y), coef, ACT, SLOPE), backend)),
        ("norm_act", lambda: primitives.norm_act(Operand(da, y, two, ACT, SLOPE), backend)),
        ("batch_stats", lambda: primitives.batch_stats(channels_last(y), N, backend)),
        ("norm_act_reduce", lambda: primitives.norm_act_reduce(da, y, coef, ACT, SLOPE, backend)),
        ("norm_act_reduce", lambda: primitives.norm_act_reduce(da, y, two, ACT, SLOPE, backend)),
        ("coefficients", lambda: primitives.coefficients(stats[0], stats[1].abs(), mean, var, None, 1e-5, backend)),
        ("coefficients", lambda: primitives.coefficients(stats[0], stats[1].abs(), None, None, mean, 1e-5, backend)),
        ("grad_coefficients", lambda: primitives.grad_coefficients(stats[:2], coef, 24, backend)),
        ("update_running", lambda: primitives.update_running(mean, var, stats, None, None, 0.1, backend)),
        (
            "update_running",
            lambda: primitives.update_running(mean, var, stats, da[0, :, 0, 0], stats[0, :, 0], 0.1, backend),
        ),
    ]
    for op, call in calls:
        opcheck_of(op, call, monkeypatch)


ONES = st.tuples(*[st.sampled_from((1, 2, 3))] * 4)
LAYOUTS = st.sampled_from(("contiguous", "channels_last", "permuted"))


def laid(layout: str, *shape: int, seed: int) -> Tensor:
    x = random(*shape, dtype=torch.float32, seed=seed)
    if layout == "permuted":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x if layout == "contiguous" else channels_last(x)


@given(shape=ONES, kernel=st.sampled_from((1, 3)), features=st.sampled_from((1, 2)), layouts=st.tuples(*[LAYOUTS] * 3))
@settings(max_examples=60)
def test_fakes_have_the_strides_of_what_runs(
    shape: tuple[int, ...], kernel: int, features: int, layouts: tuple[str, ...], backend: str
) -> None:
    g = Geometry((kernel, kernel), (1, 1), (kernel // 2, kernel // 2))
    x, weight = laid(layouts[0], *shape, seed=1), laid(layouts[1], features, shape[1], kernel, kernel, seed=2)
    y, coef = laid(layouts[2], shape[0], features, *shape[2:], seed=3), coef_of(4, 1, features, torch.float32)

    def results(x: Tensor, weight: Tensor, y: Tensor, coef: Tensor) -> list[Tensor]:
        contractions = [
            *primitives.conv(Operand(x), weight, g, Epilogue("stats"), backend),
            *primitives.conv_transpose(
                Operand(y, None, coef, ACT, SLOPE), weight, g, (x.shape[2], x.shape[3]), STORE, backend
            ),
            primitives.weight_grad(Operand(x), Operand(y), g, backend),
        ]
        passes = [Operand(y, None, coef, ACT, SLOPE), Operand(y.clone(), y, coef, ACT, SLOPE)]
        return [*contractions, *(primitives.norm_act(a, backend) for a in passes)]

    with FakeTensorMode() as mode:
        fakes = results(*map(mode.from_tensor, (x, weight, y, coef)))
    for fake, real in zip(fakes, results(x, weight, y, coef), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_an_unknown_backend_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cudnn': expected 'auto' or one of 'cuda'"):
        primitives.conv(Operand(random(1, 1, 4, 4)), random(1, 1, 4, 4), PLAIN, STORE, "cudnn")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"), fastdcgan.backend("gpu"):
        pass


def test_a_backend_takes_what_an_operator_declares() -> None:
    names = ("norm_act", "batch_stats", "norm_act_reduce", "coefficients", "grad_coefficients", "update_running")
    for name in names:
        declared = [
            p.replace(annotation=None) for p in inspect.signature(getattr(primitives, name)).parameters.values()
        ]
        assert declared.pop().name == "backend"
        for kind in (ReferenceBackend, CPUBackend, CUDABackend, TritonBackend, primitives.Registered):
            found = list(inspect.signature(getattr(kind, name)).parameters.values())[1:]
            assert [p.replace(annotation=None) for p in found] == declared, f"{kind.__name__}.{name}"
