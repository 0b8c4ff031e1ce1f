"""uint8 images to normalised ones: the bits of the formula, in every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdcgan
from fastdcgan.functional import normalize_images
from tests.machine import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def formula(pixels: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    if flip is not None:
        x = torch.stack([image.flip(2) if f else image for image, f in zip(x, flip.tolist(), strict=True)])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    got = normalize_images(levels.to(DEVICE), None, dtype).cpu()
    assert torch.equal(got, formula(levels, None, dtype))
    assert got.min() == -1 and got.max() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.integers(1, 5), st.integers(1, 33), st.integers(1, 70), st.integers(1, 5), st.booleans())
def test_shapes(dtype: torch.dtype, n: int, height: int, width: int, channels: int, flips: bool) -> None:
    pixels = random_pixels(n, height, width, channels)
    flip = torch.arange(n) % 2 == 0 if flips else None
    got = normalize_images(pixels.to(DEVICE), None if flip is None else flip.to(DEVICE), dtype)
    assert got.dtype == dtype and got.shape == (n, channels, height, width)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.cpu(), formula(pixels, flip, dtype))
    with fastdcgan.backend("reference"):
        assert torch.equal(normalize_images(pixels.to(DEVICE), None if flip is None else flip.to(DEVICE), dtype), got)


def test_many_on_several_threads() -> None:
    pixels, flip = random_pixels(64, 64, 64, 3), torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = normalize_images(pixels.to(DEVICE), flip.to(DEVICE))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got.cpu(), formula(pixels, flip, torch.float32))


def test_views_float64_and_nothing() -> None:
    pixels = random_pixels(6, 8, 9, 3)
    view = pixels.to(DEVICE)[::2, :, 1::2]
    assert torch.equal(normalize_images(view).cpu(), formula(pixels[::2, :, 1::2], None, torch.float32))
    exact = normalize_images(pixels.to(DEVICE), dtype=torch.float64).cpu()
    assert torch.equal(exact, pixels.permute(0, 3, 1, 2).double() / 127.5 - 1)
    assert normalize_images(pixels[:0].to(DEVICE)).shape == (0, 3, 8, 9)


def test_bad_calls() -> None:
    pixels = random_pixels(2, 4, 4, 3)
    with pytest.raises(TypeError, match=r"uint8 pixels \[N, H, W, C\], got torch.float32"):
        normalize_images(pixels.float())
    for arguments in (([1],), (pixels, "left")):
        with pytest.raises(TypeError, match=r"to be a torch\.Tensor, got (list|str)"):
            normalize_images(*arguments)
    with pytest.raises(TypeError, match=r"got torch.uint8 \[4, 4, 3\]"):
        normalize_images(pixels[0])
    with pytest.raises(TypeError, match=r"a floating-point dtype, got torch\.int32"):
        normalize_images(pixels, dtype=torch.int32)
    for flip in (torch.ones(3, dtype=torch.bool), torch.ones(2)):
        with pytest.raises(ValueError, match=r"flip to be bool \[2\], got"):
            normalize_images(pixels, flip)
