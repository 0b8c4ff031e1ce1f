"""Which backend runs: `fastdcgan.backend()`, FASTDCGAN_BACKEND, `fastdcgan.backends()`, and what can't run."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import fastdcgan
from fastdcgan import Unavailable, backends
from fastdcgan.backends import triton as triton_module
from fastdcgan.backends.cpu import CPUBackend
from fastdcgan.backends.reference import ReferenceBackend
from fastdcgan.backends.triton import TritonBackend
from tests.helpers.networks import IMAGE, VARIANTS
from tests.helpers.twins import draw

NAMES = ("cuda", "triton", "cpu", "reference")


def runs_on(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    model = fastdcgan.fuse(VARIANTS["two blocks"][0]()).to(device, dtype)
    return fastdcgan.explain(model, draw(IMAGE, dtype, device))[0].backend


def test_status_has_every_name_and_a_reason() -> None:
    found = fastdcgan.backends()
    assert tuple(found) == NAMES
    assert found["reference"] == "available"
    for name, status in found.items():
        assert status == "available" or repr(name) in status
    assert found == fastdcgan.backends()


def test_the_context_nests_and_survives_errors(device: torch.device) -> None:
    before = backends.requested()
    with fastdcgan.backend("reference"):
        assert backends.requested() == "reference"
        with fastdcgan.backend("auto"):
            assert backends.requested() == "auto"
        with pytest.raises(KeyError), fastdcgan.backend("auto"):
            raise KeyError("inside")
        assert backends.requested() == "reference"
        assert runs_on(device) == "reference"
    assert backends.requested() == before


@pytest.mark.parametrize("name", ["cudnn", "", "CPU", "Auto"])
def test_an_unknown_name(name: str) -> None:
    before = backends.requested()
    with pytest.raises(
        ValueError, match=f"unknown backend {name!r}: expected 'auto' or one of 'cuda', 'triton', 'cpu'"
    ):
        fastdcgan.backend(name).__enter__()
    assert backends.requested() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_name_runs_or_says_why_not(name: str, device: torch.device) -> None:
    reason = backends.reasons(device.type, torch.float32)[name]
    before = backends.requested()
    if fastdcgan.backends()[name] != "available":
        with pytest.raises(Unavailable, match=f"backend {name!r} .*") as error:
            fastdcgan.backend(name).__enter__()
        assert "'reference'" in str(error.value) or "build it" in str(error.value)  # what can run, or what to do
    elif reason is None:
        with fastdcgan.backend(name):
            assert runs_on(device) == name
    else:
        with (
            fastdcgan.backend(name),
            pytest.raises(Unavailable, match=f"can't run this block.*{device.type}.*reference"),
        ):
            runs_on(device)
    assert backends.requested() == before


class Broken(CPUBackend):
    name = "cpu"

    def require(self) -> None:
        raise Unavailable("backend 'cpu' can't load a library: undefined symbol")


@pytest.mark.filterwarnings("ignore:blocks run as PyTorch's own modules")
def test_auto_goes_down_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setattr(backends, "_selected", {})
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: Broken() if name == "cpu" else load(name))
    with fastdcgan.backend("auto"):
        model = fastdcgan.fuse(VARIANTS["two blocks"][0]())
        rows = fastdcgan.explain(model, torch.randn(IMAGE))
        assert all(row.backend is None and row.why == "runs as PyTorch's own: no backend 'cpu' here" for row in rows)
        assert rows.absent["cpu"] == "backend 'cpu' can't load a library: undefined symbol"
    with pytest.raises(Unavailable, match="undefined symbol"):
        fastdcgan.backend("cpu").__enter__()
    assert "undefined symbol" in fastdcgan.backends()["cpu"]


def test_a_dtype_that_a_backend_does_not_take(device: torch.device) -> None:
    with fastdcgan.backend("auto"):
        assert runs_on(device, torch.float64) == "reference"
    for name, reason in backends.reasons(device.type, torch.float64).items():
        if reason is not None and fastdcgan.backends()[name] == "available":
            with fastdcgan.backend(name), pytest.raises(Unavailable, match=r"float64.*those that can: reference"):
                runs_on(device, torch.float64)


def test_the_choice_holds_for_all_threads() -> None:
    seen: list[str] = []
    with fastdcgan.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "reference reference"),
        ("cudnn", "ValueError unknown backend 'cudnn': expected 'auto' or one of"),
        ("triton", "Unavailable backend 'triton'"),
        ("", "cpu auto" if fastdcgan.backends()["cpu"] == "available" else "reference auto"),
    ],
)
def test_the_environment_variable(value: str, expected: str) -> None:
    if value == "triton" and fastdcgan.backends()["triton"] == "available":
        pytest.skip("triton runs here")
    program = """
import torch, fastdcgan
model = fastdcgan.ConvBNLeakyReLU2d(3, 4, 3)  # importing and building ask for no backend
try:
    row, = fastdcgan.explain(model, torch.randn(2, 3, 5, 5))
    with fastdcgan.backend("auto"):
        pass
    print(row.backend, fastdcgan.backends.requested())
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "FASTDCGAN_BACKEND": value}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith(expected), done.stdout


def test_auto_leaves_out_a_library_for_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub(ReferenceBackend):
        def __init__(self, reason: str | None) -> None:
            self.reason = reason

        def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
            return self.reason

    cuda, triton = Stub("it was built for 9.0a"), Stub(None)
    monkeypatch.setattr(backends, "_loaded", {"cuda": cuda, "triton": triton})
    assert backends.members("auto") == [triton]
    cuda.reason = None
    assert backends.members("auto") == [cuda, triton]  # compiled passes before those that compile at first use


def test_triton_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton imports without what it compiles with."""

    def fails(self: TritonBackend, *args: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_module, "interpreted", lambda: False)
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: None)
    monkeypatch.setattr(TritonBackend, "coefficients", fails)
    with pytest.raises(Unavailable, match="can't run a kernel: RuntimeError: Failed to find C compiler; use 'auto'"):
        TritonBackend().require()


def test_a_backend_that_is_not_here_keeps_no_caller_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_loaded", {})

    def ask() -> weakref.ref[nn.Module]:
        model = nn.Identity()
        backends.status()
        return weakref.ref(model)

    for model in (ask(), ask()):  # the first loads what there is
        gc.collect()
        assert model() is None
