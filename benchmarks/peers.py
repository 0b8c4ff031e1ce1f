"""Who is compared: ways to run the same modules with the same weights on the same data.

`StepRunner` and `BlockRunner` bring a peer to the point where one call is one training step, or one forward and one
backward of a block. They change nothing about the algorithm: the step is one function for everybody, or, for the peer
that shows the whole of fastdcgan, `GANStep`, which is equal to it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastdcgan
from fastdcgan.benchmarks import steps
from fastdcgan.optim import FusedAdam

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
        whole: the step is `fastdcgan.GANStep` with `FusedAdam`, as `fastdcgan train` runs it; it captures itself.
    """

    name: str
    label: str
    channels_last: bool = True
    fused: bool = False
    compile_mode: str | None = None
    force_layout: bool = False
    graph: bool = False
    whole: bool = False

    def require(self, device: torch.device) -> None:
        """Raise NotHere, with the reason, if it can't run on `device`."""
        if device.type != "cuda" and (self.graph or self.force_layout):
            raise NotHere("needs a CUDA device")

    def transform(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """`module` brought to the device and into this peer's form; in place where PyTorch does it in place."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        module = module.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        if dtype == torch.float64:
            module = module.double()
        if self.fused:
            module = fastdcgan.fuse(module)
        if self.compile_mode is not None:
            from torch import _inductor

            options = dict(_inductor.list_mode_options(self.compile_mode))
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
)
PEERS = {peer.name: peer for peer in _ALL}
TRUTH = PEERS["eager"]  # in float64
YARDSTICK = PEERS["eager-nhwc"]  # vanilla PyTorch, whose rounding error in the same dtype is the measure of others


def default_peers(device: torch.device, dtype: str) -> list[str]:
    """Names of the peers to run when none are asked for. NCHW is left out in bf16, where nobody would use it.

    A block has no step: "train" is for steps alone.
    """
    names = ["eager"] if dtype == "fp32" else []
    names += ["eager-nhwc", "compile"]
    if device.type == "cuda":
        names += ["compile-max", "compile-graph", "graph"]
    names.append("fused")
    if device.type == "cuda":
        names.append("fused-graph")
    return [*names, "train"]


def _compiled_frames() -> int:
    from torch._dynamo.utils import counters

    return counters["frames"]["ok"]


def _autocast(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype == torch.bfloat16 else None


def _autocast_region(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=_autocast(dtype), enabled=_autocast(dtype) is not None)


def _to(tensor: Tensor, peer: Peer, device: torch.device, dtype: torch.dtype) -> Tensor:
    # `.to` keeps strides that are already dense, so the format is set by a copy of its own.
    memory_format = torch.channels_last if peer.channels_last else torch.contiguous_format
    return tensor.to(device, dtype, copy=True).contiguous(memory_format=memory_format)


def _capture(function: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph


def _fused_adam(net: nn.Module, device: torch.device) -> torch.optim.Adam:
    rate = torch.tensor(steps.LEARNING_RATE, device=device)
    return FusedAdam(net.parameters(), rate, steps.BETAS, capturable=device.type == "cuda")


class StepRunner:
    """A peer that trains. Calling it runs one step on the next of its inputs and returns the two losses.

    Args:
        peer: see `Peer`.
        nets: vanilla (generator, discriminator) on the CPU, which are copied.
        data: (real, noise) pairs on the CPU, used in turn.
        device, dtype: where and in what; bfloat16 is autocast over float32 weights.
    """

    def __init__(
        self,
        peer: Peer,
        nets: tuple[nn.Module, nn.Module],
        data: Sequence[tuple[Tensor, Tensor]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        peer.require(device)
        self.peer, self.device, self.dtype = peer, device, dtype
        self.generator, self.discriminator = (peer.transform(copy.deepcopy(net), device, dtype) for net in nets)
        adam = _fused_adam if peer.whole else steps.adam
        self.opt_g, self.opt_d = (adam(net, device) for net in (self.generator, self.discriminator))
        self.gan_step = self._whole_step() if peer.whole else None
        self.initial = [tensor.detach().clone() for tensor in self._tensors()]
        data_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.data = [tuple(_to(tensor, peer, device, data_dtype) for tensor in pair) for pair in data]
        self.next = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capture_peak_bytes = 0
        # Where a graph reads and writes; eager peers read their data in place.
        self.real, self.noise = self.data[0]
        self.losses: tuple[Tensor, Tensor] | None = None

    def _whole_step(self) -> fastdcgan.GANStep:
        nets, optimisers = (self.generator, self.discriminator), (self.opt_g, self.opt_d)
        return fastdcgan.GANStep(*nets, *optimisers, real_label=1.0, dtype=_autocast(self.dtype))

    def prepare(self) -> None:
        """Warm-up, compilation and capture. Ends in the initial state."""
        if self.peer.graph:
            self.real, self.noise = self.real.clone(), self.noise.clone()
        self.peer.warm_up(self._step, self.device)
        if self.peer.graph:
            for optimiser in (self.opt_g, self.opt_d):
                optimiser.zero_grad(set_to_none=True)  # so that the capture allocates gradients in the graph's pool
            torch.cuda.reset_peak_memory_stats(self.device)
            self.graph = _capture(self._step)
            self.capture_peak_bytes = torch.cuda.max_memory_allocated(self.device)
        self.reset()

    def _step(self) -> None:
        if self.peer.own_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self.gan_step is not None:
            self.losses = self.gan_step(self.real, self.noise)[:2]
            return
        nets, optimisers = (self.generator, self.discriminator), (self.opt_g, self.opt_d)
        self.losses = steps.gan_step(*nets, *optimisers, self.real, self.noise, _autocast(self.dtype))

    def __call__(self) -> tuple[Tensor, Tensor]:
        real, noise = self.data[self.next]
        self.next = (self.next + 1) % len(self.data)
        if self.graph is None:
            self.real, self.noise = real, noise
            self._step()
        else:
            self.real.copy_(real)
            self.noise.copy_(noise)
            self.graph.replay()
        assert self.losses is not None
        return self.losses

    def _tensors(self) -> Iterator[Tensor]:
        for net in (self.generator, self.discriminator):
            yield from net.parameters()
            yield from net.buffers()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the initial weights, buffers and optimiser state, in place, because graphs hold their addresses."""
        for tensor, initial in zip(self._tensors(), self.initial, strict=True):
            tensor.copy_(initial)
        for optimiser in (self.opt_g, self.opt_d):
            for state in optimiser.state.values():
                for value in state.values():
                    value.zero_()
        self.next = 0

    def learn(self, yes: bool) -> None:
        """Whether Adam changes the weights; its work is the same."""
        for optimiser in (self.opt_g, self.opt_d):
            steps.set_learning_rate(optimiser, steps.LEARNING_RATE if yes else 0.0)

    def observe(self) -> list[Tensor]:
        """What has to agree between peers, from the initial state, in float64 on the CPU.

        All gradients of the generator and of the discriminator (a vector each) and the losses of one step in which
        nothing is learned: Adam between the two gradients would magnify rounding, since its first step is about
        lr*sign(g).
        """
        self.reset()
        self.learn(False)
        losses = self._losses()
        gradients = []
        for net in (self.generator, self.discriminator):
            # Written out in the logical order: memory formats differ.
            parts = [p.grad.double().contiguous().flatten() for p in net.parameters() if p.grad is not None]
            gradients.append(torch.cat(parts).cpu())
        self.learn(True)
        self.reset()
        return [*gradients, losses]

    def progress(self) -> Tensor:
        """How one update changes the two losses on the same data, from the initial state; float64 on the CPU."""
        self.reset()
        before = self._losses()
        self.next = 0
        after = self._losses()
        self.reset()
        return after - before

    def _losses(self) -> Tensor:
        return torch.stack(self()).double().cpu()

    def saved_bytes(self) -> int | None:
        """Bytes that autograd keeps between forward and backward of D(G(noise)); None for compiled or captured nets."""
        if self.peer.compile_mode is not None or self.peer.graph:
            return None

        def forward() -> Tensor:
            with _autocast_region(self.device, self.dtype):
                return self.discriminator(self.generator(self.data[0][1]))

        result = saved_bytes(forward, list(self._tensors()))
        self.reset()
        return result


class BlockRunner:
    """A peer that runs one block in training mode: `forward()`, then `backward()`, in turn.

    Args:
        peer: see `Peer`.
        module: the vanilla block on the CPU, which is copied.
        x, grad: its input and its output's gradient, float32 on the CPU.
        device, dtype: where and in what; `x` and `grad` come in this dtype, as they do inside a net.
        input_grad: whether the input's gradient is wanted.
    """

    def __init__(
        self,
        peer: Peer,
        module: nn.Module,
        x: Tensor,
        grad: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        input_grad: bool = True,
    ) -> None:
        peer.require(device)
        self.peer, self.device, self.dtype = peer, device, dtype
        self.module = peer.transform(copy.deepcopy(module), device, dtype)
        self.x = _to(x, peer, device, dtype).requires_grad_(input_grad)
        self.grad = _to(grad, peer, device, dtype)
        self.inputs = [*self.module.parameters(), *([self.x] if input_grad else [])]
        self.out: Tensor | None = None
        self.grads: tuple[Tensor, ...] = ()
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def _forward(self) -> None:
        if self.peer.own_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with _autocast_region(self.device, self.dtype):
            self.out = self.module(self.x)

    def _backward(self) -> None:
        assert self.out is not None
        self.grads = torch.autograd.grad(self.out, self.inputs, self.grad)

    def prepare(self) -> None:
        """Warm-up, compilation and capture: a graph for the forward, one for the backward in the same pool."""

        def both() -> None:
            self._forward()
            self._backward()

        self.peer.warm_up(both, self.device)
        if self.peer.graph:
            self.out, self.grads = None, ()
            forward = _capture(self._forward)
            self.graphs = forward, _capture(self._backward, pool=forward.pool())

    def forward(self) -> None:
        if self.graphs is None:
            self._forward()
        else:
            self.graphs[0].replay()

    def backward(self) -> None:
        if self.graphs is None:
            self._backward()
        else:
            self.graphs[1].replay()

    def observe(self) -> list[Tensor]:
        """Output and gradients in float64 on the CPU, contiguous."""
        self.forward()
        self.backward()
        assert self.out is not None
        return [tensor.detach().double().cpu().contiguous() for tensor in (self.out, *self.grads)]

    def saved_bytes(self) -> int | None:
        """Bytes that autograd keeps for the backward, input included; None for a compiled or captured block."""
        if self.peer.compile_mode is not None or self.peer.graph:
            return None

        def forward() -> Tensor:
            self._forward()
            assert self.out is not None
            return self.out

        return saved_bytes(forward, [*self.module.parameters(), *self.module.buffers()])


def saved_bytes(forward: Callable[[], Tensor], besides: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves during `forward`, but for those of `besides`."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for tensor in besides:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del out  # until here it kept the saved tensors, so no address was used twice
    return sum(storages.values())


def distance(result: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error ||result - truth|| / ||truth|| over corresponding tensors; NaN and inf stay so."""
    errors = []
    for a, b in zip(result, truth, strict=True):
        norm = torch.linalg.vector_norm(b)
        error = torch.linalg.vector_norm(a - b)
        errors.append(float(error if norm == 0 else error / norm))
    return float(torch.tensor(errors, dtype=torch.float64).max())


PROGRESS_TOLERANCE = 0.5  # of a change of the losses: whether it learns at all; how exactly is `observe`'s to say


def tolerance(yardstick: float, dtype: torch.dtype, kinked: int) -> float:
    """How far from the float64 truth a peer may be.

    Twice as far as vanilla PyTorch in the same dtype on the same input, plus four roundings of that dtype, plus what
    rounding does at the kinks of ReLUs: a value within rounding of zero may take the other slope, and each that does of
    the `kinked` values of a layer moves the gradient by about 1/sqrt(kinked); four are allowed.
    """
    kinks = (4 / kinked) ** 0.5 if kinked else 0.0
    return 2 * yardstick + 4 * torch.finfo(dtype).eps + kinks
