"""The image-side layers of csrc/cuda on a CPU: alone under the sanitizers, as contractions against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cuda_image_side, cuda_tiles
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.dispatch import router
from fastdcgan.geometry import Geometry
from fastdcgan.spec import STORE, Call, Epilogue, Operand, memory_format
from tests.backends.test_cpu import coefficients
from tests.cuda_on_cpu.host_library import ORDERS, HostCUDABackend, set_multiprocessors, set_order
from tests.cuda_on_cpu.host_programs import MODES, assert_passes, needs_compiler
from tests.helpers.contractions import conv_call, conv_transpose_call, run, weight_grad_call, why_not, wide
from tests.helpers.tolerance import assert_as_accurate

pytestmark = needs_compiler

REFERENCE = ReferenceBackend()
NAME = "cuda image-side"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHANNELS_LAST = torch.channels_last


@pytest.fixture(scope="module")
def cuda() -> HostCUDABackend:
    backend = HostCUDABackend()
    backend.require()
    return backend


@pytest.mark.parametrize("mode", MODES)
def test_kernels(mode: str) -> None:
    assert_passes("image_side_tests", mode)


def test_a_gpu_with_too_little_shared_memory(cuda: HostCUDABackend, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(cuda_tiles.H100, shared_memory=99 * 1024)
    monkeypatch.setattr(cuda_tiles, "device_of", lambda device: small)
    five, four = Geometry((5, 5), (2, 2), (2, 2)), Geometry((4, 4), (2, 2), (1, 1))

    def reason(dtype: torch.dtype, geometry: Geometry, wide: int) -> str | None:
        x = normal(1, wide, 4, 4, seed=1, dtype=dtype)
        weight = normal(wide, 3, *geometry.kernel, seed=2, dtype=dtype)
        return why_not(cuda, conv_transpose_call(Operand(x), weight, geometry, (8, 8)), NAME)

    taken = cuda.ops.image_side_transpose_bytes(3, 128, five.kernel, five.stride, five.padding)
    expected = f"tiles that need {taken} bytes of shared memory, where a block has 101376"
    assert reason(torch.bfloat16, five, 128) == expected
    assert reason(torch.float32, five, 128) is None and reason(torch.bfloat16, five, 64) is None
    assert reason(torch.bfloat16, four, 128) is None


def normal(*shape: int, seed: int, dtype: torch.dtype, last: bool = True, scale: float = 1.0) -> Tensor:
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=CHANNELS_LAST if last else torch.contiguous_format)


def operand(x: Tensor, kind: str, act: str, groups: int) -> Operand:
    """`x` itself, or a map of it (`activate`) or of it and another tensor (`gradient`, `bn_backward`)."""
    slope = ACTIVATIONS[act].default_slope
    if kind == "none":
        return Operand(x)
    coef = coefficients(4 if kind == "bn_backward" else 2, groups, x.shape[1])
    y = None if kind == "activate" else torch.empty_like(x).copy_(x.flip(0) * 0.5 + 0.25)
    return Operand(x, y, coef, act, slope)


def epilogue(kind: str, like: Tensor, channels: int, groups: int, act: str) -> Epilogue:
    if kind == "bias":
        return Epilogue("bias", None, coefficients(2, 1, channels)[0, 0])
    if kind == "stats":
        return Epilogue("stats", stat_groups=groups)
    if kind == "none":
        return STORE
    y = torch.empty_like(like).copy_(like * 0.5) if kind == "grad_stats" else None
    coef = coefficients(4 if kind == "grad_stats" else 2, groups, channels)
    return Epilogue(kind, y, coef, act, ACTIVATIONS[act].default_slope, groups)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    side = st.integers(1, 5)
    kernel = (draw(side), draw(side))
    stride = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = tuple(draw(st.integers(0, k)) for k in kernel)
    groups = draw(st.integers(1, 2))
    size = tuple(draw(st.integers(max(1, k - 2 * p), 14)) for k, p in zip(kernel, padding, strict=True))
    return {
        "geometry": Geometry(kernel, stride, padding, (1, 1), 1),
        "batch": groups * draw(st.integers(1, 2)),
        "groups": groups,
        "channels": draw(st.integers(2, 4)),  # one channel has two memory formats: `test_one_channel`
        "wide": draw(st.one_of(st.integers(16, 40), st.sampled_from([64, 72, 130]))),
        "size": size,
        "dtype": draw(st.sampled_from(DTYPES)),
        "last": draw(st.booleans()),
        "prologue": draw(st.sampled_from(["none", "activate", "gradient", "bn_backward"])),
        "epilogue": draw(st.sampled_from(["none", "bias", "activate", "stats", "grad_stats"])),
        "act": draw(st.sampled_from(list(ACTIVATIONS))),
        "multiprocessors": draw(st.integers(1, 3)),
    }


DCGAN = {
    "geometry": Geometry((4, 4), (2, 2), (1, 1), (1, 1), 1), "batch": 2, "groups": 1, "channels": 3, "wide": 64,
    "size": (16, 16), "dtype": torch.bfloat16, "last": True, "prologue": "none", "epilogue": "activate",
    "act": "tanh", "multiprocessors": 2,
}  # fmt: skip


def check(cuda: HostCUDABackend, call: Call, reduction: int, scale: float = 1.0) -> None:
    """The call is as accurate as PyTorch's convolution."""
    results, what = (run(cuda, call, NAME), run(REFERENCE, call), run(REFERENCE, wide(call))), call.op
    if isinstance(results[0], Tensor):
        assert_as_accurate(*results, what, reduction=reduction, scale=scale)
        return
    (got, sums), (vanilla, vanilla_sums), (truth, truth_sums) = results
    assert_as_accurate(got, vanilla, truth, what, reduction=reduction, scale=scale)
    assert got.is_contiguous(memory_format=CHANNELS_LAST) or what == "conv_transpose"
    assert sums.shape == vanilla_sums.shape and sums.dtype == torch.float32
    if sums.numel():  # of many values that have each been rounded
        torch.testing.assert_close(sums.double(), truth_sums, rtol=0.05, atol=0.05 * float(truth_sums.abs().max()))


