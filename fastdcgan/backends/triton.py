"""The Triton backend: contractions with their prologues and epilogues in one kernel each (`kernels/`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdcgan.backends.base import Backend
from fastdcgan.backends.boundaries import boundaries as boundaries_by_rule
from fastdcgan.geometry import Pair
from fastdcgan.spec import Algorithm, Boundaries, Operand, Unavailable

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (3, 6)  # of Triton
_OTHERS = "use 'auto', 'cpu' or 'reference'"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors, as TRITON_INTERPRET said when they were defined."""
    import triton

    return triton.knobs.runtime.interpret


class TritonBackend(Backend):
    """NVIDIA GPUs from compute capability 8.0 on; with TRITON_INTERPRET=1 the CPU, slowly, for tests.

    Normalisation and activation always run here. A contraction that no algorithm can run is PyTorch's own convolution
    between those passes.
    """

    name = "triton"
    chooses_boundaries = True
    compiles = True

    def require(self) -> None:
        asked = os.environ.get("TRITON_INTERPRET")
        if not torch.cuda.is_available() and not asked:  # before the import, which takes long
            raise Unavailable(f"backend 'triton' needs a CUDA GPU, or TRITON_INTERPRET=1 for tests; {_OTHERS}")
        try:
            import triton
        except ImportError as error:
            raise Unavailable(
                f"backend 'triton' can't import triton: {type(error).__name__}: {error}; {_OTHERS}"
            ) from error
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            raise Unavailable(f"backend 'triton' needs triton {oldest} or later, found {triton.__version__}; {_OTHERS}")
        if interpreted():
            return
        if not torch.cuda.is_available():
            raise Unavailable(f"backend 'triton' needs a CUDA GPU, or TRITON_INTERPRET=1, not {asked!r}; {_OTHERS}")
        self._try()

    def _try(self) -> None:
        """Compile and run a small kernel: that takes a C compiler, Triton's own tools and a folder to write to."""
        ones = torch.ones(1, 1, device="cuda")
        try:
            self.coefficients(ones, ones, None, None, None, 1e-5)
        except Exception as error:  # whatever Triton raises where one of these is missing
            raise Unavailable(
                f"backend 'triton' can't run a kernel: {type(error).__name__}: {error}; {_OTHERS}"
            ) from error

    def compiling_ahead(self) -> contextlib.AbstractContextManager[None]:
        from fastdcgan.kernels import launch

        return launch.compiling_ahead()

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        runs_on = "cpu" if interpreted() else "cuda"
        if device_type != runs_on:
            return f"it runs on the device type {runs_on!r}, not {device_type!r}"
        if dtype not in _DTYPES:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, not {dtype}"
        if runs_on == "cuda":
            if torch.version.hip is not None:
                return "it runs on NVIDIA GPUs, and this is a ROCm build of PyTorch"
            capability = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
            if capability < (8, 0):
                return f"it needs compute capability 8.0 or later, not {capability[0]}.{capability[1]}"
        return None

    def boundaries(
        self, blocks: Sequence, weights: Sequence[Tensor | None], size: Pair, needs: Sequence[bool]
    ) -> Boundaries:
        return boundaries_by_rule(blocks, weights, size, needs)

    def algorithms(self, op: str) -> Sequence[Algorithm]:
        """The ways to run a contraction, in the order in which they are tried where nothing was measured."""
        from fastdcgan.kernels.algorithms import ALGORITHMS

        return ALGORITHMS[op]

    # --- normalisation and activation ---

    def norm_act(self, a: Operand) -> Tensor:
        from fastdcgan.kernels import norm_act

        return norm_act.norm_act(a)

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        from fastdcgan.kernels import norm_act

        return norm_act.norm_act_reduce(da, y, coef, act, slope)

    def grad_stats(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        from fastdcgan.kernels import norm_act

        return norm_act.grad_stats(da, y, coef, act, slope)

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        from fastdcgan.kernels import norm_act

        return norm_act.batch_stats(y, stat_groups)

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        from fastdcgan.kernels import norm_act

        return norm_act.coefficients(mean, var, weight, bias, shift, eps)

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: int) -> Tensor:
        from fastdcgan.kernels import norm_act

        return norm_act.grad_coefficients(sums, coef, count)

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        from fastdcgan.kernels import norm_act

        norm_act.update_running(mean, var, stats, shift, factor, momentum)
