"""The CUDA backend's decisions: what it covers and why not, and a loader that keeps the original error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastdcgan
from fastdcgan import backends, build_info
from fastdcgan.backends import cuda


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),  # machine code runs on later ones of the same major version
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (9, 1), False),
        (["8.0", "9.0a", "10.0+PTX"], (7, 5), False),
        (["8.0", "9.0a", "10.0+PTX"], (10, 3), True),
        (["8.0", "9.0a", "10.0+PTX"], (12, 0), True),  # PTX is compiled anew
        (["8.0+PTX"], (9, 0), True),
        (["10.0f"], (10, 3), True),
        (["10.0f"], (12, 0), False),
        ([], (9, 0), False),
    ],
)
def test_architectures(architectures: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert cuda.runs_on(architectures, capability) == runs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a GPU of compute capability 9.0, and an installation without extensions."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(build_info, "PACKAGE", tmp_path)
    return tmp_path


def write_record(folder: Path, error: str | None, architectures: list[str] | None = None) -> None:
    record = {"python": "3.11.7", "torch": "2.13.0", "compiler": None}
    extensions = {"_cuda": {"built": error is None, "error": error}}
    built = {"nvcc": "13.0", "architectures": architectures or [], "oldest_torch": "2.11"}
    (folder / "_build.json").write_text(json.dumps({**record, "extensions": extensions, "cuda": built}))


def test_what_it_takes(gpu: Path) -> None:
    write_record(gpu, None, ["8.0", "9.0a"])
    backend = cuda.CUDABackend()
    assert all(backend.why_not("cuda", dtype) is None for dtype in cuda.DTYPES)
    assert "device type 'cuda', not 'cpu'" in backend.why_not("cpu", torch.float32)
    assert "float32, bfloat16, float16, not torch.float64" in backend.why_not("cuda", torch.float64)
    write_record(gpu, None, ["8.0", "10.0+PTX"])
    reason = backend.why_not("cuda", torch.float32)
    assert reason == (
        "it was built for 8.0 10.0+PTX, and GPU 0 has compute capability 9.0: build it with TORCH_CUDA_ARCH_LIST"
    )


def test_without_the_extension(gpu: Path) -> None:
    with pytest.raises(fastdcgan.Unavailable, match="needs the CUDA extension _cuda: it was not built"):
        cuda.CUDABackend().require()
    write_record(gpu, "csrc/cuda/elementwise/norm_act.cu(3): error: expected a ';'")
    with pytest.raises(
        fastdcgan.Unavailable, match=r"its build failed:\ncsrc/cuda/elementwise/norm_act.cu\(3\): error"
    ):
        cuda.CUDABackend().require()


def test_a_library_that_does_not_load(gpu: Path) -> None:
    write_record(gpu, None, ["9.0a"])
    (gpu / "_cuda.so").write_bytes(b"not a library")
    with pytest.raises(fastdcgan.Unavailable, match=r"can't load _cuda.so: .*built with torch 2.13.0") as raised:
        cuda.CUDABackend().require()
    assert isinstance(raised.value.__cause__, OSError)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Path) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(fastdcgan.Unavailable, match="ROCm build"):
        cuda.CUDABackend().require()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(fastdcgan.Unavailable, match="needs an NVIDIA GPU"):
        cuda.CUDABackend().require()


def test_it_is_a_backend_by_name() -> None:
    assert isinstance(backends._load("cuda"), cuda.CUDABackend)
    assert "cuda" in fastdcgan.backends()
