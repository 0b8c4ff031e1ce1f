"""The elementwise passes and reductions, and the image-side layers, against float64, whoever runs them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdcgan.geometry import Geometry
from fastdcgan.spec import Call, Epilogue, Operand
from tests.helpers.contractions import REFERENCE, conv_call, conv_transpose_call, reference, weight_grad_call, wide
from tests.helpers.tolerance import assert_as_accurate

# On a backend, the reference, or the module of the Triton passes, whose functions have the same arguments
PASSES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "activate": lambda on, y, da, coef: on.norm_act(Operand(y, None, coef, "relu")),
    "bn_backward": lambda on, y, da, coef: on.norm_act(Operand(da, y, coef, "leaky_relu", 0.2)),
    "norm_act_reduce": lambda on, y, da, coef: on.norm_act_reduce(da, y, coef, "leaky_relu", 0.2),
    "grad_stats": lambda on, y, da, coef: on.grad_stats(da, y, coef, "leaky_relu", 0.2)[0],
    "batch_stats": lambda on, y, da, coef: on.batch_stats(y, 2),
    "grad_coefficients": lambda on, y, da, coef: on.grad_coefficients(coef[:2].contiguous(), coef, 105),
}


def check_pass(
    name: str, dtype: torch.dtype, layout: torch.memory_format, running: contextlib.AbstractContextManager[Any]
) -> Tensor:
    """The result of a pass on a small tensor of odd sizes. `running`: gives what runs it."""
    torch.manual_seed(0)
    y, da = (torch.randn(6, 24, 5, 7).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    coef = torch.rand(4, 2, 24) + 0.3
    with running as on:
        found = PASSES[name](on, y, da, coef)
    vanilla = PASSES[name](REFERENCE, y, da, coef)
    truth = PASSES[name](REFERENCE, y.double(), da.double(), coef.double())
    terms = 3 * y[0, 0].numel()
    scale = math.sqrt(terms) if name == "norm_act_reduce" else 1
    for got, usual, true in zip(found, vanilla, truth, strict=True):
        assert_as_accurate(got, usual, true, name, reduction=terms, scale=scale)
    return found


# --- the image-side layers: the first of a discriminator, the last of a generator, their weights' gradient ------------


def image_side_calls(dtype: torch.dtype) -> dict[str, Call]:
    """Contractions between 3 and 32 channels, with what a DCGAN has before and after them."""
    torch.manual_seed(0)
    geometry = Geometry((4, 4), (2, 2), (1, 1))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    x, y, weight = tensor(2, 3, 18, 14), tensor(2, 32, 9, 7), tensor(32, 3, 4, 4)
    coef = torch.rand(4, 1, 32) + 0.3
    deferred = Operand(y, None, coef, "relu")
    return {
        "conv": conv_call(Operand(x), weight, geometry, Epilogue("activate", None, coef[:2], "leaky_relu", 0.2)),
        "conv_transpose": conv_transpose_call(
            deferred, weight, geometry, (18, 14), Epilogue("activate", None, torch.rand(2, 1, 3), "tanh")
        ),
        "weight_grad": weight_grad_call(Operand(x), Operand(y, tensor(*y.shape), coef, "leaky_relu", 0.2), geometry),
    }


def check_image_side(name: str, dtype: torch.dtype, run: Callable[[Call], Any]) -> None:
    call = image_side_calls(dtype)[name]
    found, vanilla, truth = run(call), reference(call), reference(wide(call))
    if name != "weight_grad":
        found, vanilla, truth = found[0], vanilla[0], truth[0]
    terms = {"conv": 48, "conv_transpose": 128, "weight_grad": 126}[name]
    assert_as_accurate(found, vanilla, truth, name, reduction=terms)
