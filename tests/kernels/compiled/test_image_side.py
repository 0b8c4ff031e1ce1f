"""What the image-side layers compile to: tensor cores, 16-byte accesses to the wide tensor, few registers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastdcgan.geometry import Geometry
from fastdcgan.kernels import image_side, image_side_transpose
from fastdcgan.spec import STORE, Epilogue, Operand
from tests.helpers.contractions import conv_call, conv_transpose_call, weight_grad_call
from tests.kernels.compiled.compiling import ARCHITECTURES, TENSOR_CORES, assert_fits, compiled, images, vectors

K4, K5 = Geometry((4, 4), (2, 2), (1, 1)), Geometry((5, 5), (2, 2), (2, 2))
# What each kernel may use, so that two programs fit on a multiprocessor; the kernels that merge partials use less.
REGISTERS = {"conv_kernel": 128, "weight_grad_kernel": 168, "conv_transpose_kernel": 168}
FIVE_BY_FIVE = 255  # 128 columns of patches, or 256 products, for each pixel


def layers(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """First layer of the discriminator, last of the generator, and their gradients."""
    x, features = images(128, 3, 64, dtype), images(128, 64, 32, dtype)
    weight, weight5 = images(64, 3, 4, dtype), images(64, 3, 5, dtype)
    coef, few = vectors(4, 64), vectors(2, 3)
    act, tanh = Epilogue("activate", None, coef[:2], "leaky_relu", 0.2), Epilogue("activate", None, few, "tanh")
    grad_stats = Epilogue("grad_stats", features, coef, "relu")
    plain, deferred = Operand(features), Operand(features, None, coef, "relu")
    gradient, image_gradient = Operand(features, features, coef, "leaky_relu", 0.2), Operand(x, x, few, "tanh")

    def conv(a: Operand, epilogue: Epilogue) -> Callable[[], object]:
        return lambda: image_side.conv(conv_call(a, weight, K4, epilogue))

    def transpose(a: Operand, epilogue: Epilogue) -> Callable[[], object]:
        return lambda: image_side_transpose.conv_transpose(conv_transpose_call(a, weight, K4, (64, 64), epilogue))

    def weight_grad(gathered: Operand, linear: Operand) -> Callable[[], object]:
        return lambda: image_side.weight_grad(weight_grad_call(gathered, linear, K4))

    return {
        "conv": conv(Operand(x), act),
        "conv stats": conv(Operand(x), Epilogue("stats")),
        "conv grad_stats": conv(image_gradient, grad_stats),
        "conv k5": lambda: image_side.conv(conv_call(Operand(x), weight5, K5, act)),
        "weight_grad": weight_grad(Operand(x), plain),
        "weight_grad of D": weight_grad(Operand(x), gradient),
        "weight_grad of G": weight_grad(image_gradient, deferred),
        "conv_transpose": transpose(plain, STORE),
        "conv_transpose of G": transpose(deferred, tanh),
        "conv_transpose of D": transpose(gradient, STORE),
        "conv_transpose k5": lambda: image_side_transpose.conv_transpose(
            conv_transpose_call(deferred, weight5, K5, (64, 64), tanh)
        ),
    }


LAYERS = {"bf16": layers(torch.bfloat16), "fp32": layers(torch.float32)}


@pytest.mark.parametrize(
    ("dtype", "arch"), [*(("bf16", arch) for arch in ARCHITECTURES), ("fp32", 90)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("name", LAYERS["bf16"])
def test_a_layer_touches_the_wide_tensor_in_16_byte_accesses(name: str, dtype: str, arch: int) -> None:
    kernels = compiled(LAYERS[dtype][name], arch)
    for kernel in kernels:
        assert_fits(kernel, arch)
        limit = FIVE_BY_FIVE if "k5" in name else REGISTERS.get(kernel.kernel.__name__, 192)
        assert kernel.registers <= limit
    kernel = kernels[0]
    assert kernel.count(TENSOR_CORES[arch])
    if name.startswith("conv_transpose"):
        tile, wide = kernel.arguments["PROLOGUE"], kernel.arguments["x"]
    elif name.startswith("weight_grad"):
        tile, wide = kernel.arguments["LINEAR"], kernel.arguments["dy"]
    else:
        tile, wide = kernel.arguments["EPILOGUE"], kernel.arguments["out"]
    moved = tile.rows * tile.block_c * wide.element_size()
    if wide is kernel.arguments.get("out"):
        assert kernel.bytes_stored >= moved
        assert not kernel.count(r"st\.global\.b16")
        assert "grad_stats" not in name or kernel.bytes_loaded >= moved
    else:
        assert kernel.bytes_loaded >= moved
