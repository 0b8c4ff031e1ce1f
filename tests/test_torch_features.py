"""Fused models and the rest of PyTorch: autocast, scaling, transforms, tracing, export, checkpointing, threads."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastdcgan
from fastdcgan.activations import ACTIVATIONS
from fastdcgan.engine import planned
from tests.helpers.networks import IMAGE, VARIANTS
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.twins import assert_same, build, draw, one_thread, results, without_kinks
from tests.models import SMALL
from tests.models.dcgan import Discriminator

PAIRS = {**SMALL, **VARIANTS}


def two(dtype: torch.dtype, device: torch.device, name: str = "two blocks") -> tuple[nn.Module, nn.Module, Tensor]:
    """A vanilla model, its fused twin, and an input."""
    factory, shape = PAIRS[name]
    return build(factory, dtype, device), fastdcgan.fuse(build(factory, dtype, device)), draw(shape, dtype, device)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- dtypes and formats ----------------------------------------------------------------------------------------------


@one_thread()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["two blocks", "no norm", "momentum none", "transposed groups", "relu6 to logsigmoid", "dcgan generator"],
)
def test_16_bit_models(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """`.to(dtype)`: weights, activations and buffers in 16 bits; as accurate as vanilla."""
    factory, shape = PAIRS[name]
    found = []
    for fused, kind in ((False, dtype), (True, dtype), (False, torch.float64)):
        model = (
            build(lambda: without_kinks(factory()), torch.float32, device).to(dtype).to(kind)
        )  # float64 with the rounded parameters
        x = draw(shape, torch.float32, device).to(dtype).to(kind)
        found.append(results(fastdcgan.fuse(model) if fused else model, x, steps=1))
    vanilla, got, truth = found
    assert vanilla.keys() == got.keys()
    for key, value in vanilla.items():
        assert got[key].dtype == value.dtype
        if value.dtype == dtype:
            assert_as_accurate(got[key], value, truth[key], key, reduction=1000, scale=_module_scale(key, truth))


def _module_scale(key: str, truth: dict[str, Tensor]) -> float | None:
    """Rounding of a gradient is relative to the largest of its module (a bias before a norm has none of its own)."""
    if not key.startswith("gradient of"):
        return None
    module = key.rpartition(".")[0] + "."
    return max(float(v.square().mean().sqrt()) for k, v in truth.items() if k.startswith(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["two blocks", "dcgan discriminator", "pix2pix unet", "convolutions only", "reflect"])
def test_autocast(name: str, dtype: torch.dtype, device: torch.device) -> None:
    vanilla, fused, x = two(torch.float32, device, name)
    outs = []
    for model in (vanilla, fused):
        with torch.autocast(device.type, dtype):
            out = model(x)
        out.float().square().mean().backward()
        outs.append(out)
    assert outs[0].dtype == outs[1].dtype
    bound = 20 * torch.finfo(dtype).eps  # each of the few layers rounds a normalised value, of order 1, once or twice
    torch.testing.assert_close(outs[1].float(), outs[0].float(), rtol=bound, atol=bound)
    for key, gradient in gradients(fused).items():
        expected = gradients(vanilla)[key]
        assert gradient.dtype == expected.dtype == torch.float32
        size = max(
            float(g.norm()) for k, g in gradients(vanilla).items() if k.rpartition(".")[0] == key.rpartition(".")[0]
        )
        assert float((gradient - expected).norm()) <= 4 * bound * size, key
    with torch.autocast(device.type, dtype):
        assert fused.double()(x.double()).dtype == torch.float64  # autocast leaves float64 alone
    with torch.autocast(device.type, enabled=False):
        assert fused.float()(x).dtype == torch.float32


def test_autocast_widens_what_pytorch_widens(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Where it gives float32 of an activation, so does a chain that ends with it, and no chain that goes on."""
    row = dataclasses.replace(ACTIVATIONS["softplus"], float32_under_autocast=(device.type,))
    monkeypatch.setitem(ACTIVATIONS, "softplus", row)
    first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus()
    for modules, expected in ((first, torch.float32), ((*first, nn.Conv2d(4, 2, 1), nn.Mish()), torch.bfloat16)):
        model, x = fastdcgan.fuse(nn.Sequential(*modules)).to(device), draw(IMAGE, torch.float32, device)
        with fastdcgan.backend("reference"):
            with torch.autocast(device.type, torch.bfloat16):
                out = model(x)
                assert out.dtype == expected
                out.sum().backward()
                assert model.double()(x.double()).dtype == torch.float64
            assert model.float()(x).dtype == torch.float32
            assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_grad_scaler(device: torch.device) -> None:
    """An overflowing step is skipped and the scale halved, as with vanilla modules."""
    for fused in (False, True):
        model = build(VARIANTS["two blocks"][0], torch.float32, device)
        if fused:
            fastdcgan.fuse(model)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20, growth_interval=1)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        scales, moved = [], []
        for factor in (1e9, 1e-6, 1e-6):
            before = [p.clone() for p in model.parameters()]
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16):
                loss = model(draw(IMAGE, torch.float32, device)).float().sum() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
        assert scales == [2.0**19, 2.0**20, 2.0**21]
        assert moved == [False, True, True]


