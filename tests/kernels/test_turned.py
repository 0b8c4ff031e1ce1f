"""Image-side layers of stride 1 through their adjoints' kernels (`kernels/turned.py`), and gradients that add up.

They run in Triton's interpreter (TRITON_INTERPRET=1), or on a GPU where FASTDCGAN_TEST_DEVICE names one.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.tolerance import assert_as_accurate
from tests.machine import DEVICE

triton = pytest.importorskip("triton")
if not (triton.knobs.runtime.interpret or DEVICE.type == "cuda"):
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

from fastdcgan.backends import get  # noqa: E402
from fastdcgan.backends.reference import ReferenceBackend  # noqa: E402
from fastdcgan.geometry import Geometry  # noqa: E402
from fastdcgan.kernels import narrow, narrow_transpose, turned, weight_grad  # noqa: E402
from fastdcgan.kernels.tiles import TileConfig  # noqa: E402
from fastdcgan.spec import STORE, Epilogue, Operand  # noqa: E402

REFERENCE = ReferenceBackend()
LAST = torch.channels_last
FORMATS = st.sampled_from([LAST, torch.contiguous_format])
GEOMETRIES = st.sampled_from(
    [Geometry((3, 3), (1, 1), (1, 1)), Geometry((4, 4), (1, 1), (1, 1)), Geometry((3, 5), (1, 1), (0, 2))]
)
SIDES = st.integers(4, 11)
# A PatchGAN's last layer (Isola et al., 2017, section 6.1.2) and the 3x3 end of many generators.
PATCH, LAST_3X3 = Geometry((4, 4), (1, 1), (1, 1)), Geometry((3, 3), (1, 1), (1, 1))


def draw(*shape: int, layout: torch.memory_format = LAST, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout)


def wide(x: Operand) -> Operand:
    return Operand(*(v.double() if isinstance(v, Tensor) else v for v in x))


def prologue(x: Tensor, act: str = "leaky_relu") -> Operand:
    y, coef = torch.randn(x.shape).to(x), torch.rand(4, 2, x.shape[1]).to(DEVICE) + 0.5
    return Operand(x, y.contiguous(memory_format=LAST), coef, act, 0.2)


@settings(max_examples=10)
@given(
    n=st.integers(1, 2), c=st.sampled_from([5, 17, 64]), out=st.integers(1, 4), h=SIDES, w=SIDES, geometry=GEOMETRIES,
    layout=FORMATS,
)  # fmt: skip
@example(n=2, c=64, out=1, h=7, w=7, geometry=PATCH, layout=LAST)
def test_conv(n, c, out, h, w, geometry, layout) -> None:
    x, weight = draw(n, c, h, w, layout=layout), draw(out, c, *geometry.kernel, layout=layout)
    assume(narrow.covers_conv(Operand(x), weight, geometry) is not None)
    assert turned.covers_conv(Operand(x), weight, geometry) is None
    got, _ = turned.conv(Operand(x), weight, geometry)
    usual, _ = REFERENCE.conv(Operand(x), weight, geometry, STORE)
    truth, _ = REFERENCE.conv(Operand(x.double()), weight.double(), geometry, STORE)
    assert_as_accurate(got, usual, truth, reduction=c * 16)
    assert got.stride() == usual.stride() or out == 1


@pytest.mark.parametrize("geometry", [PATCH, LAST_3X3], ids=["4x4", "3x3"])
def test_conv_with_prologue_and_epilogue(geometry: Geometry) -> None:
    a, weight = prologue(draw(2, 20, 9, 6)), draw(3, 20, *geometry.kernel)
    epilogue = Epilogue("activate", None, torch.rand(2, 1, 3, device=DEVICE) + 0.5, "tanh")
    got, _ = turned.conv(a, weight, geometry, epilogue)
    usual, _ = REFERENCE.conv(a, weight, geometry, epilogue)
    precise = epilogue._replace(coef=epilogue.coef.double())  # type: ignore[union-attr]
    truth, _ = REFERENCE.conv(wide(a), weight.double(), geometry, precise)
    assert_as_accurate(got, usual, truth, reduction=320)


@settings(max_examples=10)
@given(
    n=st.integers(1, 2), c=st.integers(1, 4), out=st.sampled_from([5, 17, 64]), h=SIDES, w=SIDES, geometry=GEOMETRIES,
    layout=FORMATS,
)  # fmt: skip
def test_conv_transpose(n, c, out, h, w, geometry, layout) -> None:
    size = geometry.conv_transpose_size(h, w)
    x, weight = draw(n, c, h, w, layout=layout), draw(c, out, *geometry.kernel, layout=layout)
    assert narrow_transpose.covers_conv_transpose(Operand(x), weight, geometry, size) is not None
    assert turned.covers_conv_transpose(Operand(x), weight, geometry, size) is None
    got, _ = turned.conv_transpose(Operand(x), weight, geometry, size)
    usual, _ = REFERENCE.conv_transpose(Operand(x), weight, geometry, size, STORE)
    truth, _ = REFERENCE.conv_transpose(Operand(x.double()), weight.double(), geometry, size, STORE)
    assert_as_accurate(got, usual, truth, reduction=c * 16)
    assert got.stride() == usual.stride() or c == 1


@settings(max_examples=10)
@given(
    n=st.integers(1, 2), c=st.sampled_from([5, 17, 64]), out=st.integers(1, 4), h=SIDES, w=SIDES, geometry=GEOMETRIES,
    layout=FORMATS, lazy=st.booleans(),
)  # fmt: skip
def test_weight_grad(n, c, out, h, w, geometry, layout, lazy) -> None:
    n *= 2
    x = Operand(draw(n, c, h, w, layout=layout))
    dy = draw(n, out, *geometry.conv_size(h, w), layout=layout)
    linear = prologue(dy) if lazy else Operand(dy)
    assert turned.covers_weight_grad(x, linear, geometry) is None
    got = turned.weight_grad(x, linear, geometry)
    usual, truth = REFERENCE.weight_grad(x, linear, geometry), REFERENCE.weight_grad(wide(x), wide(linear), geometry)
    assert_as_accurate(got, usual, truth, reduction=n * h * w)
    assert got.stride() == usual.stride() or 1 in (c, out)


def test_what_can_not_be_turned_round() -> None:
    x, weight = Operand(draw(1, 8, 8, 8)), draw(3, 8, 4, 4)
    strided, padded = Geometry((4, 4), (2, 2), (1, 1)), Geometry((4, 4), (1, 1), (4, 4))
    for geometry in (strided, padded):
        assert "turned round" in turned.covers_conv(x, weight, geometry)
        assert "turned round" in turned.covers_weight_grad(x, Operand(draw(1, 3, 8, 8)), geometry)
    assert turned.turn(Geometry((3, 3), (1, 1), (1, 1), (2, 2))) == Geometry((3, 3), (1, 1), (3, 3), (2, 2))
    assert "turned round" in turned.covers_conv_transpose(x, draw(8, 3, 4, 4), PATCH, (8, 8))  # output padding
    assert "channels" in turned.covers_conv(x, draw(8, 8, 4, 4), PATCH)


@pytest.mark.parametrize("out", [1, 3])
def test_the_backend_takes_these_kernels(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("conv", "conv_transpose", "weight_grad"):
        real = getattr(turned, name)
        monkeypatch.setattr(turned, name, lambda *args, name=name, real=real: taken.append(name) or real(*args))
    backend, x, weight = get("triton"), draw(1, 16, 8, 8), draw(out, 16, 4, 4)
    y, _ = backend.conv(Operand(x), weight, PATCH, STORE)
    backend.conv_transpose(Operand(y), weight, PATCH, (8, 8), STORE)
    backend.weight_grad(Operand(x), Operand(y), PATCH)
    assert taken == ["conv", "conv_transpose", "weight_grad"]


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spans", [False, True], ids=["strided", "as large as the image"])
def test_a_weight_gradient_is_added_to_another(splits: int, dtype: torch.dtype, spans: bool) -> None:
    geometry, size = (Geometry((4, 4)), 4) if spans else (Geometry((4, 4), (2, 2), (1, 1)), 8)
    x = Operand(draw(6, 18, size, size, dtype=dtype))
    dy = Operand(draw(6, 10, *geometry.conv_size(size, size), dtype=dtype))
    config = TileConfig(16, 16, 16, splits=splits)
    before = draw(10, 18, 4, 4)  # float32, whatever the operands are
    into = before.clone(memory_format=torch.preserve_format)
    got = weight_grad.weight_grad(x, dy, geometry, config, into=into)
    assert got is into
    alone = REFERENCE.weight_grad(wide(x), wide(dy), geometry)
    truth = before.double() + alone
    usual = before + REFERENCE.weight_grad(Operand(x.x.float()), Operand(dy.x.float()), geometry)
    assert_as_accurate(into, usual, truth, reduction=6 * size * size)


def test_a_gradient_of_another_layout_is_refused_and_left_alone() -> None:
    x, dy = Operand(draw(2, 4, 6, 6)), Operand(draw(2, 8, 6, 6))
    for into in (torch.zeros(8, 4, 3, 3, device=DEVICE), draw(8, 4, 3, 4), draw(4, 8, 3, 3)):
        before = into.clone()
        with pytest.raises(ValueError, match=r"into must be channels_last of shape \[8, 4, 3, 3\], got \["):
            weight_grad.weight_grad(x, dy, LAST_3X3, into=into)
        assert torch.equal(into, before)
