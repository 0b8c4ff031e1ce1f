"""The registry of backends, and which one runs.

A backend is a subclass of `Backend` with the primitives as methods. Nothing above this package knows which one runs:
`select` gives a name, and the primitives take that name.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator

import torch

from fastdcgan.backends.base import Backend
from fastdcgan.spec import Unavailable

__all__ = ["Backend", "Unavailable", "backend", "status"]

# The order in which "auto" tries them: what is compiled before what compiles itself at first use.
NAMES = ("cuda", "triton", "cpu", "reference")
_CLASSES = {"triton": "TritonBackend", "cuda": "CUDABackend", "cpu": "CPUBackend", "reference": "ReferenceBackend"}
_GPU = ("cuda", "triton")  # whose kernels "auto" has a choice of
_requested: str = os.environ.get("FASTDCGAN_BACKEND") or "auto"
_loaded: dict[str, Backend | Unavailable] = {}  # each backend is tried once
_selected: dict[tuple[str, torch.dtype], str] = {}  # what "auto" found


def get(name: str) -> Backend:
    """The backend `name`, loaded at first use. Raises ValueError if it is unknown, Unavailable if it can't run."""
    found = _loaded.get(name)
    if found is None:
        try:
            found = _load(name)
            found.require()
        except Unavailable as error:
            found = error.with_traceback(None)
        _loaded[name] = found
    if isinstance(found, Unavailable):
        # Not itself: a traceback would keep whoever calls alive, with models and tensors.
        raise Unavailable(*found.args) from found.__cause__
    return found


def _load(name: str) -> Backend:
    if name == "auto":
        return members("auto")[0]
    if name in _CLASSES:
        return getattr(importlib.import_module(f"fastdcgan.backends.{name}"), _CLASSES[name])()
    raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {', '.join(map(repr, NAMES))}")


def members(name: str) -> list[Backend]:
    """The backends whose algorithms run where `select` said `name`: one, or on a GPU for "auto" all that can run there.

    The first does all that is no contraction.
    """
    if name != "auto":
        return [get(name)]
    return [get(own) for own in _GPU if _why_not(own) is None and get(own).why_not("cuda", torch.float32) is None]


def status() -> dict[str, str]:
    """name -> "available", or why it can't run with the original error."""
    return {name: _why_not(name) or "available" for name in NAMES}


def _why_not(name: str) -> str | None:
    try:
        get(name)
    except Unavailable as error:
        return str(error)
    return None


def reasons(device_type: str, dtype: torch.dtype) -> dict[str, str | None]:
    """name -> None where the backend runs blocks of this device and dtype, else the reason why it doesn't."""
    return {name: _why_not(name) or get(name).why_not(device_type, dtype) for name in NAMES}


def select(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs a block: the one asked for, or for "auto" the first in `NAMES` that can.

    On a GPU that is "auto" itself where one of ours can: then each contraction has the algorithms of all
    (`dispatch/router.py`).
    Raises Unavailable if the one asked for can't run it.
    """
    if requested != "auto":
        reason = get(requested).why_not(device_type, dtype)
        if reason is not None:
            raise Unavailable(
                f"backend {requested!r} can't run this block: {reason}; {_alternatives(device_type, dtype)}"
            )
        return requested
    key = (device_type, dtype)
    if key not in _selected:
        first = next(name for name, reason in reasons(device_type, dtype).items() if reason is None)
        _selected[key] = "auto" if device_type == "cuda" and first in _GPU else first
    return _selected[key]


_MEANT = {"cuda": "cuda", "cpu": "cpu"}  # for each device type


def missing(device_type: str) -> str | None:
    """Why the compiled backend that is meant for a device type is missing; None if it isn't, or there is none."""
    meant = _MEANT.get(device_type)
    return None if meant is None or isinstance(_loaded.get(meant), Backend) else _why_not(meant)


# What torch.compiler.assume_constant_result does, without importing the compiler: that takes longer than all the rest.
select._dynamo_marked_constant = missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _alternatives(device_type: str, dtype: torch.dtype) -> str:
    able = [name for name, reason in reasons(device_type, dtype).items() if reason is None]
    return f"those that can: {', '.join(able)} (or 'auto')"


def requested() -> str:
    """The name asked for: by `backend()`, else by FASTDCGAN_BACKEND, else "auto"."""
    return _requested


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run blocks on the backend `name` ("auto", "triton", "cuda", "cpu", "reference") inside a `with`; for all threads.

    Raises ValueError for an unknown name and `Unavailable` (a RuntimeError) for one that can't run here, at once.
    """
    global _requested
    if name != "auto":
        get(name)
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


class _Package(types.ModuleType):
    """`fastdcgan.backends` is this package and, called, `status()`."""

    def __call__(self) -> dict[str, str]:
        return status()


sys.modules[__name__].__class__ = _Package
