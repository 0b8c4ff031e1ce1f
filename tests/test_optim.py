"""FusedAdam against torch.optim.Adam: the numbers in float64, states, groups, copies, scaling."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdcgan
from fastdcgan.dispatch import training_ops
from fastdcgan.optim import FusedAdam
from tests.helpers.tolerance import assert_as_accurate
from tests.machine import DEVICE

NATIVE = training_ops.why_not(DEVICE.type)
needs_kernel = pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))
# A scalar, parts of a vector, channels_last, and more than one chunk of any kernel.
SHAPES = [(), (1,), (17,), (64, 3, 4, 4), (3, 5, 3, 3), (70_001,)]
SETTINGS = [
    {},
    {"betas": (0.5, 0.999), "lr": 2e-4},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"maximize": True, "eps": 1e-3, "weight_decay": 0.01},
]


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    random, found = torch.Generator().manual_seed(1), []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=random)
        if len(shape) == 4 and i % 2:
            x = x.contiguous(memory_format=torch.channels_last)
        found.append(nn.Parameter(x.to(DEVICE, dtype)))
    return found


def twins(params: Sequence[Tensor], dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]


def gradients(step: int, params: Sequence[Tensor]) -> list[Tensor]:
    """Of magnitudes from 1e-4 to 1e2, in the parameters' dtypes."""
    random = torch.Generator().manual_seed(100 + step)
    return [
        (torch.randn(p.shape, generator=random) * 10.0 ** (i % 7 - 4)).to(DEVICE, p.dtype) for i, p in enumerate(params)
    ]


def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = torch.empty_like(p).copy_(grad)
    optimizer.step()


def assert_steps_agree(ours: Tensor, theirs: Tensor, steps: int, change: float) -> None:
    """Float32 weights after `steps` steps by two implementations, none of which changes a weight by more than `change`.

    An operation errs by half a unit of its result at most. A step has three for the weight (the factor of a decoupled
    decay, its product, the difference). Its change has 13, a square root halving those before it: the first moment's
    three and the second's three add to what the steps before erred by, the other seven don't. Both implementations err.
    A decay that is not decoupled must be left out: its sum with the gradient may cancel to nothing but rounding, and
    Adam divides by its size.
    """
    unit = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours, theirs, rtol=3 * steps * unit, atol=steps * (7 + 6 * steps) * unit * change)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def moments(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], name: str) -> Tensor:
    return flat([optimizer.state[p][name] for p in params])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_many_steps(settings: dict[str, Any]) -> None:
    """60 steps in float32 as near to float64's as PyTorch's own."""
    ours = parameters()
    theirs, truth = twins(ours, torch.float32), twins(ours, torch.float64)
    optimizers = [
        FusedAdam(ours, **settings),
        torch.optim.Adam(theirs, **settings),
        torch.optim.Adam(truth, **settings),
    ]
    for step in range(60):
        grads = gradients(step, ours)
        for params, optimizer in zip((ours, theirs, truth), optimizers, strict=True):
            run(optimizer, params, grads)
    for i in range(len(ours)):
        assert_as_accurate(ours[i].detach(), theirs[i].detach(), truth[i].detach(), f"parameter {i}", reduction=60)
        for name in ("exp_avg", "exp_avg_sq"):
            got, vanilla, exact = (o.state[p[i]][name] for o, p in zip(optimizers, (ours, theirs, truth), strict=True))
            assert_as_accurate(got, vanilla, exact, f"{name} of {i}", reduction=60)
    assert {float(optimizers[0].state[p]["step"]) for p in ours} == {60.0}


