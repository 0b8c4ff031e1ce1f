"""The operators of the CUDA contractions on CPU tensors, as `backend("cuda")` calls them, against the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cuda_facts, cuda_tiles
from fastdcgan.backends.cuda_tiles import Choice, Device, Problem
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.geometry import Geometry
from fastdcgan.spec import STORE, Call, Epilogue, Operand, Unavailable
from tests.cuda_on_cpu.host_library import ORDERS, HostCUDABackend, set_order
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.helpers.contractions import check_constant, constant_call, conv_call, run, why_not, wide
from tests.helpers.elementwise import coefficients
from tests.helpers.tolerance import assert_as_accurate

pytestmark = needs_compiler

REFERENCE = ReferenceBackend()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROLOGUES = ("none", "activate", "bn_backward")
EPILOGUES = ("none", "bias", "activate", "stats", "grad_stats")
# (geometry, input size, output padding of conv_transpose)
GEOMETRIES = {
    "k4s2p1": (Geometry((4, 4), (2, 2), (1, 1)), (4, 6), (0, 0)),
    "k3s1p1": (Geometry((3, 3), (1, 1), (1, 1)), (5, 4), (0, 0)),
    "k5s2p2": (Geometry((5, 5), (2, 2), (2, 2)), (5, 6), (1, 1)),
    "dilated": (Geometry((3, 2), (1, 3), (2, 1), (2, 1)), (5, 7), (0, 0)),
}


@pytest.fixture(scope="module")
def cuda() -> HostCUDABackend:
    backend = HostCUDABackend()
    backend.require()
    return backend


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0, last: bool = True) -> Tensor:
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def operand(kind: str, x: Tensor, groups: int, rows: int, act: str) -> Operand:
    if kind == "none":
        return Operand(x)
    y = normal(*x.shape, seed=7, dtype=x.dtype) if kind == "bn_backward" else None
    return Operand(x, y, coefficients(rows, groups, x.shape[1]), act, ACTIVATIONS[act].default_slope)


def epilogue(kind: str, out: tuple[int, ...], groups: int, rows: int, act: str, dtype: torch.dtype) -> Epilogue:
    slope = ACTIVATIONS[act].default_slope
    if kind == "none":
        return STORE
    if kind == "bias":
        return Epilogue("bias", coef=normal(1, out[1], 1, 1, seed=3, dtype=dtype).flatten())
    if kind == "stats":
        return Epilogue("stats", stat_groups=groups)
    y = normal(*out, seed=8, dtype=dtype) if kind == "grad_stats" else None
    return Epilogue(kind, y, coefficients(rows, groups, out[1]), act, slope)


def check(
    cuda: HostCUDABackend,
    op: str,
    kinds: tuple[str, str],
    geometry: Geometry,
    size: tuple[int, int],
    dtype: torch.dtype,
    channels: tuple[int, int] = (40, 24),
    extra: tuple[int, int] = (0, 0),
    groups: int = 1,
    rows: int = 4,
    act: str = "leaky_relu",
    batch: int = 2,
    last: bool = True,
) -> None:
    """`kinds`: prologue and epilogue; of weight_grad the prologues of both operands."""
    ci, co = channels
    out = geometry.conv_transpose_size(*size, extra) if op == "conv_transpose" else geometry.conv_size(*size)
    n = groups * batch
    a = operand(kinds[0], normal(n, ci, *size, seed=1, dtype=dtype, last=last), groups, rows, act)
    if op == "weight_grad":
        linear = operand(kinds[1], normal(n, co, *out, seed=2, dtype=dtype, last=last), groups, rows, act)
        call = Call(op, a, linear, geometry, geometry.kernel)
        terms = n * math.prod(out)
    else:
        terms = ci * math.prod(geometry.kernel)
        shape = (ci, co) if op == "conv_transpose" else (co, ci)
        weight = normal(*shape, *geometry.kernel, seed=2, dtype=dtype, scale=terms**-0.5, last=last)
        e = epilogue(kinds[1], (n, co, *out), groups, rows, act, dtype)
        call = Call(op, a, weight, geometry, out, e)
    found = run(cuda, call, "cuda")
    if op == "weight_grad":
        # Operands rounded as they are stored; PyTorch's own in 16 bits leaves values unwritten on some CPUs.
        a, linear = (Operand(REFERENCE.finished(v).float()) for v in (call.a, call.b))
        vanilla = run(REFERENCE, call._replace(a=a, b=linear)).to(dtype)
    else:
        vanilla = run(REFERENCE, call)
    truth = run(REFERENCE, wide(call))
    if op == "weight_grad":
        found, vanilla, truth = (found,), (vanilla,), (truth,)
    assert found[0].dtype == dtype and found[0].shape == vanilla[0].shape
    assert_as_accurate(found[0], vanilla[0], truth[0], f"output of {op}", reduction=terms)
    if len(truth) == 1:
        return
    assert found[1].shape == truth[1].shape
    if found[1].numel():
        size_of_values = float(truth[0].square().mean().sqrt())
        of_sums = size_of_values * math.sqrt(truth[0][:, 0].numel() / groups)
        scales = (size_of_values, size_of_values**2, size_of_values**2) if kinds[1] == "stats" else (of_sums, of_sums)
        for got, usual, true, scale in zip(found[1], vanilla[1], truth[1], scales, strict=False):
            assert_as_accurate(got, usual, true, kinds[1], reduction=terms, scale=scale)


@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
def test_prologues_and_epilogues(cuda: HostCUDABackend, op: str) -> None:
    pairs = itertools.product(PROLOGUES, EPILOGUES)
    for i, kinds in enumerate(pairs):
        geometry, size, extra = list(GEOMETRIES.values())[i % 4]
        groups, rows = 1 + i % 2, (4, 2)[i // 2 % 2]
        extra = extra if op == "conv_transpose" else (0, 0)
        check(cuda, op, kinds, geometry, size, DTYPES[i % 3], extra=extra, groups=groups, rows=rows)


def test_prologues_of_weight_grad(cuda: HostCUDABackend) -> None:
    for i, kinds in enumerate(itertools.product(PROLOGUES, PROLOGUES)):
        geometry, size, _ = list(GEOMETRIES.values())[i % 4]
        check(cuda, "weight_grad", kinds, geometry, size, DTYPES[i % 3], groups=1 + i % 2)


@pytest.mark.parametrize("kind", EPILOGUES)
def test_kernels_as_large_as_their_image(cuda: HostCUDABackend, kind: str) -> None:
    for prologue, groups in (("none", 1), ("activate", 2)):
        check(cuda, "conv", (prologue, kind), Geometry((4, 3)), (4, 3), torch.float32, (8, 12), groups=groups)
        check(cuda, "conv_transpose", (prologue, kind), Geometry((4, 3)), (1, 1), torch.float32, (12, 8), groups=groups)
    check(cuda, "weight_grad", ("activate", "bn_backward"), Geometry((4, 3)), (4, 3), torch.float32, (8, 12))


@settings(max_examples=30)
@given(
    op=st.sampled_from(["conv", "conv_transpose", "weight_grad"]),
    name=st.sampled_from(sorted(GEOMETRIES)),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(list(ACTIVATIONS)),
    last=st.booleans(),
)
def test_any_size(
    cuda: HostCUDABackend, op: str, name: str, size: tuple, channels: tuple, dtype: torch.dtype, act: str, last: bool
) -> None:
    geometry = GEOMETRIES[name][0]
    out = geometry.conv_transpose_size(*size) if op == "conv_transpose" else geometry.conv_size(*size)
    assume(min(out) > 0)
    kinds = ("activate", "bn_backward") if op == "weight_grad" else ("activate", "bias")
    check(cuda, op, kinds, geometry, size, dtype, channels, act=act, last=last)


@pytest.mark.parametrize("op", ["conv", "conv_transpose", "weight_grad"])
def test_sm90_tiles(cuda: HostCUDABackend, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has them: what TMA can copy runs on them, with the rule's parts."""
    asked = []

    def choose(problem: Problem, device: Device) -> Choice:
        asked.append(problem.tma_tiles > 0)
        return Choice(8, 2) if asked[-1] else Choice(0, 1)

    monkeypatch.setattr(cuda_tiles, "choose", choose)
    geometry = GEOMETRIES["k4s2p1"][0]
    with_sums = [("none", "stats"), ("bn_backward", "grad_stats")]
    kinds = [("none", "none"), ("activate", "bn_backward")] if op == "weight_grad" else with_sums
    for kind in kinds:
        check(cuda, op, kind, geometry, (8, 8), torch.bfloat16, channels=(64, 24), groups=2)
    assert all(asked) and len(asked) == len(kinds)
    check(cuda, op, ("activate", "none"), geometry, (8, 8), torch.bfloat16, channels=(64, 24), act="tanh")
    assert asked[-1] == (op == "weight_grad")  # others have prologues in registers, without smooth activations


