"""The tolerance helper itself: it accepts honest rounding and rejects results that are wrong by a little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.tolerance import allowance, assert_as_accurate, assert_same_float64, verdict

N, CI, CO, SIZE = 4, 16, 24, 8
FAN_IN = CI * 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, the convolution as PyTorch has it in `dtype`, and in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, CI, SIZE, SIZE, generator=g).to(dtype)
    weight = torch.randn(CO, CI, 4, 4, generator=g).to(dtype)
    return x, weight, F.conv2d(x, weight, None, 2, 1), F.conv2d(x.double(), weight.double(), None, 2, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_vanilla_itself_and_the_rounded_truth(dtype: torch.dtype) -> None:
    _, _, vanilla, truth = case(dtype)
    assert verdict(vanilla, vanilla, truth, reduction=FAN_IN) == []
    assert verdict(truth.to(dtype), vanilla, truth, reduction=FAN_IN) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(10))
def test_accepts_another_order_of_summation(dtype: torch.dtype, seed: int) -> None:
    x, weight, vanilla, truth = case(dtype, seed)
    acc = torch.zeros(truth.shape)
    padded = F.pad(x.float(), (1, 1, 1, 1))
    for ky in reversed(range(4)):
        for kx in range(4):
            taps = padded[:, :, ky : ky + SIZE - 1 : 2, kx : kx + SIZE - 1 : 2]
            acc += torch.einsum("nchw,oc->nohw", taps, weight[:, :, ky, kx].float())
    assert_as_accurate(acc.to(dtype), vanilla, truth, reduction=FAN_IN)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_the_truth_where_vanilla_is_exact(dtype: torch.dtype) -> None:
    exact = torch.arange(-64, 64, dtype=dtype).reshape(1, 8, 4, 4)
    assert verdict(exact, exact, exact.double()) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_one_element_off(dtype: torch.dtype) -> None:
    _, _, vanilla, truth = case(dtype)
    wrong = vanilla.clone()
    off = 20 * allowance(dtype, FAN_IN) * float(truth.std())
    wrong[2, 3, 1, 2] = float(truth[2, 3, 1, 2]) + off
    assert any("largest error" in fault for fault in verdict(wrong, vanilla, truth, reduction=FAN_IN))


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 1e-3), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rejects_a_scaled_result(dtype: torch.dtype, by: float) -> None:
    _, _, vanilla, truth = case(dtype)
    wrong = (truth * (1 + by)).to(dtype)
    assert any(fault.startswith("scale") for fault in verdict(wrong, vanilla, truth, reduction=FAN_IN))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_a_bias_far_below_the_error_of_one_element(dtype: torch.dtype) -> None:
    _, _, vanilla, truth = case(dtype)
    usual = float((vanilla.double() - truth).square().mean().sqrt())
    wrong = vanilla.double() + 0.6 * (2 * usual + 2 * allowance(dtype, FAN_IN) * float(truth.std()))
    faults = verdict(wrong.to(dtype), vanilla, truth, reduction=FAN_IN)
    assert any("mean signed error" in fault for fault in faults), faults


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rejects_truncation_in_place_of_rounding(dtype: torch.dtype) -> None:
    _, _, vanilla, truth = case(dtype)
    rounded = truth.to(dtype)
    inward = torch.nextafter(rounded, torch.zeros_like(rounded))
    truncated = torch.where(rounded.double().abs() > truth.abs(), inward, rounded)
    assert verdict(truncated, vanilla, truth, reduction=FAN_IN) != []


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_a_dropped_tap_of_one_channel(dtype: torch.dtype) -> None:
    x, weight, vanilla, truth = case(dtype)
    weight = weight.clone()
    weight[5, 7, 3, 3] = 0
    assert verdict(F.conv2d(x, weight, None, 2, 1), vanilla, truth, reduction=FAN_IN) != []


@pytest.mark.parametrize(
    ("dtype", "lower"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)],
)
def test_rejects_too_low_a_precision(dtype: torch.dtype, lower: torch.dtype) -> None:
    x, weight, vanilla, truth = case(dtype)
    result = F.conv2d(x.to(lower), weight.to(lower), None, 2, 1).to(dtype)
    assert len(verdict(result, vanilla, truth, reduction=FAN_IN)) >= 2
    assert verdict(truth.to(lower).to(dtype), vanilla, truth, reduction=FAN_IN) != []


def test_rejects_a_low_precision_accumulator_of_a_weight_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32768, 8, generator=g).bfloat16() for _ in range(2))
    truth = a.double().T @ b.double()
    vanilla = (a.float().T @ b.float()).bfloat16()
    acc = torch.zeros(8, 8, dtype=torch.bfloat16)
    for i in range(0, 32768, 64):
        acc += (a[i : i + 64].float().T @ b[i : i + 64].float()).bfloat16()
    assert verdict(acc, vanilla, truth, reduction=32768) != []


def test_rejects_another_direction_of_the_same_norm() -> None:
    _, _, vanilla, truth = case(torch.float32)
    turned = truth + 1e-4 * truth.roll(1, 0)
    turned *= truth.norm() / turned.norm()
    assert any("angle" in fault for fault in verdict(turned.float(), vanilla, truth, reduction=FAN_IN))


def test_rejects_zero_and_nan_and_shape_and_dtype() -> None:
    _, _, vanilla, truth = case(torch.float32)
    assert verdict(torch.zeros_like(vanilla), vanilla, truth, reduction=FAN_IN) != []
    wrong = vanilla.clone()
    wrong[0, 0, 0, 0] = torch.nan
    assert "NaN" in verdict(wrong, vanilla, truth)[0]
    assert "expected" in verdict(vanilla[:1], vanilla, truth)[0]
    assert "expected" in verdict(vanilla.double(), vanilla, truth)[0]


def test_scale_grants_rounding_to_results_that_cancel() -> None:
    vanilla = torch.tensor([1e-9, -2e-9, 1e-9, 0.0])
    got, truth = torch.tensor([1e-8, -1e-8, 2e-8, 1e-8]), torch.zeros(4, dtype=torch.float64)
    assert verdict(got, vanilla, truth) != []
    assert verdict(got, vanilla, truth, scale=1.0) == []


def test_assertions_fail_and_say_what() -> None:
    _, _, vanilla, truth = case(torch.float32)
    with pytest.raises(AssertionError, match=r"dx .*largest error"):
        assert_as_accurate(vanilla + 1, vanilla, truth, "dx")
    with pytest.raises(AssertionError, match="dw is off by"):
        assert_same_float64(truth + 1e-8, truth, "dw")
    with pytest.raises(AssertionError, match="None"):
        assert_same_float64(None, truth)
    with pytest.raises(AssertionError, match="float64"):
        assert_same_float64(truth.float(), truth)
    assert_same_float64(truth + 1e-12, truth)


def test_terms_that_are_rounded_widen_the_bound_by_a_rounding_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 64, dtype=torch.float64, generator=generator)
    rounded = (values * (1 + torch.finfo(torch.float16).eps * (torch.rand(8, 64, generator=generator) - 0.5))).float()
    truth, got = values.sum(1), rounded.sum(1)
    vanilla = truth.float()  # which happened to have almost no error
    assert verdict(got, vanilla, truth, reduction=64, scale=8.0)
    assert verdict(got, vanilla, truth, reduction=64, scale=8.0, terms=torch.float16) == []
    wrong = truth.float() + 0.002 * 8.0
    assert verdict(wrong, vanilla, truth, reduction=64, scale=8.0, terms=torch.float16)
