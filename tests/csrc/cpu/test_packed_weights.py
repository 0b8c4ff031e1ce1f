"""The packed-weight cache: never one that doesn't hold any more, however the weight was changed."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.optim import FusedAdam
from tests.helpers.writes import WRITES

STATUS = backends.status()["cpu"]
if STATUS == "available" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
    STATUS = "the contractions of csrc/cpu need AVX2"
pytestmark = pytest.mark.skipif(STATUS != "available", reason=STATUS)
needs_amx = pytest.mark.skipif(
    STATUS != "available" or not backends.get("cpu").amx,
    reason="this processor has no AMX",  # type: ignore[attr-defined]
)

CHANNELS_LAST = torch.channels_last


def cached() -> tuple[int, int]:
    return torch.ops.fastdcgan_cpu.packed_weights()


def run(x: Tensor, weight: Tensor, algorithm: str = "gemm") -> Tensor:
    numbers = ((2, 2), (1, 1), (1, 1), (2 * x.shape[2], 2 * x.shape[3]))
    return torch.ops.fastdcgan_cpu.conv_transpose(x, weight, *numbers, None, 0, 0.0, 0, algorithm)[0]


def fresh(x: Tensor, weight: Tensor, algorithm: str = "gemm") -> Tensor:
    """With a weight that is not dense: those are packed at every call."""
    apart = torch.zeros(*weight.shape, 2, dtype=weight.dtype)[..., 0]
    return run(x, apart.copy_(weight.detach()), algorithm)


def layer(dtype: torch.dtype = torch.float32) -> tuple[nn.ConvTranspose2d, Tensor]:
    torch.manual_seed(0)
    made = nn.ConvTranspose2d(64, 48, 4, 2, 1, bias=False).to(dtype).to(memory_format=CHANNELS_LAST)
    return made, torch.randn(2, 64, 4, 4).to(dtype).contiguous(memory_format=CHANNELS_LAST)


def bits(weight: Tensor) -> Tensor:
    """The memory of a channels_last tensor."""
    return weight.data.permute(0, 2, 3, 1).view(torch.int16).view(-1)


def anew(conv: nn.ConvTranspose2d) -> None:
    conv.weight.data.copy_(torch.randn_like(conv.weight))


def by_clamping(conv: nn.ConvTranspose2d) -> None:
    conv.weight.data.clamp_(-0.01, 0.01)


def one_bit(conv: nn.ConvTranspose2d) -> None:
    bits(conv.weight)[12345] ^= 1


def signs(conv: nn.ConvTranspose2d) -> None:
    conv.weight.data.neg_()


def swapped(conv: nn.ConvTranspose2d) -> None:
    conv.weight.data[[0, 1]] = conv.weight.data[[1, 0]]


def by_a_flat_view(conv: nn.ConvTranspose2d) -> None:
    """As DistributedDataParallel and flat optimisers lay parameters out."""
    flat = torch.cat([torch.zeros(7, dtype=conv.weight.dtype), conv.weight.data.permute(0, 2, 3, 1).reshape(-1)])
    n, channels, height, width = conv.weight.shape
    conv.weight.data = flat[7:].view(n, height, width, channels).permute(0, 3, 1, 2)
    run(torch.zeros(1, n, 4, 4, dtype=flat.dtype), conv.weight)
    flat.mul_(-2)


def by_sgd(conv: nn.ConvTranspose2d) -> None:
    conv.weight.grad = torch.ones_like(conv.weight)
    torch.optim.SGD(conv.parameters(), lr=0.1).step()


def by_fused_adam(conv: nn.ConvTranspose2d) -> None:
    conv.weight.grad = torch.ones_like(conv.weight)
    FusedAdam(conv.parameters(), lr=0.1).step()


CHANGES: dict[str, Callable[[nn.ConvTranspose2d], None]] = {
    **WRITES,
    **{f.__name__: f for f in (anew, by_clamping, one_bit, signs, swapped, by_a_flat_view, by_sgd, by_fused_adam)},
}


@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        ("gemm", torch.float32),
        ("gemm", torch.bfloat16),
        ("gemm", torch.float16),
        ("winograd_2x2", torch.float32),
        ("winograd_4x4", torch.float32),
        pytest.param("split_bf16", torch.float32, marks=needs_amx),
        pytest.param("amx", torch.bfloat16, marks=needs_amx),
    ],
)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_is_missed(change: Callable[[nn.ConvTranspose2d], None], algorithm: str, dtype: torch.dtype) -> None:
    gc.collect()
    count = cached()[0]
    conv, x = layer(dtype)
    before = run(x, conv.weight, algorithm)
    for _ in range(3):
        assert torch.equal(run(x, conv.weight, algorithm), before)
        assert torch.equal(fresh(x, conv.weight, algorithm), before)
    assert cached()[0] == count + 1
    for _ in range(3):  # the first is packed again, then it is not cached for a while
        change(conv)
        assert torch.equal(run(x, conv.weight, algorithm), fresh(x, conv.weight, algorithm))
    assert not torch.equal(run(x, conv.weight, algorithm), before) or change is one_bit


def test_any_order_of_changes() -> None:
    conv, x = layer()
    generator = torch.Generator().manual_seed(1)
    for share in (0.1, 0.5, 0.9):
        for _ in range(60):
            if torch.rand((), generator=generator) < share:
                at = torch.randint(conv.weight.numel(), (), generator=generator)
                conv.weight.data.permute(0, 2, 3, 1).view(-1)[at] += 1
            assert torch.equal(run(x, conv.weight), fresh(x, conv.weight))


def test_every_bit_counts() -> None:
    """Lengths around those of the digest's steps and parts, and every place in the first and the last of them."""
    x = torch.randn(1, 1, 1, 1)
    for size in (1, 127, 128, 129, 65535, 65536, 65537):
        weight = torch.zeros(1, size, 1, 1)
        numbers = ((1, 1), (0, 0), (1, 1), (1, 1))
        for place in {*range(min(size, 130)), *range(max(0, size - 130), size)}:
            weight[0, place] = -0.0  # another bit, and the same number
            assert cached_after(x, weight, numbers)
            weight[0, place] = 3.0
            out = torch.ops.fastdcgan_cpu.conv_transpose(x, weight, *numbers, None, 0, 0.0, 0, "gemm")[0]
            assert out[0, place] == 3 * x.item() and out.count_nonzero() == 1
            weight[0, place] = 0.0


