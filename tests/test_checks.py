"""Bad calls: each raises the right exception, naming what was given and what was expected, and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan import functional
from fastdcgan.backends import NAMES
from tests.helpers.twins import block, discriminator, numbers, twin

Call = Callable[[], Any]


class Arguments:
    """Valid tensors for every functional form: x [4, 4, 8, 8], 6 output channels. Cases change one of them."""

    def __init__(self) -> None:
        self.x = numbers(4, 4, 8, 8, dtype=torch.float32)
        self.conv = numbers(6, 4, 4, 4, dtype=torch.float32).requires_grad_()
        self.transposed = numbers(4, 6, 4, 4, dtype=torch.float32).requires_grad_()
        self.mean, self.var = numbers(6, dtype=torch.float32), numbers(6, dtype=torch.float32).abs()
        self.vector = numbers(6, dtype=torch.float32)


def conv(**changes: Any) -> Callable[[Arguments], Any]:
    return lambda a: call(functional.conv_bn_act, a, a.conv, changes)


def transposed(**changes: Any) -> Callable[[Arguments], Any]:
    return lambda a: call(functional.conv_transpose_bn_act, a, a.transposed, changes)


def call(form: Callable, a: Arguments, weight: Tensor, changes: dict[str, Any]) -> Tensor:
    arguments = {"x": a.x, "weight": weight, "stride": 2, "padding": 1, "training": True}
    arguments |= {"running_mean": a.mean, "running_var": a.var}
    return form(**(arguments | {k: v(a) if callable(v) else v for k, v in changes.items()}))


FUNCTIONAL: dict[str, tuple[Callable[[Arguments], Any], type[Exception], list[str]]] = {
    "x is a list": (conv(x=[1.0]), TypeError, ["torch.Tensor", "list"]),
    "x is an array": (conv(x=lambda a: a.x.cpu().numpy()), TypeError, ["torch.Tensor", "ndarray"]),
    "x has 3 dimensions": (conv(x=lambda a: a.x[0]), ValueError, ["4D", "3D", "[4, 8, 8]"]),
    "x has 5 dimensions": (transposed(x=lambda a: a.x[None]), ValueError, ["4D", "5D"]),
    "x has other channels": (conv(x=lambda a: a.x[:, :3]), ValueError, ["4 input channels", "3", "[4, 3, 8, 8]"]),
    "transposed, other channels": (transposed(x=lambda a: a.x[:, :1]), ValueError, ["4 input channels", "1"]),
    "x in another dtype": (conv(x=lambda a: a.x.double()), TypeError, ["torch.float64", "torch.float32", "autocast"]),
    "x of integers": (conv(x=lambda a: a.x.long()), TypeError, ["torch.int64", "torch.float32"]),
    "x on another device": (conv(x=lambda a: a.x.to("meta")), ValueError, ["weight", "meta"]),
    "weight is a list": (conv(weight=[[1.0]]), TypeError, ["weight", "list"]),
    "weight of integers": (conv(weight=lambda a: a.conv.long()), TypeError, ["weight", "torch.int64"]),
    "complex weight": (conv(weight=lambda a: a.conv.cfloat()), TypeError, ["floating-point", "torch.complex64"]),
    "weight has 3 dimensions": (
        conv(weight=lambda a: a.conv[0]), ValueError, ["weight", "[Co, Ci/groups, kh, kw]", "[4, 4, 4]"],
    ),
    "transposed weight, 5": (transposed(weight=lambda a: a.transposed[None]), ValueError, ["[Ci, Co/groups, kh, kw]"]),
    "bias of another length": (conv(bias=lambda a: a.vector[:5]), ValueError, ["bias", "[6]", "[5]"]),
    "bias of two dimensions": (transposed(bias=lambda a: a.vector[None]), ValueError, ["bias", "[6]", "[1, 6]"]),
    "bias is a number": (conv(bias=0.5), TypeError, ["bias", "torch.Tensor", "float"]),
    "bn_weight of another length": (conv(bn_weight=lambda a: a.vector[:1]), ValueError, ["bn_weight", "[6]", "[1]"]),
    "bn_bias is a list": (conv(bn_bias=[0.0] * 6), TypeError, ["bn_bias", "torch.Tensor", "list"]),
    "bn_bias on another device": (conv(bn_bias=lambda a: a.vector.to("meta")), ValueError, ["bn_bias", "meta"]),
    "running_mean of another length": (
        conv(running_mean=lambda a: a.mean[:4]), ValueError, ["running_mean", "[6]", "[4]"],
    ),
    "running_mean alone": (conv(running_var=None), ValueError, ["running_mean and running_var", "only one"]),
    "running_var alone": (transposed(running_mean=None), ValueError, ["running_mean and running_var", "only one"]),
    "kernel larger than the input": (conv(x=lambda a: a.x[..., :1, :1]), ValueError, ["1x1", "too small", "(4, 4)"]),
    "nothing left of the output": (
        transposed(x=lambda a: a.x[..., :1, :1], padding=3), ValueError, ["1x1", "too small"],
    ),
    "no pixels": (conv(x=lambda a: a.x[..., :0]), ValueError, ["8x0", "too small"]),
    "stat_groups does not divide": (conv(stat_groups=3), ValueError, ["stat_groups=3", "batch of 4"]),
    "stat_groups is 0": (conv(stat_groups=0), ValueError, ["stat_groups", "at least 1", "0"]),
    "stat_groups is a float": (conv(stat_groups=2.0), TypeError, ["stat_groups", "int", "float"]),
    "stat_groups is a bool": (conv(stat_groups=True), TypeError, ["stat_groups", "int", "bool"]),
    "one value per channel": (
        conv(x=lambda a: a.x[:1, :, :2, :2]), ValueError, ["more than 1 value per channel", "[1, 6, 1, 1]"],
    ),
    "one value per group": (
        conv(x=lambda a: a.x[:, :, :2, :2], stat_groups=4),
        ValueError, ["more than 1 value per channel", "stat_groups=4"],
    ),
    "unknown activation": (conv(activation="selu"), ValueError, ["'selu'", "'leaky_relu'", "'elu'"]),
    "activation is a module": (conv(activation=lambda a: nn.ReLU()), ValueError, ["ReLU()", "'relu'"]),
    "stride 0": (conv(stride=0), ValueError, ["stride", "at least 1", "0"]),
    "stride beyond counting": (conv(stride=2**31), ValueError, ["stride", "at most 2147483647", "2147483648"]),
    "stride of three": (conv(stride=(1, 1, 1)), TypeError, ["stride", "int or two ints", "(1, 1, 1)"]),
    "stride is a float": (conv(stride=2.0), TypeError, ["stride", "int or two ints", "2.0"]),
    "negative padding": (conv(padding=-1), ValueError, ["padding", "at least 0", "-1"]),
    "padding in words": (conv(padding="same"), TypeError, ["padding", "'same'"]),
    "padding of floats": (conv(padding=(1, 0.5)), TypeError, ["padding", "(1, 0.5)"]),
    "dilation 0": (conv(dilation=(1, 0)), ValueError, ["dilation", "at least 1", "(1, 0)"]),
    "groups 0": (conv(groups=0), ValueError, ["groups", "0"]),
    "groups do not divide": (conv(groups=4), ValueError, ["groups", "6", "groups=4"]),
    "groups is a string": (conv(groups="2"), TypeError, ["groups", "'2'"]),
    "eps 0": (conv(eps=0.0), ValueError, ["eps", "positive", "0.0"]),
    "output_padding too large": (
        transposed(output_padding=2), ValueError, ["output_padding=(2, 2)", "stride=(2, 2)", "dilation=(1, 1)"],
    ),
    "output_padding negative": (transposed(output_padding=-1), ValueError, ["output_padding", "at least 0"]),
}  # fmt: skip


@pytest.fixture(params=["auto", "reference"])
def choice(request: pytest.FixtureRequest) -> Iterator[str]:
    """By name, a fast backend refuses a device or dtype before anything else is looked at."""
    with fastdcgan.backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_bad_call_of_a_functional_form(name: str, choice: str) -> None:
    function, error, fragments = FUNCTIONAL[name]
    a = Arguments()
    before = {key: value.clone() for key, value in vars(a).items()}
    with pytest.raises(error) as caught:
        function(a)
    says(caught.value, fragments)
    for key, value in before.items():
        assert torch.equal(getattr(a, key), value), f"{key} was written"
    assert a.conv.grad is None and a.transposed.grad is None


def says(error: BaseException, fragments: list[str]) -> None:
    for fragment in fragments:
        assert fragment in str(error), f"{fragment!r} is not in: {error}"


@pytest.mark.parametrize("form", [functional.conv_act, functional.conv_transpose_act])
def test_the_forms_without_batch_norm_check_too(form: Callable) -> None:
    a = Arguments()
    weight = a.conv if form is functional.conv_act else a.transposed
    for changes, error, message in [
        ({"activation": "swish"}, ValueError, "'swish'"),
        ({"stride": (0, 1)}, ValueError, r"stride must be at least 1, got \(0, 1\)"),
        ({"bias": a.vector[:2]}, ValueError, r"bias of the block must have shape \[6\], got \[2\]"),
        ({"x": a.x[0]}, ValueError, "expected 4D"),
    ]:
        with pytest.raises(error, match=message):
            form(**({"x": a.x, "weight": weight} | changes))


# --- models ----------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], list[str]]] = {
    "no tensor": (lambda m: m("image"), TypeError, ["torch.Tensor", "str"]),
    "2 dimensions": (lambda m: m(images()[0, 0]), ValueError, ["4D", "2D"]),
    "unbatched": (lambda m: m(images()[0]), ValueError, ["4D", "3D"]),
    "channels": (lambda m: m(images()[:, :1]), ValueError, ["3 input channels", "1", "[4, 1, 16, 16]"]),
    "dtype": (lambda m: m(images().half()), TypeError, ["torch.float16", "torch.float32"]),
    "device": (lambda m: m(images().to("meta")), ValueError, ["meta"]),
    "too small for a later block": (lambda m: m(images()[..., :8, :8]), ValueError, ["block 3", "2x2", "(4, 4)"]),
    "stat_groups": (lambda m: m(images(), stat_groups=3), ValueError, ["stat_groups=3", "4"]),
    "stride 0 in the module": (
        lambda m: (setattr(m[0], "stride", (0, 0)), m(images())),
        ValueError,
        ["stride must be at least 1", "(0, 0)"],
    ),
    "stat_groups of a wrong type": (lambda m: m(images(), stat_groups="2"), TypeError, ["stat_groups", "str"]),
}


def images() -> Tensor:
    return numbers(4, 3, 16, 16, dtype=torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_bad_call_of_a_model(name: str, choice: str) -> None:
    function, error, fragments = MODELS[name]
    model = twin(discriminator().float())
    model(images()).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}  # type: ignore[union-attr]
    with pytest.raises(error) as caught:
        function(model)
    says(caught.value, fragments)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} was written"
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, grads[key])


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("3.running_var", Tensor.long, r"running_var of block 1 must be a floating-point tensor, got torch\.int64"),
        ("3.weight", Tensor.cfloat, r"bn_weight of block 1 must be a floating-point tensor, got torch\.complex64"),
        ("0.bias", Tensor.cfloat, r"bias of block 0 must be a floating-point tensor, got torch\.complex64"),
        (
            "0.weight",
            Tensor.to_sparse,
            r"weight of block 0 must be a dense tensor, got one of layout torch\.sparse_coo",
        ),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_tensors_that_no_block_takes(name: str, kind: Callable, message: str, train: bool) -> None:
    model = twin(discriminator().float()).train(train)
    path, _, tensor = name.rpartition(".")
    module = model.get_submodule(path)
    changed = kind(getattr(module, tensor).detach())
    setattr(module, tensor, changed if tensor.startswith("running") else nn.Parameter(changed))
    with pytest.raises(TypeError, match=message):
        model(images())


def test_a_later_block_with_one_value_per_channel_writes_nothing_to_an_earlier_one() -> None:
    model = twin(
        nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 8), nn.BatchNorm2d(5), nn.ReLU()
        )
    )
    model.to(images().device)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        model(images()[:1])
    says(caught.value, ["block 1", "[1, 5, 1, 1]"])
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert model.eval()(images()[:1]).shape == (1, 5, 1, 1)


@pytest.mark.parametrize(
    "kind", [fastdcgan.ConvBNAct2d, fastdcgan.ConvTransposeBNAct2d, fastdcgan.ConvAct2d, fastdcgan.ConvTransposeAct2d]
)
def test_a_layer_with_an_unknown_activation(kind: type) -> None:
    with pytest.raises(ValueError, match="unknown activation 'prelu': expected one of 'identity', 'relu'"):
        kind(3, 4, 4, activation="prelu")


def test_complex_numbers_run_as_in_vanilla() -> None:
    vanilla = nn.Sequential(nn.Conv2d(2, 3, 3, dtype=torch.complex64), nn.Tanh())
    x = torch.randn(2, 2, 5, 5, dtype=torch.complex64)
    results = []
    for model in (twin(vanilla), vanilla):
        given = x.clone().requires_grad_()
        out = model(given)
        results.append((out, *torch.autograd.grad(out.abs().sum(), [given, *model.parameters()])))
    torch.testing.assert_close(*results)


# --- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cudnn", "", "CPU", None])
def test_an_unknown_backend(name: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown backend {name!r}")) as caught, fastdcgan.backend(name):
        pass
    says(caught.value, ["'auto'", *map(repr, NAMES)])
    assert fastdcgan.backends()["reference"] == "available"


def test_a_backend_that_can_not_run_here_says_why() -> None:
    status = fastdcgan.backends()
    missing = [name for name in NAMES if status[name] != "available"]
    if not missing:
        pytest.skip("every backend can run here")
    for name in missing:
        with pytest.raises(fastdcgan.Unavailable) as caught, fastdcgan.backend(name):
            pass
        says(caught.value, [repr(name), status[name], "'reference'"])
    assert isinstance(caught.value, RuntimeError)


def test_a_backend_that_does_not_take_the_dtype_says_so() -> None:
    """Asked for by name it raises; "auto" runs the block on the reference."""
    if fastdcgan.backends()["cpu"] != "available":
        pytest.skip(fastdcgan.backends()["cpu"])
    model, x = twin(block(False, "train", "relu").cpu()), numbers(4, 4, 6, 6).cpu()
    assert x.dtype == torch.float64
    with fastdcgan.backend("cpu"), pytest.raises(fastdcgan.Unavailable) as caught:
        model(x)
    says(caught.value, ["'cpu'", "float32", "float64", "those that can: reference"])
    assert int(model[1].num_batches_tracked) == 0
    with fastdcgan.backend("auto"):
        assert model(x).dtype == torch.float64


def test_the_choice_of_a_backend_ends_with_the_with() -> None:
    from fastdcgan import backends

    before = backends.requested()
    with fastdcgan.backend("reference"):
        assert backends.requested() == "reference"
    assert backends.requested() == before
    with pytest.raises(ZeroDivisionError), fastdcgan.backend("reference"):
        _ = 1 / 0
    assert backends.requested() == before


def test_a_slope_that_does_not_fit(device: torch.device) -> None:
    model, x = fastdcgan.FusedSequential(nn.Conv2d(3, 4, 3), nn.PReLU(4)).to(device), torch.randn(2, 3, 5, 5).to(device)
    with fastdcgan.backend("reference"):
        model[1].double()
        with pytest.raises(TypeError, match=r"PReLU's weight of the block must .* torch.float32, got torch.float64"):
            model(x)
        model[1].weight = nn.Parameter(torch.ones(3, device=device))
        with pytest.raises(ValueError, match=r"slope of the block must have shape \[4\], got \[3\]"):
            model(x)
