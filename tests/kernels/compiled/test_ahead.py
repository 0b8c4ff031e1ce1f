"""Kernels are compiled ahead of the first step, side by side, and what comes after begins anew."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

import fastdcgan
from fastdcgan import backends
from fastdcgan.backends.triton import TritonBackend
from fastdcgan.dispatch import router
from fastdcgan.kernels import tiles
from tests.kernels.compiled.compiling import Driver

ARCH = 90


def test_a_step_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """With a driver that names a GPU, tensors on the CPU stand in for its own: nothing is launched."""
    backend = TritonBackend()
    monkeypatch.setattr(backend, "why_not", lambda device_type, dtype: None)
    monkeypatch.setitem(backends._loaded, "triton", backend)
    monkeypatch.setattr(router, "_SILENT_S", 0.0)
    launched: list[JITFunction] = []
    compiled: list[JITFunction] = []
    run = JITFunction.run

    def watched(kernel: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **kwargs: object) -> object:
        (compiled if warmup else launched).append(kernel)
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    block = fastdcgan.ConvBNLeakyReLU2d(24, 16, 4, 2, 1)
    x = torch.randn(2, 24, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    with (
        mock.patch.object(triton.runtime.driver, "_active", Driver(ARCH)),
        mock.patch.object(JITFunction, "run", watched),
        mock.patch.object(tiles, "device_of", return_value=tiles.KNOWN[ARCH]),
        fastdcgan.backend("triton"),
    ):
        with router.compiling_ahead("triton") as compiles:
            assert compiles
            block(x).sum().backward()
        ahead = set(compiled)
        assert not launched and len(ahead) >= 6  # contractions, passes, and what merges partials
        assert all(kernel.device_caches[ARCH][0] for kernel in ahead)
        assert "compiling kernels for this GPU" in capfd.readouterr().err
        # What runs now is chosen anew, and finds everything compiled.
        binaries = {kernel: dict(kernel.device_caches[ARCH][0]) for kernel in ahead}
        block(x).sum().backward()
        assert set(launched) <= ahead and launched
        assert binaries == {kernel: dict(kernel.device_caches[ARCH][0]) for kernel in ahead}


def test_where_nothing_is_compiled_nothing_is_run_ahead() -> None:
    with router.compiling_ahead("reference") as compiles:
        assert not compiles
