"""`conv`, `conv_transpose` and `weight_grad` in Triton, each with its prologues and epilogues, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.geometry import Geometry, Pair
from fastdcgan.kernels.conv import conv
from fastdcgan.kernels.conv_transpose import conv_transpose
from fastdcgan.kernels.tiles import TileConfig
from fastdcgan.kernels.weight_grad import weight_grad
from fastdcgan.spec import STORE, Call, Epilogue, Operand
from tests.helpers.contractions import REFERENCE, check_constant, constant_call, reference, wide
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import DEVICE, examples

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan", "no_overflow_checks")
PROLOGUES = ("none", "activate", "bn_backward")
EPILOGUES = ("none", "bias", "activate", "stats", "grad_stats")
TO_IMAGES = ("conv", "conv_transpose")
# name -> kernel, stride, padding, output_padding
GEOMETRIES = {
    "k4s2p1": (4, 2, 1, 0),
    "k4s1p0": (4, 1, 0, 0),
    "k3s1p1": (3, 1, 1, 0),
    "k3s2p1": (3, 2, 1, 1),
    "k5s2p2": (5, 2, 2, 1),
    "k2s2p0": (2, 2, 0, 0),
    "k1s1p0": (1, 1, 0, 0),
    "k7s1p3": (7, 1, 3, 0),
}
DESCRIPTORS = TileConfig(32, 16, 32)
POINTERS = TileConfig(32, 16, 32, descriptors=False)
TILES = {"descriptors": DESCRIPTORS, "pointers": POINTERS}


# --- a contraction and its arguments ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A contraction: which, its geometry and its sizes."""

    op: str  # "conv" | "conv_transpose" | "weight_grad"
    geometry: Geometry
    size: Pair  # of the input; for weight_grad of the gathered operand
    images: int = 2  # of a statistics group
    groups: int = 2
    channels: Pair = (24, 40)  # in and out; for weight_grad gathered and linear
    output_padding: Pair = (0, 0)
    dtype: torch.dtype = torch.float32

    @property
    def out_size(self) -> Pair:
        if self.op == "conv_transpose":
            return self.geometry.conv_transpose_size(*self.size, self.output_padding)
        return self.geometry.conv_size(*self.size)

    @property
    def terms(self) -> int:
        """Of the sum that each element of the result is."""
        if self.op == "weight_grad":
            return self.images * self.groups * self.out_size[0] * self.out_size[1]
        return self.channels[0] * self.geometry.kernel[0] * self.geometry.kernel[1]

    def tensor(self, channels: int, size: Pair) -> Tensor:
        x = torch.randn(self.images * self.groups, channels, *size).to(DEVICE, self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def operand(self, prologue: str, channels: int, size: Pair, act: str, rows: int = 4) -> Operand:
        x = self.tensor(channels, size)
        if prologue == "none":
            return Operand(x)
        y = self.tensor(channels, size) if prologue == "bn_backward" else None
        return Operand(x, y, vectors(rows, self.groups, channels), act, 0.3)

    def epilogue(self, kind: str, act: str, rows: int = 4) -> Epilogue:
        channels = self.channels[1]
        if kind == "none":
            return STORE
        if kind == "bias":
            return Epilogue("bias", coef=torch.randn(channels, device=DEVICE))
        if kind == "activate":
            return Epilogue("activate", None, vectors(2, 1, channels), act, 0.3)
        if kind == "stats":
            return Epilogue("stats", stat_groups=self.groups)
        y = self.tensor(channels, self.out_size)
        return Epilogue("grad_stats", y, vectors(rows, self.groups, channels), act, 0.3, self.groups)

    def weight(self) -> Tensor:
        ci, co = self.channels
        shape = (co, ci) if self.op == "conv" else (ci, co)
        w = torch.randn(*shape, *self.geometry.kernel) * 0.2
        return w.to(DEVICE, self.dtype).contiguous(memory_format=torch.channels_last)

    def call(self, a: Operand, b: Tensor | Operand, epilogue: Epilogue = STORE) -> Call:
        size = self.geometry.kernel if self.op == "weight_grad" else self.out_size
        return Call(self.op, a, b, self.geometry, size, epilogue)


RUN = {"conv": conv, "conv_transpose": conv_transpose, "weight_grad": weight_grad}


def vectors(rows: int, groups: int, channels: int) -> Tensor:
    return (torch.rand(rows, groups, channels) + 0.3).to(DEVICE)


def check_output(case: Case, prologue: str, kind: str, act: str, tile: TileConfig | None, rows: int = 4) -> None:
    torch.manual_seed(0)  # the same numbers where hypothesis calls again
    a = case.operand(prologue, case.channels[0], case.size, act, rows)
    e, weight = case.epilogue(kind, act, rows), case.weight()
    call = case.call(a, weight, e)
    truth, vanilla = reference(wide(call)), reference(call)
    found = RUN[case.op](call, tile)
    assert_as_accurate(found[0], vanilla[0], truth[0], f"output of {case}", reduction=case.terms)
    assert found[1].shape == truth[1].shape
    if found[1].numel():
        # Sums of either sign may cancel: what rounds is their terms.
        size = float(truth[0].square().mean().sqrt())
        of_sums = size * math.sqrt(truth[0][:, 0].numel() / case.groups)
        scales = (size, size**2, size**2) if kind == "stats" else (of_sums, of_sums)
        for got, usual, true, scale in zip(found[1], vanilla[1], truth[1], scales, strict=False):
            what, terms = f"{kind} of {case}", None if case.dtype == torch.float32 else case.dtype
            assert_as_accurate(got, usual, true, what, reduction=case.terms, scale=scale, terms=terms)


def check_weight_grad(case: Case, prologues: tuple[str, str], act: str, tile: TileConfig | None) -> None:
    torch.manual_seed(0)
    gathered = case.operand(prologues[0], case.channels[0], case.size, act)
    linear = case.operand(prologues[1], case.channels[1], case.out_size, act)
    call = case.call(gathered, linear)
    found = weight_grad(call, tile)
    assert_as_accurate(found, reference(call), reference(wide(call)), f"{case}", reduction=case.terms)


def geometry_of(name: str) -> tuple[Geometry, Pair]:
    k, s, p, extra = GEOMETRIES[name]
    return Geometry((k, k), (s, s), (p, p)), (extra, extra)


# --- everything with everything --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", EPILOGUES)
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("op", TO_IMAGES)
def test_prologue_and_epilogue(op: str, prologue: str, kind: str, tile: str) -> None:
    dtype = torch.float16 if prologue == "activate" else torch.float32
    case = Case(op, Geometry((4, 4), (2, 2), (1, 1)), (4, 6) if op == "conv" else (2, 3), dtype=dtype)
    check_output(case, prologue, kind, "leaky_relu", TILES[tile])


@pytest.mark.parametrize("tile", TILES)
def test_statistics_of_a_constant_image(tile: str) -> None:
    call = constant_call(Geometry((4, 4), (2, 2)), (24, 40), torch.float16, DEVICE)
    check_constant(*conv(call, TILES[tile]), tile)


@pytest.mark.parametrize("kind", EPILOGUES)
@pytest.mark.parametrize("op", TO_IMAGES)
def test_a_sum_in_parts(op: str, kind: str) -> None:
    case = Case(op, Geometry((4, 4), (2, 2), (1, 1)), (4, 6) if op == "conv" else (2, 3))
    for descriptors in (True, False):
        check_output(case, "activate", kind, "relu", TileConfig(32, 16, 16, splits=3, descriptors=descriptors))


@pytest.mark.parametrize("kind", EPILOGUES)
@pytest.mark.parametrize("op", TO_IMAGES)
def test_a_kernel_as_large_as_its_image(op: str, kind: str) -> None:
    case = Case(op, Geometry((4, 3)), (4, 3) if op == "conv" else (1, 1), channels=(16, 24))
    assert case.out_size == ((1, 1) if op == "conv" else (4, 3))
    for prologue in PROLOGUES:
        check_output(case, prologue, kind, "relu", TileConfig(32, 32, 32))


def test_weight_grad_of_a_kernel_as_large_as_its_image() -> None:
    case = Case("weight_grad", Geometry((4, 3)), (4, 3), channels=(16, 24))
    check_weight_grad(case, ("bn_backward", "activate"), "relu", TileConfig(32, 32, 32))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("of_linear", PROLOGUES)
@pytest.mark.parametrize("of_gathered", PROLOGUES)
def test_weight_grad_prologues(of_gathered: str, of_linear: str, tile: str) -> None:
    case = Case("weight_grad", Geometry((4, 4), (2, 2), (1, 1)), (4, 6), dtype=torch.float16)
    check_weight_grad(case, (of_gathered, of_linear), "relu", TILES[tile])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("op", [*TO_IMAGES, "weight_grad"])
def test_geometry(op: str, name: str, tile: str) -> None:
    geometry, extra = geometry_of(name)
    size = (1, 2) if op == "conv_transpose" and name == "k4s1p0" else (4, 6)
    case = Case(op, geometry, size, images=3, groups=1, channels=(16, 16), output_padding=extra, dtype=torch.float16)
    if op == "weight_grad":
        check_weight_grad(case, ("activate", "none"), "tanh", TILES[tile])
    else:
        check_output(case, "activate", "stats", "tanh", TILES[tile])


@pytest.mark.parametrize("kind", ["stats", "grad_stats"])
@pytest.mark.parametrize("op", TO_IMAGES)
def test_each_image_has_statistics_of_its_own(op: str, kind: str) -> None:
    geometry, extra = geometry_of("k4s2p1")
    case = Case(op, geometry, (4, 6), images=1, groups=5, channels=(16, 24), output_padding=extra)
    check_output(case, "activate", kind, "relu", None)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_activation(act: str) -> None:
    case = Case("conv", Geometry((1, 1)), (3, 3), channels=(16, 16))
    for prologue, kind, rows in (("activate", "activate", 4), ("bn_backward", "grad_stats", 2)):
        check_output(case, prologue, kind, act, POINTERS, rows)


# --- any size --------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn, ops: tuple[str, ...]) -> Case:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = (draw(st.integers(0, reach[0] // 2)), draw(st.integers(0, reach[1] // 2)))
    op = draw(st.sampled_from(ops))
    extra = (0, 0)
    if op == "conv_transpose":
        size = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
        extra = (draw(st.integers(0, stride[0] - 1)), draw(st.integers(0, stride[1] - 1)))
    else:
        size = tuple(max(1, reach[i] - 2 * padding[i]) + draw(st.integers(0, 5)) for i in range(2))
    case = Case(
        op,
        Geometry(kernel, stride, padding, dilation),
        size,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.tuples(st.sampled_from([5, 8, 16, 24]), st.sampled_from([1, 8, 16, 40]))),
        extra,
        draw(st.sampled_from([torch.float32, torch.float16])),
    )
    if min(case.out_size) < 1:  # more padding than a transposed convolution has output
        case = Case(op, Geometry(kernel, stride, (0, 0), dilation), *list(vars(case).values())[2:])
    return case