def test_first_step_to_the_last_bits() -> None:
    """Where nothing has added up yet.

    The change has 10.5 operations, each half a unit off at most: the first moment's two, half of the second's three,
    the square root, the two corrections of the bias and their constants' four, eps, the quotient; the weight has one.
    """
    ours = parameters()
    before, truth = [p.detach().double() for p in ours], twins(ours, torch.float64)
    grads = gradients(0, ours)
    run(FusedAdam(ours, lr=0.1), ours, grads)
    run(torch.optim.Adam(truth, lr=0.1), truth, grads)
    for p, exact, start in zip(ours, truth, before, strict=True):
        error = (p.detach().double() - exact.detach()).abs()
        unit = torch.finfo(torch.float32).eps
        assert (error <= unit / 2 * (10.5 * (exact.detach() - start).abs() + exact.detach().abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights(dtype: torch.dtype) -> None:
    """Low-precision parameters follow float32 ones that see the same gradients; alone they would stand still."""
    low = parameters(dtype)
    wide = twins(low, torch.float32)
    start, grads = [p.detach().clone() for p in low], gradients(0, low)
    optimizers = FusedAdam(low, lr=1e-5), FusedAdam(wide, lr=1e-5)
    for _ in range(40):
        run(optimizers[0], low, grads)
        run(optimizers[1], wide, grads)
    for p, w in zip(low, wide, strict=True):
        state = optimizers[0].state[p]
        assert {state[k].dtype for k in state} == {torch.float32}
        assert torch.equal(state["master"], w) and torch.equal(p, w.to(dtype))
        assert torch.equal(state["exp_avg"], optimizers[1].state[w]["exp_avg"])
    assert not torch.equal(flat(low), flat(start))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_written_along(dtype: torch.dtype) -> None:
    ours, plain = parameters(), parameters()
    copies = {p: torch.empty_like(p, dtype=dtype) for p in ours[1:]}
    optimizer, alone = FusedAdam(ours, lr=0.1, copies=copies), FusedAdam(plain, lr=0.1)
    assert all(torch.equal(c, p.to(dtype)) for p, c in copies.items())
    for step in range(3):
        run(optimizer, ours, gradients(step, ours))
        run(alone, plain, gradients(step, plain))
        assert all(torch.equal(c, p.to(dtype)) for p, c in copies.items())
    assert torch.equal(flat(ours), flat(plain))
    with torch.no_grad():
        ours[1].fill_(7)
    optimizer.write_copies()
    assert (copies[ours[1]] == 7).all()
    assert "copies" not in str(optimizer.state_dict())
    again = copy.deepcopy({"params": ours, "optimizer": optimizer, "copies": copies})
    run(again["optimizer"], again["params"], gradients(3, ours))
    assert all(torch.equal(c, p.to(dtype)) for p, c in again["copies"].items())


def test_copies_that_do_not_fit() -> None:
    p, other = parameters(shapes=[(4, 3)])[0], parameters(shapes=[(5,)])[0]
    for copies, error, message in [
        ({other: torch.zeros(5, dtype=torch.bfloat16)}, ValueError, r"\[5\] that is none of the parameters"),
        ({p: torch.zeros(4, 3, device=DEVICE)}, TypeError, "got torch.float32 of torch.float32"),
        ({p: torch.zeros(3, 4, dtype=torch.float16, device=DEVICE)}, ValueError, r"shape \[3, 4\].*expected \[4, 3\]"),
        ({p: torch.zeros(3, 4, dtype=torch.float16, device=DEVICE).t()}, ValueError, r"strides \(1, 4\)"),
    ]:
        with pytest.raises(error, match=message):
            FusedAdam([p], copies=copies)


# --- states ---


@pytest.mark.parametrize("other", [{}, {"fused": True}, {"foreach": True}, {"capturable": False, "foreach": False}])
def test_state_dicts_go_both_ways(other: dict[str, Any]) -> None:
    settings = {"lr": 0.01, "betas": (0.5, 0.99), "weight_decay": 0.1, "decoupled_weight_decay": True}
    first, second = parameters(), parameters()
    theirs, ours = torch.optim.Adam(first, **settings, **other), FusedAdam(second)
    for step in range(3):
        run(theirs, first, gradients(step, first))
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # PyTorch shares what it need not convert
    assert ours.param_groups[0]["lr"] == 0.01
    third = twins(first, torch.float32)
    back = torch.optim.Adam(third)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    for step in range(3, 6):
        for optimizer, params in ((theirs, first), (ours, second), (back, third)):
            run(optimizer, params, gradients(step, params))
    for params in (second, third):
        assert_steps_agree(flat(params), flat(first), steps=6, change=0.02)
    assert {float(ours.state[p]["step"]) for p in second} == {6.0}


def test_own_state_dict_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ours = parameters(dtype)
        optimizer = FusedAdam(ours, lr=0.01)
        for step in range(3):
            run(optimizer, ours, gradients(step, ours))
        others = twins(ours, dtype)
        resumed = FusedAdam(others)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for params, o in ((ours, optimizer), (others, resumed)):
            for step in range(3, 5):
                run(o, params, gradients(step, params))
        assert torch.equal(flat(ours), flat(others))
        for name in ("exp_avg", "exp_avg_sq", *(("master",) if dtype == torch.bfloat16 else ())):
            assert torch.equal(moments(optimizer, ours, name), moments(resumed, others, name))
            assert moments(resumed, others, name).dtype == torch.float32


def test_low_precision_state_of_torch() -> None:
    """torch.optim.Adam keeps moments in the parameter's dtype, and loads ours rounded."""
    first, second = parameters(torch.bfloat16), parameters(torch.bfloat16)
    theirs, ours = torch.optim.Adam(first), FusedAdam(second)
    run(theirs, first, gradients(0, first))
    ours.load_state_dict(theirs.state_dict())
    run(ours, second, gradients(1, second))
    assert moments(ours, second, "exp_avg").dtype == torch.float32
    theirs.load_state_dict(ours.state_dict())
    assert moments(theirs, first, "exp_avg").dtype == torch.bfloat16
    run(theirs, first, gradients(2, first))


def test_state_lies_as_the_parameter_does() -> None:
    (p,) = parameters(shapes=[(8, 3, 4, 4)])
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    expected, exact = twins([p], torch.float32)[0], twins([p], torch.float64)[0]
    ours, theirs, truth = FusedAdam([p]), torch.optim.Adam([expected]), torch.optim.Adam([exact])
    for step in range(2):
        (grad,) = gradients(step, [p])
        p.grad = grad.clone().contiguous()  # not as the parameter lies
        ours.step()
        run(theirs, [expected], [grad])
        run(truth, [exact], [grad])
        state = copy.deepcopy(ours.state_dict())
        for name in ("exp_avg", "exp_avg_sq"):
            state["state"][0][name] = state["state"][0][name].contiguous()
        ours.load_state_dict(state)
    assert_as_accurate(p.detach(), expected.detach(), exact.detach(), "parameter", reduction=2)
    p.grad = None
    ours.step()
    assert_as_accurate(p.detach(), expected.detach(), exact.detach(), "parameter", reduction=2)


def test_a_step_that_is_set() -> None:
    """`state["step"]` counts what is done next, however it came to its value."""
    ours, theirs = parameters(), parameters()
    optimizer, vanilla = FusedAdam(ours), torch.optim.Adam(theirs)
    for step, value in enumerate((0.0, 3.0, 100.0)):
        for o, params in ((optimizer, ours), (vanilla, theirs)):
            for p in params:
                if "step" in o.state[p]:
                    o.state[p]["step"].fill_(value)
            run(o, params, gradients(step, params))
    assert_steps_agree(flat(ours), flat(theirs), steps=3, change=2e-3)
    assert {float(optimizer.state[p]["step"]) for p in ours} == {101.0}


# --- groups, gradients, refusals ---


def test_groups_and_missing_gradients() -> None:
    ours, theirs = parameters(), parameters()

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        second = {"weight_decay": 0.2, "decoupled_weight_decay": True, "betas": (0.5, 0.9)}
        return [{"params": params[:2], "lr": 0.1}, {"params": params[2:], **second}]

    optimizer, vanilla = FusedAdam(groups(ours)), torch.optim.Adam(groups(theirs))
    for step in range(4):
        for o, params in ((optimizer, ours), (vanilla, theirs)):
            for i, (p, grad) in enumerate(zip(params, gradients(step, params), strict=True)):
                p.grad = None if i == step else grad
            o.step()
    for part, change in ((slice(2), 0.2), (slice(2, None), 2e-3)):
        assert_steps_agree(flat(ours[part]), flat(theirs[part]), steps=4, change=change)
    assert [float(optimizer.state[p]["step"]) for p in ours] == [3, 3, 3, 3, 4, 4]


def test_closure_and_zero_grad() -> None:
    (p,) = parameters(shapes=[(3,)])
    optimizer = FusedAdam([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).detach()
    assert optimizer.step(closure).detach() < first


def test_learning_rate_as_a_tensor() -> None:
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(0.1, device=DEVICE)
    optimizer, vanilla = FusedAdam(ours, lr=lr), FusedAdam(theirs, lr=0.1)
    for step in range(2):
        run(optimizer, ours, gradients(step, ours))
        run(vanilla, theirs, gradients(step, theirs))
        lr.fill_(0.01)
        vanilla.param_groups[0]["lr"] = 0.01
    assert_steps_agree(flat(ours), flat(theirs), steps=2, change=0.2)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"real floating-point parameters, got one of torch\.complex64"):
        FusedAdam([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="-1"):
        FusedAdam(parameters(), lr=-1.0)
    p = nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(TypeError, match="copies is 3: expected a dict"):
        FusedAdam([p], copies=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensors of parameters, got NoneType of Parameter"):
        FusedAdam([p], copies={p: None})  # type: ignore[dict-item]
    optimizer = FusedAdam([p])
    p.grad = torch.zeros(4, 2).to_sparse()
    with pytest.raises(TypeError, match=r"dense gradients, got one of layout torch\.sparse_coo"):
        optimizer.step()


def test_what_the_kernel_does_not_cover() -> None:
    """float64, amsgrad and tensors with gaps: PyTorch's own, to the bit, and `explain` says so."""
    base = torch.randn(6, 8, device=DEVICE)
    for make, settings, why in [
        (lambda: parameters(torch.float64), {}, "not torch.float64"),
        (parameters, {"amsgrad": True}, "no amsgrad"),
        (lambda: [nn.Parameter(base.clone()[:, ::2])], {}, r"without gaps, not strides \(8, 2\)"),
    ]:
        ours = make()
        # PyTorch's fused Adam is right only where all tensors are without gaps and lie alike.
        theirs = [nn.Parameter(torch.empty_like(p).copy_(p).detach()) for p in ours]
        optimizer, vanilla = FusedAdam(ours, **settings), torch.optim.Adam(theirs, fused=True, **settings)
        for step in range(3):
            for p, grad in zip(ours, gradients(step, ours), strict=True):
                p.grad = grad
            optimizer.step()
            run(vanilla, theirs, gradients(step, theirs))
        assert torch.equal(flat(ours), flat(theirs))
        if NATIVE is None:
            assert re.search(rf"by torch \(.*{why}\)", optimizer.explain())


@needs_kernel
def test_explain() -> None:
    optimizer = FusedAdam([{"params": parameters()}, {"params": parameters(torch.bfloat16)}])
    count = sum(math.prod(shape) for shape in SHAPES)
    device = optimizer.param_groups[0]["params"][0].device
    assert optimizer.explain().splitlines() == [
        f"group {i}: {len(SHAPES)} tensors, {count} values, {dtype} on {device}: one fused pass"
        for i, dtype in enumerate((torch.float32, torch.bfloat16))
    ]
    with fastdcgan.backend("reference"):
        assert optimizer.explain().count("by torch (the backend 'reference' was asked for)") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_and_kernel_agree(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, plain = FusedAdam(ours, lr=0.01), FusedAdam(theirs, lr=0.01)
    for step in range(3):
        run(optimizer, ours, gradients(step, ours))
        with fastdcgan.backend("reference"):
            run(plain, theirs, gradients(step, theirs))
    torch.testing.assert_close(moments(optimizer, ours, "exp_avg"), moments(plain, theirs, "exp_avg"))
    if dtype != torch.float32:
        for o, params in ((optimizer, ours), (plain, theirs)):
            masters = [o.state[p]["master"] for p in params]
            assert all(torch.equal(p, m.to(dtype)) for p, m in zip(params, masters, strict=True))
            params[:] = masters
    assert_steps_agree(flat(ours), flat(theirs), steps=3, change=0.02)


# --- scaled gradients, determinism ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_grad_scaler(dtype: torch.dtype) -> None:
    """Scaled gradients are unscaled, where they lie as well; a step with infinity in it is not done nor counted."""
    ours, expected = parameters(dtype), parameters(dtype)
    optimizer, plain = FusedAdam(ours, lr=0.1), FusedAdam(expected, lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0, growth_interval=1000)
    for step in range(4):
        before, grads = flat(ours), [0.01 * g for g in gradients(step, ours)]
        for p, grad in zip(ours, grads, strict=True):
            p.grad = (grad.float() * float(scaler.scale(torch.ones((), device=DEVICE)))).to(dtype)
        bad = step == 1
        if bad:
            ours[2].grad[3] = math.inf
        kept = [p.grad.clone() for p in ours]
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert torch.equal(flat(ours), before) and scaler.get_scale() == 128.0
            assert all(torch.equal(p.grad, k) for p, k in zip(ours, kept, strict=True))
            continue
        run(plain, expected, [p.grad for p in ours])
        assert torch.equal(flat(ours), flat(expected))
        torch.testing.assert_close(flat([p.grad for p in ours]), flat(grads), rtol=2e-3, atol=1e-6)
    assert {float(optimizer.state[p]["step"]) for p in ours} == {3.0}


def test_scaled_gradient_that_lies_otherwise() -> None:
    p = nn.Parameter(torch.randn(4, 3, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last))
    optimizer, scaler = FusedAdam([p]), torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    scaler.scale(torch.zeros((), device=DEVICE))
    p.grad = torch.full_like(p, 8.0).contiguous()
    scaler.step(optimizer)
    assert (p.grad == 1).all()


@needs_kernel
@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=6))
def test_same_bits_for_any_lengths_and_threads(lengths: list[int]) -> None:
    threads, results = torch.get_num_threads(), []
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            ours = parameters(shapes=[(n,) for n in lengths])
            optimizer = FusedAdam(ours, **settings)
            for step in range(2):
                run(optimizer, ours, gradients(step, ours))
            results.append(torch.cat([flat(ours), moments(optimizer, ours, "exp_avg_sq")]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])
    theirs = parameters(shapes=[(n,) for n in lengths])
    vanilla = torch.optim.Adam(theirs, **settings)
    for step in range(2):
        run(vanilla, theirs, gradients(step, theirs))
    assert_steps_agree(results[0][: sum(lengths)], flat(theirs), steps=2, change=0.2)


@needs_kernel
def test_the_operator_checks_its_lists() -> None:
    def call(**changes: Any) -> None:
        tensors = {
            name: [torch.zeros(4, device=DEVICE)] for name in ("weights", "grads", "exp_avgs", "exp_avg_sqs", "copies")
        }
        tensors = {**tensors, "copies": [torch.empty(0)], "steps": [torch.zeros(1, device=DEVICE)], **changes}
        scalars = (0.1, None, 0.9, 0.99, 1e-8, 0.0, False, False, False, None, None)
        training_ops.operators(DEVICE.type).adam_(*tensors.values(), *scalars)

    call()
    for changes, error, message in [
        ({"grads": []}, ValueError, "expected lists of 1, got one of 0"),
        ({"grads": [torch.zeros(5, device=DEVICE)]}, ValueError, r"a gradient dense and of shape \[4\], got \[5\]"),
        ({"grads": [torch.zeros(4, device=DEVICE).double()]}, TypeError, "a floating-point gradient"),
        ({"exp_avgs": [torch.zeros(4, device=DEVICE).half()]}, TypeError, "float32 as exp_avg"),
        ({"exp_avg_sqs": [torch.zeros(8, device=DEVICE)[::2]]}, ValueError, r"exp_avg_sq dense and of shape \[4\]"),
        ({"copies": [torch.zeros(4, device=DEVICE)]}, TypeError, "a copy of bfloat16 or float16"),
    ]:
        with pytest.raises((error, RuntimeError), match=message):
            call(**changes)
