"""The operators of the C++ and CUDA extensions that training needs beside the blocks: Adam, the loss, images.

Each has a plain PyTorch form where it is used, which runs where `why_not` has a reason.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdcgan import backends
from fastdcgan.backends import cuda_facts

NAMESPACES = {"cpu": "fastdcgan_cpu", "cuda": "fastdcgan_cuda"}

# Elements for which Adam keeps a step counter of their own. Elsewhere a parameter has one counter.
ADAM_CHUNK = {"cuda": cuda_facts.ADAM_CHUNK}

_reasons: dict[str, str | None] = {}  # each device is asked for once: this is on the way of every step


def why_not(device_type: str) -> str | None:
    """None if the operators run on tensors of this device, else why plain PyTorch does it."""
    if backends.requested() == "reference":
        return "the backend 'reference' was asked for"
    if device_type not in _reasons:
        _reasons[device_type] = _ask(device_type)
    return _reasons[device_type]


def _ask(device_type: str) -> str | None:
    if device_type not in NAMESPACES:
        return f"no kernels for the device type {device_type!r}"
    try:
        backends.get(device_type)  # the backend of that name brings the operators
    except backends.Unavailable as error:
        return str(error)
    return None


def operators(device_type: str) -> Any:
    """The operators for a device that `why_not` has nothing against."""
    return getattr(torch.ops, NAMESPACES[device_type])
