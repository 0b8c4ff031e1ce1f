"""Files of tensors (safetensors) with a checksum in their metadata, and what has to hold for the tensors in them.

Nothing in such a file is pickled, so reading one runs no code of whoever wrote it, and a tensor in it takes no more
memory than the file has bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdcgan.dcgan.files import replacing

CHECKSUM = "sha256"
_NEVER_NEGATIVE = ("running_var", "exp_avg_sq", "/step")  # a square root or a power is taken of them


class Damaged(Exception):
    """Why a file can't be read, or that it is not what was written."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, atomically. Raises OSError for a place that can't be written to."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    checksum = _Checksum(metadata)
    for name, value in sorted(tensors.items()):
        checksum.add(name, value)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {**metadata, CHECKSUM: checksum.hex()})


def read(path: Path, *prefixes: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Those tensors whose names begin with one of `prefixes` (without them, all), and the metadata.

    Raises Damaged for a file that is none, or whose checksum, if it has one, is not that of its content; OSError for
    one that can't be opened.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            expected = metadata.pop(CHECKSUM, None)
            checksum = _Checksum(metadata)
            for name in sorted(file.keys()):
                if expected is None and not name.startswith(prefixes or ""):
                    continue
                value = file.get_tensor(name)
                if expected is not None:
                    checksum.add(name, value)
                if name.startswith(prefixes or ""):
                    tensors[name] = value
    except OSError:
        raise
    except Exception as error:  # the library has errors of many types for what is no such file
        raise Damaged(str(error) or type(error).__name__) from error
    if expected is None:
        return tensors, metadata
    if checksum.hex() != expected:
        raise Damaged("its checksum is another than the one written with it")
    return tensors, {**metadata, CHECKSUM: expected}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, unchecked; none of a file that can't be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception:  # as in `read`
        return {}


def check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `tensors` are just the `expected` ones, which may be on "meta": by name, and each by
    `check_tensor`."""
    for name in sorted({*expected} ^ {*tensors}):
        raise ValueError(f"{name} is {'missing' if name in expected else 'not expected'}")
    for name, wanted in expected.items():
        check_tensor(name, tensors[name], wanted)


def check_tensor(name: str, value: Tensor, wanted: Tensor) -> None:
    """Raise ValueError unless `value` has the shape and the dtype of `wanted` (any floating-point one for another), and
    is finite, and not negative where that can't be."""
    if value.shape != wanted.shape:
        raise ValueError(f"{name} has shape {list(value.shape)}: expected {list(wanted.shape)}")
    real = value.is_floating_point() and wanted.is_floating_point()
    if value.dtype != wanted.dtype and not real:
        raise ValueError(f"{name} is {value.dtype}: expected {wanted.dtype}")
    if real:
        value = value.to(wanted.dtype)
        if not value.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
        if name.endswith(_NEVER_NEGATIVE) and (value < 0).any():
            raise ValueError(f"{name} has values below 0")


class _Checksum:
    """SHA-256 of metadata, and of each tensor's name, dtype, shape and bytes, in the order of the names."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._hash = hashlib.sha256(_text(sorted(metadata.items())))

    def add(self, name: str, value: Tensor) -> None:
        self._hash.update(_text([name, str(value.dtype), list(value.shape)]))
        self._hash.update(value.reshape(-1).view(torch.uint8).numpy().data)

    def hex(self) -> str:
        return self._hash.hexdigest()


def _text(content: Iterable) -> bytes:
    return json.dumps(list(content)).encode()