def test_the_same_bits_in_every_order_of_threads_and_with_parts(cuda: HostCUDABackend) -> None:
    geometry, size, _ = GEOMETRIES["k4s2p1"]
    x, w = normal(4, 40, *size, seed=1, dtype=torch.bfloat16), normal(24, 40, 4, 4, seed=2, dtype=torch.bfloat16)
    tile = Choice(0, 3)
    try:
        found = []
        for order in ORDERS:
            set_order(order)
            stats = Epilogue("stats", stat_groups=2)
            found.append(run(cuda, conv_call(Operand(x), w, geometry, stats), "cuda", tile))
    finally:
        set_order("forward")
    for out, vectors in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(vectors, found[0][1])


def test_what_can_not_run_has_a_reason(cuda: HostCUDABackend) -> None:
    def reason(*args: Any) -> str:
        return str(why_not(cuda, conv_call(*args), "cuda"))

    x, w, g = torch.randn(2, 24, 4, 4), torch.randn(24, 24, 3, 3), Geometry((3, 3))
    assert "2 groups" in reason(Operand(x), torch.randn(24, 12, 3, 3), Geometry((3, 3), groups=2))
    assert "several dtypes" in reason(Operand(x), w.bfloat16(), g)
    assert "no element" in reason(Operand(x[:0]), w, g)
    a = Operand(x, None, coefficients(2, 2, 24), "relu")
    assert "statistics groups" in reason(a, w, g, Epilogue("stats", stat_groups=3))
    assert reason(a, w, g, Epilogue("stats", stat_groups=2)) == "None"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(3, 24), (40, 24)], ids=str)
