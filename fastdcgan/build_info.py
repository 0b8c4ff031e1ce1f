"""What setup.py built, as it recorded it in `_build.json` beside this file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
HOW_TO_BUILD = "build it with `pip install -e .` in the source folder (`make install` does)"


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
    digests: dict[str, str] = field(default_factory=dict)  # `sources_digest` of each extension
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
    digests = {name: entry.get("sources", "") for name, entry in found["extensions"].items()}
    return BuildInfo(found["python"], found["torch"], found["compiler"], errors, digests, cuda)


def sources_digest(csrc: Path, extension: str) -> str:
    """A digest of the files that an extension is built from. (setup.py uses it too: nothing here imports torch.)"""
    found = hashlib.sha256()
    for folder in ("common", "cuda" if extension == "_cuda" else "cpu"):
        for path in sorted((csrc / folder).rglob("*")):
            if path.is_file():
                found.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def why_stale(extension: str) -> str | None:
    """Why the library of `extension` is not what its sources beside the package say (in an editable installation whose
    sources have changed since), or None."""
    csrc = PACKAGE.parent / "csrc"
    if not csrc.is_dir() or build_info().digests.get(extension) == sources_digest(csrc, extension):
        return None
    return f"{extension} was built from other sources than csrc has now; {HOW_TO_BUILD}"


def library(extension: str) -> Path:
    """Where the shared library of an extension is, if it was built."""
    return PACKAGE / f"{extension}.so"


def why_missing(extension: str) -> str:
    """Why there is no library for `extension`, with the original error where its build failed."""
    error = build_info().errors.get(extension)
    if error is not None:
        return f"its build failed:\n{error}"
    return f"it was not built; {HOW_TO_BUILD}"