@pytest.mark.parametrize(
    "name", ["two blocks", "dcgan generator", "dcgan discriminator", "no norm", "convolutions only"]
)
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(
    name: str, weights: torch.memory_format, inputs: torch.memory_format, device: torch.device
) -> None:
    vanilla, fused, x = two(torch.float32, device, name)
    outs = [model.to(memory_format=weights)(x.to(memory_format=inputs)) for model in (vanilla, fused)]
    assert outs[1].stride() == outs[0].stride()
    for out in outs:
        out.sum().backward()
    for (key, p), q in zip(vanilla.named_parameters(), fused.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert q.grad.stride() == p.grad.stride(), key


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded", "offset"])
def test_inputs_that_lie_in_no_format(view: str, device: torch.device) -> None:
    vanilla, fused, x = two(torch.float64, device)
    x = {
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": torch.stack([x, x], -1)[..., 0],
        "expanded": x[:1].expand(4, -1, -1, -1),
        "offset": torch.cat([x, x])[2:6],
    }[view]
    torch.testing.assert_close(fused(x), vanilla(x), rtol=1e-10, atol=1e-12)


def test_default_dtype_float64(device: torch.device) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        vanilla, fused, x = two(torch.float64, device)
        assert_same(results(vanilla, x), results(fused, x))
        single = fastdcgan.fuse(build(VARIANTS["two blocks"][0], torch.float32, device))
        assert all(
            value.dtype == torch.float32 for value in results(single, x.float()).values() if value.is_floating_point()
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_device_types_without_autocast() -> None:
    with_autocast = ("cpu", "cuda", "xpu", "hpu", "mps", "mtia", "maia", "xla", "ipu", "privateuseone")
    for kind in (*planned._NO_AUTOCAST, *with_autocast):
        assert torch.amp.is_autocast_available(kind) == (kind not in planned._NO_AUTOCAST), kind


def test_the_meta_device() -> None:
    for name in ("dcgan generator", "pix2pix unet", "patchgan"):
        factory, shape = PAIRS[name]
        model = fastdcgan.fuse(factory()).to("meta")
        out = model(torch.empty(shape, device="meta"))
        assert out.is_meta
        assert out.shape == factory()(torch.randn(shape)).shape
        out.sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("call", ["dtype", "channels", "dims", "small", "device", "type"])
def test_a_bad_call_changes_nothing(call: str, device: torch.device) -> None:
    """What vanilla refuses is refused, before any buffer is written."""
    vanilla, fused, x = two(torch.float32, device)
    bad = {
        "dtype": x.double(),
        "channels": x[:, :2],
        "dims": x[0],
        "small": x[:1, :, :1, :1],
        "device": x.to("meta"),
        "type": [x],
    }[call]
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        vanilla(bad)
    with pytest.raises((ValueError, TypeError)):
        fused(bad)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())


# --- autograd --------------------------------------------------------------------------------------------------------


def test_modes_of_autograd(device: torch.device) -> None:
    vanilla, fused, x = two(torch.float64, device)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out, expected = fused(x), vanilla(x)
        assert not out.requires_grad
        assert out.is_inference() == expected.is_inference()
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    assert_same(dict(vanilla.named_buffers()), dict(fused.named_buffers()))
    with torch.autograd.set_detect_anomaly(True):
        assert_same(results(vanilla, x), results(fused, x))
    with torch.inference_mode():
        inside = fastdcgan.fuse(build(VARIANTS["two blocks"][0], torch.float32, device))
        assert inside(x.float()).is_inference()
        assert inside.eval()(x.float()).is_inference()


def test_anomaly_mode_names_the_block(device: torch.device) -> None:
    _, fused, x = two(torch.float32, device)
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"_ChainBackward.*nan"):
            fused(torch.full_like(x, math.inf)).sum().backward()