def test_statistics_of_a_constant_image(cuda: HostCUDABackend, channels: tuple[int, int], dtype: torch.dtype) -> None:
    call = constant_call(Geometry((4, 4), (2, 2)), channels, dtype)
    for name in [a.name for a in cuda.algorithms("conv") if a.why_not(call) is None]:
        check_constant(*run(cuda, call, name), name)


@pytest.mark.parametrize("name", ["tiles", "sm90_tiles", "epilogues", "image_side_limits", "adam_chunk"])
def test_a_library_of_other_kernels_is_refused(
    cuda: HostCUDABackend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cuda_facts.require_agreement(cuda.ops)
    known = cuda_facts.known()
    monkeypatch.setattr(cuda_facts, "known", lambda: known | {name: [1]})
    with pytest.raises(Unavailable, match=rf"its {name} are .*, not \[1\]; build it again"):
        cuda_facts.require_agreement(cuda.ops)


def test_operators_check_what_they_get(cuda: HostCUDABackend) -> None:
    x, w = torch.randn(2, 24, 4, 4), torch.randn(24, 24, 3, 3)
    good = {
        "x": x, "y": None, "coef": None, "act": 0, "slope": 0.0, "weight": w, "transposed": False, "stride": [1, 1],
        "padding": [1, 1], "dilation": [1, 1], "output_size": [4, 4], "e_kind": 0, "e_y": None, "e_coef": None,
        "e_act": 0, "e_slope": 0.0, "groups": 1, "stat_groups": 1, "fold": 1, "tile": 6, "splits": 1, "exact": True,
    }  # fmt: skip
    ops = cuda.ops
    assert ops.contract(*good.values())[0].shape == (2, 24, 4, 4)
    for name, bad, message in (
        ("weight", w[:, :3], "input channels"),
        ("act", len(ACTIVATIONS), "unknown activation"),
        ("e_kind", 7, "unknown epilogue"),
        ("e_kind", 1, "takes other tensors"),
        ("stride", [0, 1], "no such geometry"),
        ("padding", [1], "expected a pair"),
        ("groups", 3, "statistics groups"),
        ("splits", 0, "parts"),
        ("tile", 0, "no tile 0"),
        ("coef", torch.randn(3, 1, 24), "expected coefficients"),
        ("y", x, "expected coefficients"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.contract(*(good | {name: bad}).values())
