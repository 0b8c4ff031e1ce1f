"""The loss and its monitored means against float64 and PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fastdcgan
from fastdcgan.dispatch import training_ops
from fastdcgan.functional import bce_with_logits
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_logits(count: int, dtype: torch.dtype, spread: float = 3.0) -> Tensor:
    x = spread * torch.randn(count, generator=torch.Generator().manual_seed(count))
    return x.to(DEVICE, dtype).requires_grad_()


def vanilla(logits: Tensor, label: float) -> tuple[Tensor, Tensor]:
    x = logits if logits.dtype == torch.float64 else logits.float()
    return F.binary_cross_entropy_with_logits(x, torch.full_like(x, label)), x.detach().sigmoid().mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    count=st.integers(1, 3000), label=st.sampled_from([0.0, 0.1, 0.9, 1.0]), spread=st.sampled_from([0.1, 3.0, 50.0])
)
def test_one_label(dtype: torch.dtype, count: int, label: float, spread: float) -> None:
    x = random_logits(count, dtype, spread)
    exact = x.detach().double().requires_grad_()
    results = [bce_with_logits(x, label), vanilla(x, label), vanilla(exact, label)]
    for i, what in enumerate(("loss", "probability")):
        got, usual, truth = (r[i].detach() for r in results)
        assert got.dtype == torch.float32 and got.shape == ()
        assert_as_accurate(got, usual, truth, what, scale=max(1.0, float(truth)))
    grads = [torch.autograd.grad(r[0], t)[0] for r, t in zip(results, (x, x, exact), strict=True)]
    assert grads[0].dtype == dtype
    assert_as_accurate(grads[0], grads[1], grads[2], "gradient", scale=1 / count)


def test_parts() -> None:
    """[real; fake] as one batch: the same numbers as two calls, and gradients that know their part."""
    x = random_logits(2 * 37, torch.float32)
    losses, probabilities = bce_with_logits(x.view(74, 1, 1, 1), (0.9, 0.0))
    assert losses.shape == probabilities.shape == (2,) and not probabilities.requires_grad
    singles = [bce_with_logits(part, label) for part, label in zip(x.chunk(2), (0.9, 0.0), strict=True)]
    torch.testing.assert_close(losses, torch.stack([s[0] for s in singles]))
    torch.testing.assert_close(probabilities, torch.stack([s[1] for s in singles]))
    (grad,) = torch.autograd.grad(2 * losses[0] - 3 * losses[1], x)
    expected = torch.autograd.grad(2 * singles[0][0] - 3 * singles[1][0], x)[0]
    torch.testing.assert_close(grad, expected)
    assert bce_with_logits(x, [0.5])[0].shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_far_out(dtype: torch.dtype) -> None:
    """Finite losses, exact where exact is possible; infinities and NaN where PyTorch has them."""
    far = torch.tensor([60000.0, -60000.0, 100.0, -100.0, 0.0, -0.0], dtype=dtype, device=DEVICE)
    for x in far[:, None]:
        for label in (0.0, 0.9, 1.0):
            got, expected = bce_with_logits(x, label), vanilla(x, label)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-30)
    for value in (math.inf, -math.inf, math.nan):
        x = torch.tensor([1.0, value], dtype=dtype, device=DEVICE, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        got, expected = bce_with_logits(x, 0.9), vanilla(y, 0.9)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)
        for loss in (got[0], expected[0]):
            loss.backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=2e-3, atol=1e-6, equal_nan=True)


def test_derivatives_of_any_order() -> None:
    x = random_logits(7, torch.float64)
    assert torch.autograd.gradcheck(lambda t: bce_with_logits(t, (0.9,))[0], (x,))
    assert torch.autograd.gradgradcheck(lambda t: bce_with_logits(t, 0.3)[0], (x,))
    # The kernel's own node, differentiated twice.
    low = x.detach().float().requires_grad_()
    second = []
    for t in (low, x):
        (first,) = torch.autograd.grad(bce_with_logits(t, 0.3)[0].square(), t, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), t)[0])
    torch.testing.assert_close(second[0].double(), second[1], rtol=1e-5, atol=1e-7)


def test_scaled_gradients_of_half_precision_survive() -> None:
    """float16 has nothing below 6e-8: a gradient is scaled before it is rounded to that."""
    x = torch.full((4096,), 6.0, dtype=torch.float16, device=DEVICE, requires_grad=True)
    loss, _ = bce_with_logits(x, 1.0)
    (loss * 65536.0).backward()
    expected = -65536 / 4096 * torch.sigmoid(torch.tensor(-6.0, dtype=torch.float64))
    torch.testing.assert_close(x.grad.double().cpu(), expected.expand(4096), rtol=1e-3, atol=0)


def test_no_gradient_is_asked_for() -> None:
    x = random_logits(5, torch.float32)
    with torch.no_grad():
        loss, _ = bce_with_logits(x, 1.0)
    assert not loss.requires_grad
    assert not bce_with_logits(x.detach(), 1.0)[0].requires_grad


def test_reference_and_kernel_agree() -> None:
    x = random_logits(100, torch.float32)
    got = bce_with_logits(x, (0.9, 0.0))
    with fastdcgan.backend("reference"):
        expected = bce_with_logits(x, (0.9, 0.0))
    torch.testing.assert_close(got, expected)
    assert type(got[0].grad_fn).__name__ == (
        "_BCEBackward" if training_ops.why_not(DEVICE.type) is None else "MeanBackward1"
    )


def test_compiled() -> None:
    x = random_logits(64, torch.float32)
    compiled = torch.compile(lambda t: bce_with_logits(t, (0.9, 0.0)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), bce_with_logits(x, (0.9, 0.0)))


def test_bad_calls() -> None:
    with pytest.raises(TypeError, match=r"floating-point tensor of logits, got torch.int64"):
        bce_with_logits(torch.zeros(3, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match=r"2 equal parts, got \[3\]"):
        bce_with_logits(torch.zeros(3), (1.0, 0.0))
    for labels in ("1", ["1", "0"], None, torch.ones(2)):
        with pytest.raises(TypeError, match="labels must be a number, or a tuple or list of numbers, got"):
            bce_with_logits(torch.zeros(2), labels)
    with pytest.raises(ValueError, match=r"labels must be finite, got \(nan, 0.0\)"):
        bce_with_logits(torch.zeros(2), (math.nan, 0.0))
    for labels in ((), 1.0):
        with pytest.raises(ValueError, match="equal parts, got"):
            bce_with_logits(torch.zeros(0), labels)