@one_thread()
def test_parts_of_the_gradient(device: torch.device) -> None:
    vanilla, fused, x = two(torch.float64, device)
    for inputs in (["x"], ["0.weight"], ["4.bias"], ["x", "3.weight", "1.weight"], ["4.weight", "x"]):
        found = []
        for model in (vanilla, fused):
            leaf = x.clone().requires_grad_()
            wanted = [leaf if name == "x" else model.get_parameter(name) for name in inputs]
            found.append(torch.autograd.grad(model(leaf).square().sum(), wanted))
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@one_thread()
def test_the_graph_can_be_kept_and_accumulated(device: torch.device) -> None:
    vanilla, fused, x = two(torch.float64, device)
    for model in (vanilla, fused):
        out = model(x)
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.sum().backward()
        model(x * 2).sum().backward()
    for key, gradient in gradients(vanilla).items():
        torch.testing.assert_close(gradients(fused)[key], gradient, rtol=1e-9, atol=1e-10)


def test_an_input_changed_in_place_is_noticed(device: torch.device) -> None:
    _, fused, x = two(torch.float64, device)
    given = x * 1
    out = fused(given)
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = fused(x).mul_(2)  # nothing saved refers to the output
    out.sum().backward()


@one_thread()
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, device: torch.device) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.model, x, use_reentrant=reentrant)
            return checkpoint_sequential(self.model[3:], 2, x[:, [0, 1, 2, 3]], use_reentrant=reentrant)

    vanilla, fused, x = two(torch.float64, device)
    expected, found = results(Checkpointed(vanilla), x), results(Checkpointed(fused), x)
    assert_same(expected, found)


def test_saved_tensors_hooks_see_half_of_what_vanilla_saves(device: torch.device) -> None:
    """One raw output per block, where vanilla keeps the convolution's output and the norm's; no more than 55 %."""
    sizes = []
    factory = lambda: nn.Sequential(nn.Conv2d(8, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2, True))  # noqa: E731
    for model in (factory().to(device), fastdcgan.fuse(factory()).to(device)):
        x, kept = draw((8, 8, 32, 32), torch.float32, device), {}

        def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        for given in (x, *model.parameters()):
            kept.pop(given.untyped_storage().data_ptr(), None)
        sizes.append(sum(kept.values()))
        out.sum().backward()
    assert sizes[1] <= 0.55 * sizes[0]
    assert sizes[1] < 1.05 * out.numel() * out.element_size()


# --- functional forms, transforms, tracing ---------------------------------------------------------------------------


def test_functional_call(device: torch.device) -> None:
    vanilla, fused, x = two(torch.float64, device)
    other = build(VARIANTS["two blocks"][0], torch.float64, device, seed=3).state_dict()
    outs = [torch.func.functional_call(model, other, (x,)) for model in (vanilla, fused)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-10, atol=1e-12)
    leaf = other["0.weight"].clone().requires_grad_()
    torch.func.functional_call(fused, {**other, "0.weight": leaf}, (x,)).sum().backward()
    assert leaf.grad is not None
    assert fused[0].weight.grad is None