def cached_after(x: Tensor, weight: Tensor, numbers: tuple) -> bool:
    """Whether a packed form is cached, after as many calls with one weight as it may take."""
    for _ in range(1100):
        torch.ops.fastdcgan_cpu.conv_transpose(x, weight, *numbers, None, 0, 0.0, 0, "gemm")
        if cached()[0]:
            torch.ops.fastdcgan_cpu.conv_transpose(x, weight, *numbers, None, 0, 0.0, 0, "gemm")
            return True
    return False


def test_they_go_with_the_weight_and_with_changes() -> None:
    gc.collect()
    count, size = cached()
    conv, x = layer()
    run(x, conv.weight)
    assert cached() == (count + 1, size + 64 * 48 * 16 * 4)  # 48 columns are whole vectors
    run(x.repeat(200, 1, 1, 1), conv.weight)  # for so many pixels packing is nothing
    anew(conv)
    run(x, conv.weight)
    assert cached()[0] == count + 1
    anew(conv)
    run(x, conv.weight)
    assert cached() == (count, size)  # two changes, and no use in between
    for _ in range(6):
        run(x, conv.weight)
    assert cached()[0] == count + 1
    del conv
    gc.collect()
    assert cached() == (count, size)


def test_many_threads_share_one() -> None:
    conv, x = layer()
    expected, wrong = run(x, conv.weight), []

    def work() -> None:
        wrong.extend(not torch.equal(run(x, conv.weight), expected) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 200 and not any(wrong)


def test_generating_with_changing_weights() -> None:
    """The whole way: a folded, fused generator, and a moving average written through `.data` between calls."""
    net = nn.Sequential(nn.ConvTranspose2d(10, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())  # fmt: skip
    folded = fastdcgan.fold_batchnorm(net.eval()).to(memory_format=CHANNELS_LAST)
    ours, x = fastdcgan.fuse(folded), torch.randn(2, 10, 1, 1)
    with fastdcgan.backend("cpu"), torch.no_grad():
        for _ in range(4):
            for p in ours.parameters():
                p.data.lerp_(torch.randn_like(p), 0.1)
            for _ in range(2):
                found = ours(x)
            with fastdcgan.backend("reference"):
                expected = ours(x)
            assert (found - expected).abs().max() < 1e-5
    assert cached()[0] > 0


# --- float32 weights under autocast ----------------------------------------------------------------------------------

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def generator() -> nn.Sequential:
    """Folded, so that weights are cached: wide, Winograd, and image-side layers."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.ConvTranspose2d(10, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                        nn.ConvTranspose2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())  # fmt: skip
    return fastdcgan.fuse(fastdcgan.fold_batchnorm(net.eval()).to(memory_format=CHANNELS_LAST))


def with_cast_weights(net: nn.Sequential, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Biases stay float32, as autocast leaves them."""
    net = copy.deepcopy(net)
    for module in net:
        if isinstance(module, nn.ConvTranspose2d):
            module.weight = nn.Parameter(module.weight.detach().to(dtype))
    with fastdcgan.backend("cpu"), torch.no_grad():
        return net(x.to(dtype))


def generate(net: nn.Sequential, x: Tensor, dtype: torch.dtype) -> Tensor:
    with fastdcgan.backend("cpu"), torch.no_grad(), torch.autocast("cpu", dtype):
        return net(x)


@pytest.mark.parametrize("batch", [1, 4, 40])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_autocast_has_the_bits_of_weights_that_were_cast(dtype: torch.dtype, batch: int) -> None:
    net = generator()
    x = torch.randn(batch, 10, 1, 1)
    expected = with_cast_weights(net, x, dtype)
    assert expected.dtype == dtype
    for _ in range(3):
        assert torch.equal(generate(net, x, dtype), expected)
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.float32, name


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_autocast_caches_what_it_packs_of_float32_weights(dtype: torch.dtype) -> None:
    gc.collect()
    before = cached()[0]
    net, x = generator(), torch.randn(1, 10, 1, 1)
    first = generate(net, x, dtype)
    count = cached()[0]
    assert count == before + 3  # not the image's, which is packed at every call
    assert torch.equal(generate(net, x, dtype), first)
    assert cached()[0] == count
    for change in (lambda p: p.data.mul_(1.5), lambda p: p.data.neg_()):
        for parameter in net.parameters():
            change(parameter)
        found = generate(net, x, dtype)
        assert torch.equal(found, with_cast_weights(net, x, dtype)) and not torch.equal(found, first)


def test_a_change_that_rounding_hides_is_no_other_result() -> None:
    conv, x = layer()
    conv.weight.data.copy_(conv.weight.bfloat16())
    half = x.bfloat16()
    before = run(half, conv.weight)
    conv.weight.data.mul_(1 + 2.0**-12)
    assert torch.equal(run(half, conv.weight), before)
    assert torch.equal(before, run(half, conv.weight.bfloat16()))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_weights_are_rounded_as_a_cast_rounds(dtype: torch.dtype) -> None:
    """Ties, denormal and huge numbers, infinities and NaN, dense or not."""
    big, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    step = torch.finfo(dtype).eps
    some = [1 + step / 2, 1 + 1.5 * step, big, big * (1 + step / 4), big * (1 + step), -tiny / 4, tiny * (1 + step / 2)]
    some += [3.4e38, 1e-45, 0.0, -0.0, torch.inf, -torch.inf, torch.nan]
    values = torch.tensor(some + torch.randn(1001).tolist(), dtype=torch.float32)
    weight = values.view(1, -1, 1, 1)
    x = torch.ones(1, 1, 1, 1, dtype=dtype)
    numbers = ((1, 1), (0, 0), (1, 1), (1, 1))
    apart = torch.zeros(*weight.shape, 2)[..., 0].copy_(weight)
    for given in (weight, apart, weight.requires_grad_()):
        out = torch.ops.fastdcgan_cpu.conv_transpose(x, given.detach(), *numbers, None, 0, 0.0, 0, "gemm")[0]
        torch.testing.assert_close(out.flatten(), values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("given", "tensors", "named"), [("double", "float", "Double"), ("half", "float", "Half"),
                                                        ("half", "bfloat16", "Half")])  # fmt: skip
def test_other_weights_are_refused(given: str, tensors: str, named: str) -> None:
    conv, x = layer()
    with pytest.raises(TypeError, match=rf"expected a weight of dtype .*Float, got {named}"):
        run(getattr(x, tensors)(), getattr(conv.weight, given)())


@pytest.mark.parametrize("mode", ["grad", "frozen", "inference", "compile"])
def test_gradients_under_autocast_are_of_float32_weights(mode: str) -> None:
    """Where something needs a gradient the weights are cast as before; else the result has the same bits."""
    net, x = generator(), torch.randn(2, 10, 1, 1)
    expected = generate(net, x, torch.bfloat16)
    with fastdcgan.backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        if mode == "frozen":
            found = net.requires_grad_(False)(x)
        elif mode == "inference":
            with torch.inference_mode():
                found = net(x)
        elif mode == "compile":
            with torch.no_grad():
                found = torch.compile(net, backend="aot_eager")(x)
        else:
            found = net(x)
            found.float().square().sum().backward()
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert (found.float() - expected.float()).abs().max() < 0.02
    if mode in ("frozen", "inference"):
        assert torch.equal(found, expected)


def test_weights_of_another_dtype_are_refused_without_autocast() -> None:
    net, x = generator(), torch.randn(2, 10, 1, 1)
    with fastdcgan.backend("cpu"), torch.no_grad(), pytest.raises(TypeError, match="must have one dtype"):
        net(x.bfloat16())
    wide = net.double()
    refused = pytest.raises(TypeError, match=r"a weight of torch\.float64")
    with fastdcgan.backend("cpu"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), refused:
        wide(x)
