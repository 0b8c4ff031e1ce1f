"""FusedAdam on tensors that lie in memory otherwise than their parameter, or with gaps; and what autograd saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdcgan.optim import FusedAdam
from tests.machine import DEVICE

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "with gaps": lambda t: torch.zeros([2 * n for n in t.shape], dtype=t.dtype, device=t.device)[
        ::2, ::2, ::2, ::2
    ].copy_(t),
}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_any_layout_of_parameter_and_gradient(
    of_parameter: str, of_grad: str, dtype: torch.dtype, amsgrad: bool
) -> None:
    """In whatever order they lie, an update is that of the same numbers lying plainly."""
    random = torch.Generator().manual_seed(3)
    start = torch.randn(8, 4, 3, 3, generator=random).to(DEVICE, dtype)
    ours, plain = nn.Parameter(LAYOUTS[of_parameter](start.clone())), nn.Parameter(start.clone())
    optimizers = [FusedAdam([p], lr=1e-2, amsgrad=amsgrad) for p in (ours, plain)]
    for _ in range(3):
        grad = torch.randn(8, 4, 3, 3, generator=random).to(DEVICE, dtype)
        ours.grad, plain.grad = LAYOUTS[of_grad](grad), grad
        for optimizer in optimizers:
            optimizer.step()
    # One may run in the kernel and the other in PyTorch's: a few roundings of the arithmetic in each of three steps,
    # and of the result in its own dtype.
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    most = 3 * 4 * arithmetic * float(plain.detach().abs().max())
    torch.testing.assert_close(ours, plain, rtol=torch.finfo(dtype).eps, atol=most)
    assert float((plain.detach() - start).abs().mean()) > 1e-2


@pytest.mark.parametrize("scaled", [False, True])
def test_nothing_is_written_between_the_values_of_a_parameter(scaled: bool) -> None:
    base = torch.zeros(8, 8, device=DEVICE)
    p = nn.Parameter(base[::2, ::2])
    optimizer = FusedAdam([p], lr=1.0)
    p.grad = torch.full((4, 4), 2.0 if scaled else 1.0, device=DEVICE)
    if scaled:
        optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device=DEVICE)  # type: ignore[attr-defined]
    optimizer.step()
    expected = torch.zeros(8, 8, device=DEVICE)
    expected[::2, ::2] = -1
    torch.testing.assert_close(base, expected)
    torch.testing.assert_close(p.grad, torch.ones(4, 4, device=DEVICE))  # unscaled where it lies


def test_a_parameter_that_changed_since_it_was_saved_is_noticed() -> None:
    w = nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    FusedAdam([w], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
