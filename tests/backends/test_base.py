"""PyTorch's own convolution between a backend's passes, where PyTorch's own is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdcgan.geometry import Geometry, Pair
from fastdcgan.spec import Call, Epilogue, Operand
from tests.helpers.contractions import REFERENCE, conv_call, conv_transpose_call, weight_grad_call
from tests.helpers.tolerance import assert_as_accurate

PAIRS = st.tuples(st.integers(1, 5), st.integers(1, 5))
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.usefixtures("fresh_memory_is_nan")
@settings(max_examples=100)
@given(
    kernel=PAIRS, stride=PAIRS, padding=PAIRS, dilation=st.sampled_from([(1, 1), (1, 1), (3, 1), (1, 2)]), size=PAIRS,
    channels=st.sampled_from([(8, 8), (24, 1), (1, 3), (16, 50)]), groups=st.sampled_from([1, 1, 2]),
    layout=st.sampled_from(FORMATS), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)  # fmt: skip
@example((8, 3), (4, 3), (3, 0), (1, 1), (2, 1), (8, 8), 1, torch.channels_last, torch.bfloat16)
@example((3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (8, 8), 1, torch.channels_last, torch.bfloat16)
@example((2, 3), (1, 3), (1, 0), (1, 1), (7, 4), (50, 8), 1, torch.channels_last, torch.bfloat16)
@example((2, 6), (1, 4), (0, 4), (3, 1), (6, 3), (8, 16), 1, torch.contiguous_format, torch.bfloat16)
@example((3, 5), (1, 2), (1, 2), (1, 1), (7, 1), (3, 50), 1, torch.channels_last, torch.float16)
@example((5, 2), (2, 2), (5, 5), (1, 2), (2, 1), (2, 17), 1, torch.channels_last, torch.float32)
@example((1, 1), (2, 3), (0, 0), (1, 1), (8, 9), (3, 3), 1, torch.channels_last, torch.float32)
def test_taps_that_reach_no_data(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, size: Pair, channels: Pair, groups: int,
    layout: torch.memory_format, dtype: torch.dtype,
) -> None:  # fmt: skip
    """For some, PyTorch's own leaves values unwritten or reads outside the image: of 16-bit numbers, or with a bias."""
    g = Geometry(kernel, stride, padding, dilation, groups)
    out = g.conv_size(*size)
    assume(min(out) >= 1)
    ci, co = groups * channels[0], groups * channels[1]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)

    x, weight, dy = random(3, ci, *size), random(co, channels[0], *kernel), random(3, co, *out)
    bias = Epilogue("bias", coef=torch.randn(co, generator=generator).to(dtype))

    def calls(x: Tensor, weight: Tensor, dy: Tensor) -> list[Call]:
        found = [conv_call(Operand(x), weight, g, bias), weight_grad_call(Operand(x), Operand(dy), g)]
        extra = g.output_padding(*out, size)
        if all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
            found.append(conv_transpose_call(Operand(dy), weight, g, size))
        return found

    for call, floats, truth in zip(
        calls(x, weight, dy),
        calls(x.float(), weight.float(), dy.float()),
        calls(x.double(), weight.double(), dy.double()),
        strict=True,
    ):
        results = [REFERENCE.pytorch(c) for c in (call, floats, truth)]
        got, vanilla, exact = (r if call.op == "weight_grad" else r[0] for r in results)
        terms = ci * kernel[0] * kernel[1] if call.op == "conv" else co * kernel[0] * kernel[1]
        if call.op == "weight_grad":
            terms = 3 * out[0] * out[1]
        assert got.dtype == dtype
        assert_as_accurate(got, vanilla.to(dtype), exact, call.op, reduction=terms, scale=1.0)


WEIGHT_GRADS = """
import torch
from fastdcgan import backends
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Call, Operand
for layout in (torch.contiguous_format, torch.channels_last):
    for stride in ((2, 2), (1, 2), (2, 3)):
        for channels in ((2, 2), (3, 3), (4, 8), (8, 8)):
            g = Geometry((1, 1), stride)
            x = torch.randn(2, channels[0], 8, 9).contiguous(memory_format=layout)
            dy = torch.randn(2, channels[1], *g.conv_size(8, 9)).contiguous(memory_format=layout)
            backends.get("reference").pytorch(Call("weight_grad", Operand(x), Operand(dy), g, (1, 1)))
"""


def test_nothing_is_written_outside_of_a_buffer() -> None:
    """By weight gradients of 1x1 kernels with a stride, where an allocator that checks says so."""
    checking = os.environ | {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WEIGHT_GRADS], capture_output=True, text=True, env=checking)
    assert done.returncode == 0, done.stderr
