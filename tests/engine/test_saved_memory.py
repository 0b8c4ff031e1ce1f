"""How much a forward pass keeps for the backward: at most 55 % of what the vanilla modules keep.

Counted are the bytes of all distinct storages that autograd saves (`saved_tensors_hooks`), except those of the model's
input, its parameters and its buffers. An activation that two nodes save counts once.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.twins import block, channels_last, discriminator, in_dtype, numbers, twin
from tests.machine import DEVICE
from tests.models.dcgan import Discriminator, Generator

LIMIT = 0.55


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    assert out.grad_fn is not None
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_block_keeps_its_raw_output_and_no_more(
    transposed: bool, act: str, dtype: torch.dtype, inplace: bool, backend: str
) -> None:
    """Vanilla keeps the raw output, and the activation's result (or, not in place, its input)."""
    model = in_dtype(block(transposed, "train", act, (8, 16)), dtype)
    model[2].inplace = inplace
    x = channels_last(numbers(8, 8, 16, 16, dtype=dtype))
    ours, vanilla = saved_bytes(twin(model), x), saved_bytes(model, x)
    raw = model[0](x).nbytes
    assert raw <= ours <= raw + 16 * 4 * 16, (ours, raw)  # and at most 16 vectors per channel
    assert ours <= LIMIT * vanilla, (ours, vanilla)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_an_activation_in_place_keeps_its_output_alone(act: str, bias: bool, backend: str) -> None:
    """As vanilla's does; so neither output may be written to."""
    model = block(False, None, act, (8, 16), bias=bias).float()
    model[-1].inplace = True
    x = channels_last(numbers(8, 8, 16, 16, dtype=torch.float32))
    out = twin(model)(x)
    assert out.nbytes <= saved_bytes(twin(model), x) <= out.nbytes + 16 * 4 * 16
    for changed in (model, twin(model)):
        out = changed(x)
        out.detach().add_(1)
        with pytest.raises(RuntimeError, match=r"modified (by an inplace operation|inplace)"):
            out.sum().backward()


def test_pixels_that_are_upsampled_are_not_kept(backend: str) -> None:
    conv = nn.Conv2d(8, 16, 3, 1, 1, bias=False)
    model = nn.Sequential(nn.Upsample(scale_factor=2), conv, nn.BatchNorm2d(16), nn.ReLU()).to(DEVICE)
    x = numbers(8, 8, 16, 16, dtype=torch.float32)
    raw, weight = model[:2](x).nbytes, 4 * 4 * 8 * 16 * 4
    assert raw <= saved_bytes(twin(model), x) <= raw + weight + 16 * 4 * 16


def dcgan64(kind: str, inplace: bool) -> tuple[nn.Sequential, Tensor, int]:
    """A network of PyTorch's DCGAN example for 64x64 pixels, two inputs, and the bytes of its raw outputs."""
    model = (Generator(ngf=64) if kind == "generator" else Discriminator(ndf=64, sigmoid=False)).main.to(DEVICE)
    for module in model:
        if isinstance(module, (nn.ReLU, nn.LeakyReLU)):
            module.inplace = inplace
    sides = [(512, 4), (256, 8), (128, 16), (64, 32)]
    raw = 2 * 4 * (sum(c * side**2 for c, side in sides) + (3 * 64**2 if kind == "generator" else 0))
    return model, numbers(*((2, 100, 1, 1) if kind == "generator" else (2, 3, 64, 64)), dtype=torch.float32), raw


@pytest.mark.parametrize(
    ("kind", "inplace", "limit"),
    [
        ("generator", False, LIMIT),
        ("generator", True, LIMIT),
        ("discriminator", False, LIMIT),
        # In place, vanilla keeps one tensor of the first block too, which has no batch norm and is the largest.
        ("discriminator", True, 0.70),
    ],
)
def test_a_deferred_chain_keeps_its_raw_outputs_and_no_more(
    kind: str, inplace: bool, limit: float, backend: str
) -> None:
    model, x, raw = dcgan64(kind, inplace)
    fused = twin(model)
    fused.boundaries = "deferred"
    ours, vanilla = saved_bytes(fused, x), saved_bytes(model, x)
    assert raw <= ours <= raw + 16 * 4 * 1024  # and at most 16 vectors per channel
    assert ours <= limit * vanilla, f"{ours} of {vanilla} bytes: {ours / vanilla:.1%}"


def test_a_finished_chain_keeps_no_more_than_vanilla(backend: str) -> None:
    for kind in ("generator", "discriminator"):
        model, x, _ = dcgan64(kind, True)
        fused = twin(model)
        fused.boundaries = "finished"
        assert saved_bytes(fused, x) <= 1.01 * saved_bytes(model, x)


def test_frozen_weights_keep_less(backend: str) -> None:
    """In the generator's step the discriminator's weights need no gradient, and no activation is kept for them."""
    model = twin(discriminator(16).float())
    x = numbers(16, 3, 16, 16, dtype=torch.float32).requires_grad_()
    model.boundaries = "deferred"
    without_activations = saved_bytes(model, x)
    model.boundaries = "finished"
    assert saved_bytes(model, x) > 1.2 * without_activations
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(model, x) <= without_activations
