"""What setup.py built, as it recorded it in `_build.json` beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` in the source folder (`make install` does)"


@dataclass(frozen=True)
class CUDABuild:
    """Of the CUDA extension: nvcc's version, the `architectures` it has code for (as in TORCH_CUDA_ARCH_LIST), and the
    oldest torch whose stable ABI it was built on."""

    nvcc: str | None = None
    architectures: tuple[str, ...] = ()
    oldest_torch: str | None = None


@dataclass(frozen=True)
class BuildInfo:
    """`errors` has every extension that was tried: None if it was built, else the original error."""

    python: str | None = None
    torch: str | None = None
    compiler: str | None = None
    errors: dict[str, str | None] = field(default_factory=dict)
    cuda: CUDABuild = CUDABuild()


def build_info() -> BuildInfo:
    """What was built; an empty BuildInfo if nothing was."""
    record = PACKAGE / "_build.json"
    if not record.exists():
        return BuildInfo()
    found = json.loads(record.read_text())
    errors = {name: entry["error"] for name, entry in found["extensions"].items()}
    built = found.get("cuda") or {}  # a record from before there was one has none
    cuda = CUDABuild(built.get("nvcc"), tuple(built.get("architectures", ())), built.get("oldest_torch"))
    return BuildInfo(found["python"], found["torch"], found["compiler"], errors, cuda)


def library(extension: str) -> Path:
    """Where the shared library of an extension is, if it was built."""
    return PACKAGE / f"{extension}.so"


def why_missing(extension: str) -> str:
    """Why there is no library for `extension`, with the original error where its build failed."""
    error = build_info().errors.get(extension)
    if error is not None:
        return f"its build failed:\n{error}"
    return f"it was not built; {HOW_TO_BUILD}"
