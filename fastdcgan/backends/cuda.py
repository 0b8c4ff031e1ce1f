"""The CUDA C++ kernels of csrc/cuda: norm-and-activation passes, statistics, and contractions.

Image-side layers have kernels that are bound by bytes (`cuda_image_side`), all others run on tensor cores
(`cuda_contractions`); what neither takes is PyTorch's own (cuDNN).

The library is loaded when the backend is first used. It is built on torch's stable ABI, so it also runs with later
versions of torch than the one it was built with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cuda_contractions, cuda_facts, cuda_image_side, cuda_tiles
from fastdcgan.backends.base import Backend
from fastdcgan.backends.boundaries import boundaries as boundaries_by_rule
from fastdcgan.build_info import build_info, library, why_missing, why_stale
from fastdcgan.geometry import Pair
from fastdcgan.spec import STORE, Algorithm, Boundaries, Call, Operand, Unavailable

EXTENSION = "_cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OTHERS = "use 'auto', 'cpu' or 'reference'"


def runs_on(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures`, as TORCH_CUDA_ARCH_LIST names them, runs on this compute capability.

    Machine code runs on the same major version from its minor version on, that of an "a" on its very own alone; what
    comes with PTX is compiled anew for all later ones.
    """
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if capability == (major, minor) or (ptx and capability >= (major, minor) and number[-1] not in "af"):
            return True
        if number[-1] != "a" and capability[0] == major and capability[1] >= minor:
            return True
    return False


class CUDABackend(Backend):
    """float32, bfloat16 and float16 tensors [N, C, H, W] on NVIDIA GPUs, channels_last or contiguous; arithmetic and
    per-channel vectors are float32. The same input gives the same bits on every run; a CUDA graph may capture it."""

    name = "cuda"
    device_type = "cuda"
    chooses_boundaries = True

    @property
    def ops(self) -> Any:
        """The operators that the library registers."""
        return torch.ops.fastdcgan_cuda

    def require(self) -> None:
        if not torch.cuda.is_available():
            raise Unavailable(f"backend 'cuda' needs an NVIDIA GPU that PyTorch finds; {_OTHERS}")
        if torch.version.hip is not None:
            raise Unavailable(f"backend 'cuda' needs an NVIDIA GPU, and this is a ROCm build of PyTorch; {_OTHERS}")
        path = library(EXTENSION)
        if not path.exists():
            raise Unavailable(f"backend 'cuda' needs the CUDA extension {EXTENSION}: {why_missing(EXTENSION)}")
        stale = why_stale(EXTENSION)
        if stale is not None:
            raise Unavailable(f"backend 'cuda': {stale}")
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise Unavailable(
                f"backend 'cuda' can't load {path.name}: {error}; it was built with torch {build_info().torch}, "
                f"and this is {torch.__version__}"
            ) from error
        cuda_facts.require_agreement(self.ops)

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != self.device_type:
            return f"it runs on the device type {self.device_type!r}, not {device_type!r}"
        if dtype not in DTYPES:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {dtype}"
        if device_type == "cuda":
            built = build_info().cuda.architectures
            for index in range(torch.cuda.device_count()):
                capability = torch.cuda.get_device_capability(index)
                if not runs_on(built, capability):
                    return (
                        f"it was built for {' '.join(built)}, and GPU {index} has compute capability "
                        f"{capability[0]}.{capability[1]}: build it with TORCH_CUDA_ARCH_LIST"
                    )
        return None

    def boundaries(
        self, blocks: Sequence, weights: Sequence[Tensor | None], size: Pair, needs: Sequence[bool]
    ) -> Boundaries:
        return boundaries_by_rule(blocks, weights, size, needs)

    # --- contractions ---

    def settings(self) -> tuple:
        return (cuda_contractions.exact(torch.float32),)

    def algorithms(self, op: str) -> Sequence[Algorithm]:
        return [
            Algorithm("cuda image-side", lambda call: cuda_image_side.why_not(self.ops, call), self._image_side),
            Algorithm(
                "cuda",
                cuda_contractions.why_not,
                lambda call, tile: cuda_contractions.run(self.ops, call, tile),
                cuda_contractions.tiles,
                cuda_tiles.Choice,
            ),
        ]

    def _image_side(self, call: Call, tile: None) -> Any:
        if call.op == "weight_grad":
            return cuda_image_side.weight_grad(self.ops, call)
        if cuda_image_side.fuses(call.epilogue):
            return cuda_image_side.contract(self.ops, call), call.a.x.new_empty((0,), dtype=torch.float32)
        return self.apply_epilogue(cuda_image_side.contract(self.ops, call._replace(epilogue=STORE)), call.epilogue)

    # --- normalisation and activation ---

    def norm_act(self, a: Operand) -> Tensor:
        assert a.coef is not None
        act = ACTIVATIONS[a.act].id
        if a.y is None:
            return self.ops.norm_act(a.x, a.coef, act, a.slope)
        return self.ops.norm_act_backward(a.x, a.y, a.coef, act, a.slope)

    def norm_act_reduce(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> Tensor:
        return self.ops.norm_act_reduce(da, y, coef, ACTIVATIONS[act].id, slope)

    def grad_stats(self, da: Tensor, y: Tensor, coef: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        return self.ops.grad_stats(da, y, coef, ACTIVATIONS[act].id, slope)

    def batch_stats(self, y: Tensor, stat_groups: int) -> Tensor:
        return self.ops.batch_stats(y, stat_groups)

    def coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        return self.ops.coefficients(mean, var, weight, bias, shift, eps)

    def grad_coefficients(self, sums: Tensor, coef: Tensor, count: int) -> Tensor:
        return self.ops.grad_coefficients(sums, coef, count)

    def update_running(
        self, mean: Tensor, var: Tensor, stats: Tensor, shift: Tensor | None, factor: Tensor | None, momentum: float
    ) -> None:
        if mean.dtype == var.dtype == torch.float32 and mean.is_contiguous() and var.is_contiguous():
            self.ops.update_running_(mean, var, stats, shift, factor, momentum)
        else:
            super().update_running(mean, var, stats, shift, factor, momentum)