@settings(max_examples=60)
@given(p=problems())
@example(p=DCGAN)
def test_contractions_are_as_accurate_as_pytorch(cuda: HostCUDABackend, p: dict) -> None:
    set_multiprocessors(p["multiprocessors"])
    g, dtype, n, groups = p["geometry"], p["dtype"], p["batch"], p["groups"]
    small = g.conv_size(*p["size"])
    x = normal(n, p["channels"], *p["size"], seed=1, dtype=dtype, last=p["last"])
    dy = normal(n, p["wide"], *small, seed=2, dtype=dtype)
    if memory_format(dy) != CHANNELS_LAST:
        return  # one pixel: it has no format
    weight = normal(p["wide"], p["channels"], *g.kernel, seed=3, dtype=dtype, scale=0.2)
    a, b = operand(x, p["prologue"], p["act"], groups), operand(dy, p["prologue"], p["act"], groups)
    taps = g.kernel[0] * g.kernel[1]
    single = p["epilogue"] == "stats" and dy.numel() == groups * p["wide"]  # a variance of one value is NaN
    e = epilogue("none" if single else p["epilogue"], dy, p["wide"], groups, p["act"])
    if why_not(cuda, conv_call(a, weight, g, e), NAME) is None:
        check(cuda, conv_call(a, weight, g, e), p["channels"] * taps)
    else:
        assert not cuda_image_side._channels_last(x, weight)
    e = epilogue(p["epilogue"] if p["epilogue"] != "stats" else "none", x, p["channels"], groups, p["act"])
    if e.kind != "grad_stats":
        check(cuda, conv_transpose_call(b, weight, g, p["size"], e), p["wide"] * taps)
    count = n * small[0] * small[1]
    check(cuda, weight_grad_call(a, b, g), count, scale=count**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_channel(cuda: HostCUDABackend, dtype: torch.dtype) -> None:
    g = Geometry((4, 4), (2, 2), (1, 1), (1, 1), 1)
    x = normal(2, 1, 8, 8, seed=1, dtype=dtype)
    x = x.as_strided(x.shape, (64, 1, 8, 1))  # said to be channels_last
    weight, dy = normal(32, 1, 4, 4, seed=2, dtype=dtype), normal(2, 32, 4, 4, seed=3, dtype=dtype)
    check(cuda, conv_call(Operand(x), weight, g), 16)
    check(cuda, conv_transpose_call(Operand(dy), weight, g, (8, 8)), 512)
    check(cuda, weight_grad_call(Operand(x), Operand(dy), g), 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_infinite_reaches_what_it_is_a_term_of(cuda: HostCUDABackend, dtype: torch.dtype, stride: int) -> None:
    """And nothing else: neither taps or channels that there are for tensor cores alone, nor pixels beyond an edge."""
    g = Geometry((3, 3), (stride, stride), (0, 0), (1, 1), 1)
    x, weight = normal(1, 3, 12, 12, seed=1, dtype=dtype), normal(16, 3, 3, 3, seed=2, dtype=dtype)
    dy = normal(1, 16, *g.conv_size(12, 12), seed=3, dtype=dtype)
    beyond = x.clone(memory_format=CHANNELS_LAST)
    beyond[:, :, 11] = beyond[:, :, :, 11] = torch.inf  # a stride of 2 leaves it out
    x[0, 1, 3, 6] = torch.inf
    infinite = dy.masked_fill(dy == dy.max(), torch.inf).contiguous(memory_format=CHANNELS_LAST)
    for call in (
        conv_call(Operand(x), weight, g),
        weight_grad_call(Operand(beyond), Operand(dy), g),
        conv_transpose_call(Operand(infinite), weight, g, (12, 12)),
    ):
        got, want = run(cuda, call, NAME), run(REFERENCE, wide(call))
        if call.op != "weight_grad":
            got, want = got[0], want[0]
        assert torch.equal(got.isfinite(), want.isfinite()), call.op
        assert want.isfinite().any()


def test_the_same_bits_in_every_order_of_threads(cuda: HostCUDABackend) -> None:
    g = Geometry((4, 4), (2, 2), (1, 1), (1, 1), 1)
    x, dy = normal(2, 3, 12, 20, seed=1, dtype=torch.float32), normal(2, 40, 6, 10, seed=2, dtype=torch.float32)
    weight, found = normal(40, 3, 4, 4, seed=3, dtype=torch.float32), []
    try:
        for order in ORDERS:
            set_order(order)
            out = run(cuda, conv_call(Operand(x), weight, g), NAME)[0]
            image = run(cuda, conv_transpose_call(Operand(dy), weight, g, (12, 20)), NAME)[0]
            found.append([out, image, run(cuda, weight_grad_call(Operand(x), Operand(dy), g), NAME)])
    finally:
        set_order("forward")
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_can_not_run_here_runs_elsewhere(cuda: HostCUDABackend) -> None:
    x, g = normal(2, 3, 8, 8, seed=1, dtype=torch.float32), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight = normal(32, 3, 3, 3, seed=2, dtype=torch.float32)
    for geometry, a, w, reason in [
        (
            g,
            normal(2, 5, 8, 8, seed=1, dtype=torch.float32),
            normal(32, 5, 3, 3, seed=2, dtype=torch.float32),
            "5 channels",
        ),
        (g, x, weight[:8], "8 channels on the other side"),
        (dataclasses.replace(g, dilation=(2, 1)), x, weight, r"dilation \(2, 1\)"),
        (dataclasses.replace(g, stride=(3, 1)), x, weight, r"stride \(3, 1\)"),
        (g, x.contiguous(), weight.contiguous(), "contiguous"),
        (g, x, weight.half(), "several dtypes"),
    ]:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(why_not(cuda, conv_call(Operand(a), w, geometry), NAME))
        if w.dtype == a.dtype:  # the contractions on tensor cores
            call = conv_call(Operand(a), w, geometry)
            torch.testing.assert_close(run(cuda, call)[0], run(REFERENCE, call)[0], rtol=1e-4, atol=1e-5)
    call = conv_call(Operand(x.repeat(1, 2, 1, 1)), weight, dataclasses.replace(g, groups=2))
    assert why_not(cuda, call) == "2 groups" and torch.equal(run(cuda, call)[0], run(REFERENCE, call)[0])
    dy = normal(2, 32, 8, 8, seed=1, dtype=torch.float32, last=False)
    for call in (conv_transpose_call(Operand(dy), weight, g, (8, 8)), weight_grad_call(Operand(x), Operand(dy), g)):
        assert "contiguous" in (why_not(cuda, call, NAME) or "")


def test_wrong_arguments_are_refused(cuda: HostCUDABackend) -> None:
    ops = torch.ops.fastdcgan_cuda_on_cpu
    x, weight = normal(2, 3, 8, 8, seed=1, dtype=torch.float32), normal(8, 3, 3, 3, seed=2, dtype=torch.float32)

    def call(x: Tensor = x, weight: Tensor = weight, stride=(1, 1), padding=(1, 1), kind: int = 0, coef=None) -> Tensor:
        return ops.image_side_conv(x, None, None, 0, 0.0, weight, stride, padding, kind, coef, 0, 0.0)

    assert call().shape == (2, 8, 8, 8)
    for message, arguments in {
        "expected 1 to 4 channels, got 5": {"x": torch.zeros(1, 5, 8, 8), "weight": torch.zeros(8, 5, 3, 3)},
        "expected a weight of 3 input channels": {"weight": torch.zeros(8, 2, 3, 3)},
        "expected a kernel of 1 to 5, got 6": {"weight": torch.zeros(8, 3, 6, 3)},
        "expected a stride of 1 to 2, got 3": {"stride": (3, 1)},
        "expected a padding from 0 on, got -1": {"padding": (0, -1)},
        "is smaller than the kernel": {"x": torch.zeros(1, 3, 2, 8), "padding": (0, 0)},
        "unknown epilogue 3": {"kind": 3},
        r"expected a vector \[8\], got \[7\]": {"kind": 1, "coef": torch.zeros(7)},
        r"expected coefficients \[2 or more, groups, 8\]": {"kind": 2, "coef": torch.zeros(2, 1, 7)},
        "a batch of 2 can't have 3 statistics groups": {"kind": 2, "coef": torch.zeros(2, 3, 8)},
        "a weight of four dimensions in the input's dtype": {"weight": weight.half()},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)


@pytest.mark.parametrize("transposed", [False, True], ids=["discriminator", "generator"])
def test_first_and_last_blocks_of_a_dcgan(
    cuda: HostCUDABackend, monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    """Output and gradients of D's first block and of G's last, as a layer, with every contraction in a kernel here."""
    layer = fastdcgan.ConvTransposeTanh2d if transposed else fastdcgan.ConvLeakyReLU2d
    monkeypatch.setitem(backends._loaded, "cuda", cuda)
    torch.manual_seed(0)
    net = layer(*((32, 3) if transposed else (3, 32)), 4, 2, 1).to(memory_format=CHANNELS_LAST)
    exact = layer(*((32, 3) if transposed else (3, 32)), 4, 2, 1).double().to(memory_format=CHANNELS_LAST)
    exact.load_state_dict({key: value.double() for key, value in net.state_dict().items()})
    x = normal(2, *((32, 4, 4) if transposed else (3, 8, 8)), seed=1, dtype=torch.float32)
    results = []
    for model, backend, dtype in (
        (net, "cuda", torch.float32),
        (net, "reference", torch.float32),
        (exact, "reference", torch.float64),
    ):
        image = x.to(dtype).requires_grad_()
        with fastdcgan.backend(backend), router.recording() as seen:
            out = model(image)
            grads = torch.autograd.grad(out.square().sum(), [image, *model.parameters()])
        if backend == "cuda":
            assert len(seen) == 3 and all(each.startswith(NAME) for each in seen)
        results.append([out.detach(), *grads])
    for i, name in enumerate(
        ("output", "gradient of the input", *(name for name, _ in nn.Module.named_parameters(net)))
    ):
        assert_as_accurate(*(r[i] for r in results), name, reduction=32 * 16)
