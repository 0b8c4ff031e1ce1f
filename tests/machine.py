"""What the tests run on: a device, and the backends that serve it.

FASTDCGAN_TEST_DEVICE   the device that the tests run on ("cpu" by default, or "cuda")
"""

from __future__ import annotations

import os

import torch

from fastdcgan import backends

DEVICE = torch.device(os.environ.get("FASTDCGAN_TEST_DEVICE", "cpu"))


def backends_here(dtype: torch.dtype = torch.float32) -> list[str]:
    """The names of the backends that run blocks of `dtype` on the test device."""
    return [name for name, reason in backends.reasons(DEVICE.type, dtype).items() if reason is None]
