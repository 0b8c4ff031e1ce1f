"""The C++ kernels of csrc/cpu: norm-and-activation passes and statistics; contractions are PyTorch's own.

One library was built for each vector width; the one for this processor is loaded when the backend is first used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends.base import Backend, Operand, Unavailable
from fastdcgan.build_info import build_info, library, why_missing, why_stale

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def extension_name() -> str:
    """The library for this processor; ATEN_CPU_CAPABILITY (default, avx2, avx512) caps what PyTorch reports."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return f"_cpu_{capability}" if capability in ("avx2", "avx512") else "_cpu_default"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class CPUBackend(Backend):
    """float32, bfloat16 and float16 tensors [N, C, H, W] on the CPU, channels_last or contiguous; arithmetic and
    per-channel vectors are float32."""

    name = "cpu"

    def require(self) -> None:
        name = extension_name()
        path = library(name)
        if not path.exists():
            raise Unavailable(f"backend 'cpu' needs the C++ extension {name}: {why_missing(name)}")
        stale = why_stale(name)
        if stale is not None:
            raise Unavailable(f"backend 'cpu': {stale}")
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            built = build_info().torch
            hint = f"it was built with torch {built} and this is {torch.__version__}: build it again"
            raise Unavailable(
                f"backend 'cpu' can't load {path.name}: {error}" + ("" if built == torch.__version__ else f"; {hint}")
            ) from error

    def covers(self, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cpu":
            return f"it runs on the device type 'cpu', not {device_type!r}"
        if dtype not in DTYPES:
            return f"it takes {', '.join(map(_name, DTYPES))}, not {_name(dtype)}"
        return None

    def norm_act(self, a: Operand) -> Tensor:
        assert a.coef is not None
        act = ACTIVATIONS[a.act].id
        if a.y is None:
            return torch.ops.fastdcgan_cpu.norm_act(a.x, a.coef, act, a.slope)
        return torch.ops.fastdcgan_cpu.norm_act_backward(a.x, a.y, a.coef, act, a.slope)

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        return torch.ops.fastdcgan_cpu.norm_act_reduce(da, y, coef, ACTIVATIONS[act].id, slope)

    def grad_stats(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        # In place, so `da` has to lie as `y` does.
        if y.is_contiguous(memory_format=torch.channels_last):
            g = da.contiguous(memory_format=torch.channels_last)
        else:
            y, g = y.contiguous(), da.contiguous()
        sums = torch.ops.fastdcgan_cpu.grad_stats_(g, y, coef, ACTIVATIONS[act].id, slope)
        return g, sums

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        return torch.ops.fastdcgan_cpu.batch_stats(y, stat_groups)

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        return torch.ops.fastdcgan_cpu.coefficients(mean, var, weight, bias, shift, eps)

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        if mean.dtype == var.dtype == torch.float32 and mean.is_contiguous() and var.is_contiguous():
            torch.ops.fastdcgan_cpu.update_running_(mean, var, stats, shift, factor, momentum)
        else:
            super().update_running(mean, var, stats, shift, factor, momentum)

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: float) -> Tensor:
        return torch.ops.fastdcgan_cpu.grad_coefficients(sums, coef, count)
