"""What a backward reads, and so what may change in place between forward and backward: as with the plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastdcgan.engine.program import Program
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Block, Boundaries, Plan
from tests.helpers.twins import assert_same, numbers, prepared, twin


def model() -> nn.Sequential:
    return prepared(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 5, 3), nn.PReLU(5),
            nn.ConvTranspose2d(5, 2, 3), nn.BatchNorm2d(2), nn.Tanh(),
        )
    )  # fmt: skip


TENSORS = ("input", *(name for name, _ in model().named_parameters()))
TRAINED = {
    "everything": lambda name: True,
    "vectors": lambda name: "bias" in name or name[0] in "16",
    "norms": lambda name: name[0] in "16",
    "the last block": lambda name: name[0] in "56",
}


def change_in_place(net: nn.Module, name: str, trained: str, input_needs: bool) -> dict[str, torch.Tensor] | None:
    """The gradients where `name` changes between forward and backward; None where that raises."""
    for key, parameter in net.named_parameters():
        parameter.requires_grad_(TRAINED[trained](key))
    x = numbers(2, 3, 8, 8).requires_grad_(input_needs)
    passed_on = x * 1
    out = net(passed_on)
    with torch.no_grad():
        (passed_on if name == "input" else net.get_parameter(name)).add_(1)
    try:
        out.sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None
    found = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    return found | ({"x": x.grad} if input_needs else {})


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("trained", TRAINED)
def test_a_change_in_place_raises_where_it_does_with_plain_modules(trained: str, train: bool) -> None:
    plain = model().train(train)
    for name in TENSORS:
        for input_needs in (False, True):
            expected = change_in_place(copy.deepcopy(plain), name, trained, input_needs)
            found = change_in_place(twin(plain), name, trained, input_needs)
            assert (found is None) == (expected is None), f"{name}, {input_needs}"
            if expected is not None:
                assert_same(found, expected)


def test_running_statistics_may_change_after_a_pass_in_eval_mode() -> None:
    plain = model().eval()
    x = numbers(2, 3, 8, 8)
    expected = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
    fused = twin(plain)
    out = fused(x)
    fused.train()(x)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), list(fused.parameters())), expected)


def test_gradients_of_gradients_need_what_was_there() -> None:
    fused = twin(model().eval())
    x = numbers(2, 3, 8, 8).requires_grad_()
    out = fused(x).sum()
    with torch.no_grad():
        fused[1].running_var.add_(1)
    with pytest.raises(RuntimeError, match=r"need the running_var of a block as it was .* version \d, expected \d"):
        torch.autograd.grad(out, x, create_graph=True)


@pytest.mark.parametrize("learns", [False, True])
def test_a_learned_slope_stays_out_of_contractions(learns: bool) -> None:
    one = Geometry((1, 1), (1, 1), (0, 0))
    first, last = (
        Block(False, one, (0, 0), None, "leaky_relu", 0.2, "reference", learns_slope=slope) for slope in (learns, False)
    )
    plan = Plan((first, last), 1, Boundaries((True,), (True,), (True, True)))
    assert Program(plan, True).plan.boundaries == Boundaries((not learns,), (not learns,), (not learns, True))