@st.composite
def tiles(draw: st.DrawFn) -> TileConfig:
    return TileConfig(
        draw(st.sampled_from([32, 64])),
        draw(st.sampled_from([16, 32])),
        draw(st.sampled_from([16, 32])),
        group_m=draw(st.integers(1, 3)),
        splits=draw(st.integers(1, 4)),
        descriptors=draw(st.booleans()),
    )


def few_steps(case: Case, tile: TileConfig) -> bool:
    """The interpreter takes a few milliseconds for a step of a reduction."""
    pixels = case.images * case.groups * case.out_size[0] * case.out_size[1]
    m, n, k = (*case.channels, pixels) if case.op == "weight_grad" else (pixels, case.channels[1], case.channels[0])
    blocks = -(-m // tile.block_m) * -(-n // tile.block_n) * -(-k // tile.block_k)
    return blocks * case.geometry.kernel[0] * case.geometry.kernel[1] <= 300


@settings(max_examples=examples(40))
@given(cases(TO_IMAGES), st.sampled_from(PROLOGUES), st.sampled_from(EPILOGUES), tiles())
def test_output_of_any_size(case: Case, prologue: str, kind: str, tile: TileConfig) -> None:
    assume(few_steps(case, tile))
    check_output(case, prologue, kind, "silu", tile)


@settings(max_examples=examples(20))
@given(cases(("weight_grad",)), st.sampled_from(PROLOGUES), st.sampled_from(PROLOGUES), tiles())
def test_weight_grad_of_any_size(case: Case, of_gathered: str, of_linear: str, tile: TileConfig) -> None:
    assume(few_steps(case, tile))
    check_weight_grad(case, (of_gathered, of_linear), "elu", tile)


# --- particular properties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES)
def test_padding_is_zero_and_not_the_activation_of_zero(tile: str) -> None:
    case = Case("conv", Geometry((3, 3), (1, 1), (1, 1)), (3, 3), channels=(16, 16))
    a, weight = case.operand("activate", 16, (3, 3), "sigmoid"), case.weight()
    assert a.coef is not None
    call = case.call(a, weight)
    found, _ = conv(call, TILES[tile])
    truth, _ = reference(wide(call))
    inner = REFERENCE.norm_act(wide(a))
    border = torch.sigmoid(a.coef[1].double()).repeat_interleave(case.images, 0)[:, :, None, None].expand(-1, -1, 5, 5)
    wrong = border.clone()
    wrong[:, :, 1:-1, 1:-1] = inner
    activated = torch.nn.functional.conv2d(wrong, weight.double())
    assert (found - truth).abs().max() < 1e-4
    assert (found - activated).abs().max() > 0.1


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("op", [*TO_IMAGES, "weight_grad"])
def test_twice_the_same_bits(op: str, tile: str) -> None:
    case = Case(op, Geometry((3, 3), (2, 2), (1, 1)), (5, 5))
    if op == "weight_grad":
        a, b = case.operand("activate", 24, case.size, "relu"), case.operand("bn_backward", 40, case.out_size, "relu")
        config = TileConfig(16, 16, 16, splits=3, descriptors=tile == "descriptors")
        first, second = (weight_grad(case.call(a, b), config) for _ in range(2))
        assert torch.equal(first, second)
        return
    a, weight, e = (
        case.operand("bn_backward", 24, case.size, "relu"),
        case.weight(),
        case.epilogue("grad_stats", "relu"),
    )
    results = [RUN[op](case.call(a, weight, e), TILES[tile]) for _ in range(2)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("op", TO_IMAGES)
def test_what_is_not_finite_stays_where_it_belongs(op: str, tile: str) -> None:
    """Tiles overhang into neighbouring pixels, images and groups: what lies there must not come in."""
    case = Case(op, Geometry((1, 1), (2, 2)), (4, 4), images=3, channels=(24, 24))
    a, weight = case.operand("none", 24, (4, 4), "relu"), case.weight()
    a.x[1, :, 2, 1] = torch.nan  # which a conv skips
    a.x[4, 3, 0, 0] = torch.inf
    call = case.call(a, weight)
    found, _ = RUN[op](call, TILES[tile])
    truth, _ = reference(wide(call))
    assert torch.equal(found.isnan(), truth.isnan())
    assert torch.equal(found.isinf(), truth.isinf())


@pytest.mark.parametrize("tile", TILES)
def test_weight_grad_keeps_what_is_not_finite_to_the_taps_that_reach_it(tile: str) -> None:
    case = Case("weight_grad", Geometry((3, 3)), (8, 8), channels=(16, 16))
    gathered, linear = case.operand("none", 16, (8, 8), "relu"), case.operand("none", 16, (6, 6), "relu")
    gathered.x[1, 3, 4, 7] = torch.nan
    call = case.call(gathered, linear)
    found = weight_grad(call, TileConfig(16, 16, 64, descriptors=tile == "descriptors"))
    truth = reference(wide(call))
    assert torch.equal(found.isnan(), truth.isnan())
    assert truth[:, 3, :, 2].isnan().all()
    assert int(truth.isnan().sum()) == 16 * 3


@pytest.mark.parametrize("op", [*TO_IMAGES, "weight_grad"])
def test_bfloat16_with_the_tile_that_is_chosen(op: str) -> None:
    """Within the rounding of operands and result; the interpreter truncates where a GPU rounds to nearest."""
    case = Case(op, Geometry((4, 4), (2, 2), (1, 1)), (4, 4), channels=(16, 32), dtype=torch.bfloat16)
    if op == "weight_grad":
        call = case.call(
            case.operand("bn_backward", 16, case.size, "relu"), case.operand("none", 32, case.out_size, "")
        )
        found, truth = weight_grad(call), reference(wide(call))
    else:
        call = case.call(case.operand("activate", 16, case.size, "relu"), case.weight())
        found, truth = RUN[op](call)[0], reference(wide(call))[0]
    assert found.dtype == torch.bfloat16
    assert (found.double() - truth).norm() < 2 * torch.finfo(torch.bfloat16).eps * truth.norm()


@pytest.mark.parametrize("op", TO_IMAGES)
def test_memory_format_is_pytorchs(op: str) -> None:
    case = Case(op, Geometry((3, 3), (1, 1), (1, 1)), (3, 4), channels=(16, 16))
    nhwc, weight = case.operand("none", 16, (3, 4), "relu"), case.weight()
    nchw = Operand(nhwc.x.contiguous())
    expected, _ = reference(wide(case.call(nhwc, weight)))
    for a, w in ((nhwc, weight), (nchw, weight.contiguous())):
        found, _ = RUN[op](case.call(a, w), POINTERS)
        assert torch.allclose(found.double(), expected, atol=1e-4)
        assert found.is_contiguous(memory_format=torch.channels_last if a is nhwc else torch.contiguous_format)
