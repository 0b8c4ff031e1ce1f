"""Who is compared: ways to run the same modules with the same weights on the same data, and what makes a result right.

`runners.py` brings a peer to the point where one call is one step, one block's passes or one batch of images.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastdcgan.folding import fold_batchnorm
from fastdcgan.fuse import fuse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
WARMUP_CALLS = 3


class NotHere(RuntimeError):
    """A peer that this machine can't run, with the reason."""


@dataclass(frozen=True)
class Peer:
    """One way to run a net.

    Args:
        name: what `--peers` takes.
        label: what a table shows.
        channels_last: memory format of images, activations and weights.
        fused: through `fastdcgan.fuse`.
        compile_mode: of `torch.compile`, or None for eager.
        force_layout: let inductor run convolutions in NHWC, which it otherwise doesn't for nets of few channels.
        graph: captured by hand as CUDA graphs, a whole step in one.
        folded: for eval: BatchNorm is folded into the weights beforehand.
        inplace_abn: BatchNorm and LeakyReLU in the package inplace_abn's one layer (Rota Bulo et al., 2018).
        whole: the step is `fastdcgan.GANStep` with `FusedAdam`, as `fastdcgan train` runs it; it captures itself.
    """

    name: str
    label: str
    channels_last: bool = True
    fused: bool = False
    compile_mode: str | None = None
    force_layout: bool = False
    graph: bool = False
    folded: bool = False
    inplace_abn: bool = False
    whole: bool = False

    def require(self, device: torch.device) -> None:
        """Raise NotHere, with the reason, if it can't run on `device`."""
        if device.type != "cuda" and (self.graph or self.force_layout):
            raise NotHere("needs a CUDA device")
        if self.inplace_abn and importlib.util.find_spec("inplace_abn") is None:
            raise NotHere("the package inplace_abn is not installed")

    def transform(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """`module` brought to the device and into this peer's form; in place where PyTorch does it in place."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        module = module.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        if dtype == torch.float64:
            module = module.double()
        if self.inplace_abn:
            module = _with_inplace_abn(module)
        if self.folded:
            module = fold_batchnorm(module)
        if self.fused:
            module = fuse(module)
        if self.compile_mode is not None:
            options = dict(torch._inductor.list_mode_options(self.compile_mode))
            if self.force_layout:
                options["force_layout_optimization"] = True
            # Not `module.compile()`: Dynamo skips frames of torch.nn, so for a Sequential nothing is compiled.
            module = cast(nn.Module, torch.compile(module, dynamic=False, options=options))
        return module

    def warm_up(self, function: Callable[[], object], device: torch.device) -> None:
        """Calls it a few times; before a capture on a stream other than the current one, as CUDA graphs want it.

        Raises RuntimeError if it should have been compiled and nothing was.
        """
        compiled = _compiled_frames() if self.compile_mode is not None else 0
        stream = torch.cuda.Stream(device) if self.graph else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            for _ in range(WARMUP_CALLS):
                function()
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
        if self.compile_mode is not None and _compiled_frames() == compiled:
            raise RuntimeError("torch.compile compiled nothing")

    @property
    def own_graphs(self) -> bool:
        """Whether inductor captures CUDA graphs of its own."""
        return self.compile_mode in ("max-autotune", "reduce-overhead")


_ALL = (
    Peer("eager", "PyTorch eager, NCHW", channels_last=False),
    Peer("eager-nhwc", "PyTorch eager, channels_last"),
    Peer("compile", "torch.compile", compile_mode="default"),
    Peer("compile-max", "torch.compile max-autotune, NHWC", compile_mode="max-autotune", force_layout=True),
    Peer(
        "compile-graph",
        "torch.compile max-autotune, NHWC, in one CUDA graph",
        compile_mode="max-autotune-no-cudagraphs",
        force_layout=True,
        graph=True,
    ),
    Peer("graph", "PyTorch channels_last in one CUDA graph", graph=True),
    Peer("fused", "fastdcgan", fused=True),
    Peer("fused-graph", "fastdcgan in one CUDA graph", fused=True, graph=True),
    Peer("train", "fastdcgan GANStep", fused=True, whole=True),
    # Its kernels take NCHW. It has no ReLU, so a generator stays as it is.
    Peer("inplace-abn", "inplace_abn, NCHW", channels_last=False, inplace_abn=True),
    Peer("folded", "PyTorch channels_last, BN folded", folded=True),
    Peer("compile-folded", "torch.compile, BN folded", folded=True, compile_mode="default"),
    Peer("fused-folded", "fastdcgan, BN folded", folded=True, fused=True),
)
PEERS = {peer.name: peer for peer in _ALL}
TRUTH = PEERS["eager"]  # which runs in float64
YARDSTICK = PEERS["eager-nhwc"]  # vanilla PyTorch, whose rounding error in the same dtype is the measure of others


def default_peers(device: torch.device, dtype: str) -> list[str]:
    """Names of the peers to run when none are asked for. NCHW is left out in bf16, where nobody would use it.

    A block has no step: "train" is for steps alone.
    """
    names = ["eager"] if dtype == "fp32" else []
    names += ["eager-nhwc", "compile"]
    if device.type == "cuda":
        names += ["compile-max", "compile-graph", "graph"]
    if importlib.util.find_spec("inplace_abn") is not None:
        names.append("inplace-abn")
    names.append("fused")
    if device.type == "cuda":
        names.append("fused-graph")
    return [*names, "train"]


def eval_peers(device: torch.device) -> list[str]:
    """Names of the peers that generate images when none are asked for."""
    names = ["eager-nhwc", "folded", "compile-folded", "fused", "fused-folded"]
    return [*names, "graph", "fused-graph"] if device.type == "cuda" else names


def _with_inplace_abn(module: nn.Module) -> nn.Module:
    """Every BatchNorm2d in front of a LeakyReLU in an nn.Sequential, and that one, replaced; weights and buffers are
    the same objects. It takes the absolute value of gamma, which is positive here."""
    from inplace_abn import InPlaceABN

    for sequential in [m for m in module.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(sequential) - 1):
            norm, act = sequential[i], sequential[i + 1]
            if isinstance(norm, nn.BatchNorm2d) and isinstance(act, nn.LeakyReLU):
                slope = act.negative_slope
                both = InPlaceABN(norm.num_features, norm.eps, norm.momentum, True, "leaky_relu", slope)
                both.weight, both.bias = norm.weight, norm.bias
                both.running_mean, both.running_var = norm.running_mean, norm.running_var
                sequential[i], sequential[i + 1] = both, nn.Identity()
    return module


def _compiled_frames() -> int:
    return torch._dynamo.utils.counters["frames"]["ok"]


def distance(result: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error ||result - truth|| / ||truth|| over corresponding tensors; NaN and inf stay so."""
    errors = []
    for a, b in zip(result, truth, strict=True):
        norm = torch.linalg.vector_norm(b)
        error = torch.linalg.vector_norm(a - b)
        errors.append(float(error if norm == 0 else error / norm))
    return float(torch.tensor(errors, dtype=torch.float64).max())


# How far an update's change of the losses may be off: it shows whether a peer learns at all, `observe` how exactly.
PROGRESS_TOLERANCE = 0.5


def tolerance(yardstick: float, dtype: torch.dtype, kinked: int) -> float:
    """How far from the float64 truth a peer may be.

    Twice as far as vanilla PyTorch in the same dtype on the same input, plus four roundings of that dtype, plus what
    rounding does at the kinks of ReLUs: a value within rounding of zero may take the other slope, and each that does of
    the `kinked` values of a layer moves the gradient by about 1/sqrt(kinked); four are allowed.
    """
    kinks = (4 / kinked) ** 0.5 if kinked else 0.0
    return 2 * yardstick + 4 * torch.finfo(dtype).eps + kinks