@one_thread()
@pytest.mark.parametrize("train", [True, False])
def test_transforms(train: bool, device: torch.device) -> None:
    """torch.func's transforms and forward-mode differentiation run the modules as PyTorch has them."""
    vanilla, fused, x = two(torch.float64, device, "no running statistics" if train else "two blocks")
    found = []
    for model in (vanilla.train(train), fused.train(train)):
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

        def loss(
            p: dict[str, Tensor], x: Tensor, model: nn.Module = model, buffers: dict[str, Tensor] = buffers
        ) -> Tensor:
            return torch.func.functional_call(model, {**p, **buffers}, (x,)).square().sum()

        per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
        tangent = torch.func.jvp(model, (x,), (x.cos(),))[1]
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            dual = torch.autograd.forward_ad.make_dual(x, x.cos())
            forward = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        found.append({**per_sample, "jvp": tangent, "forward": forward, "vmap": torch.vmap(model)(x[:, None])})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without MKL-DNN")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_other_layouts() -> None:
    vanilla = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Sigmoid())
    fused, x = fastdcgan.fuse(copy.deepcopy(vanilla)), draw((2, 3, 8, 8), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for train in (True, False):
            found = [model.train(train)(x.to_mkldnn()) for model in (vanilla, fused)]
            assert all(out.layout is torch._mkldnn for out in found)
            assert torch.equal(*(out.to_dense() for out in found))
    for other in (x.to_sparse(), torch.nested.nested_tensor(list(x))):  # PyTorch has no convolution of these
        for model in (vanilla, fused):
            with pytest.raises((RuntimeError, NotImplementedError), match=r"convolution|Input type"):
                model(other)


class Wrapped(Tensor):
    """A subclass that knows PyTorch's own operators only."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function.namespace == "aten"
        args, kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, function(*args, **kwargs))


@pytest.mark.parametrize("what", ["input", "weight"])
def test_subclasses_that_know_only_pytorchs_operators(what: str) -> None:
    vanilla, fused, x = two(torch.float64, torch.device("cpu"), "no norm")
    expected = vanilla(x).detach()
    if what == "weight":
        fused[0].weight = nn.Parameter(Wrapped(fused[0].weight.detach()), requires_grad=False)
    out = fused(Wrapped(x) if what == "input" else x)
    assert isinstance(out, Wrapped)
    torch.testing.assert_close(out.inner, expected, rtol=1e-12, atol=1e-12)


def test_tracing_gives_pytorchs_own_operators(device: torch.device) -> None:
    vanilla, fused, x = two(torch.float64, device)
    vanilla.eval(), fused.eval()
    graph = torch.fx.symbolic_trace(fused)
    torch.testing.assert_close(graph(x), vanilla(x), rtol=1e-12, atol=1e-12)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1", "2", "3", "4", "5"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        traced = torch.jit.trace(fused, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x[:2]), vanilla(x[:2]), rtol=1e-12, atol=1e-12)
        assert "fastdcgan" not in str(traced.inlined_graph).replace("__torch__.fastdcgan", "")
        with pytest.raises(
            RuntimeError, match=r"^torch.jit.script can't compile .*: call fastdcgan.unfuse\(model\) first$"
        ):
            torch.jit.script(nn.Sequential(fused, nn.ReLU()))
        scripted = torch.jit.script(fastdcgan.unfuse(fused))
        torch.testing.assert_close(scripted(x), vanilla(x), rtol=1e-12, atol=1e-12)


@one_thread()
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_export(strict: bool, train: bool, device: torch.device) -> None:
    vanilla, fused, x = two(torch.float64, device)
    vanilla.train(train), fused.train(train)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(copy.deepcopy(fused), (x,), dynamic_shapes=({0: batch},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for given in (x, draw((7, *IMAGE[1:]), torch.float64, device)):
        torch.testing.assert_close(module(given), vanilla(given), rtol=1e-10, atol=1e-12)
    buffers = dict(module.named_buffers())  # strict export in eval mode drops the counter, which nothing reads
    assert {name for name, _ in vanilla.named_buffers() if "running" in name} <= buffers.keys()
    torch.testing.assert_close(buffers, {k: vanilla.get_buffer(k) for k in buffers}, rtol=1e-10, atol=1e-12)


# --- processes and threads -------------------------------------------------------------------------------------------


@one_thread()
def test_threads(device: torch.device) -> None:
    """Threads share a model in eval mode; autocast in one is no business of the others."""
    model = fastdcgan.fuse(build(lambda: Discriminator(pixels=32), torch.float32, device)).eval()
    inputs = [draw((2, 3, 32, 32), torch.float32, device, seed) for seed in range(4)]
    expected = [model(x).detach() for x in inputs]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(5):
                with torch.autocast(device.type, torch.bfloat16, enabled=i % 2 == 1):
                    out = model(inputs[i])
                assert out.dtype == (torch.bfloat16 if i % 2 else torch.float32)
                torch.testing.assert_close(
                    out.float(), expected[i], rtol=0.05 if i % 2 else 1e-6, atol=0.05 if i % 2 else 1e-6
                )
                (gradient,) = torch.autograd.grad(out.float().sum(), [model.main[0].weight])
                assert bool(gradient.isfinite().all())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_import_touches_no_device_and_loads_no_backend() -> None:
    program = """
import sys, torch
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = None  # not to be called
before = set(sys.modules)
import fastdcgan
loaded = sorted(set(sys.modules) - before)
heavy = ("torch._dynamo", "torch._inductor", "sympy", "triton", "matplotlib", "PIL", "fastdcgan.dcgan")
assert not [name for name in loaded if name.startswith(heavy)], loaded
assert not fastdcgan.backends._loaded
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
