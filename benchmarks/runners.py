"""Peers at work: one call is one training step, one forward and one backward of a block, or one batch of images.

Nothing about the algorithm changes: the step is one function for everybody, or, for the peer that shows the whole of
fastdcgan, `GANStep`, which is equal to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdcgan.benchmarks import steps
from fastdcgan.benchmarks.peers import NotHere, Peer
from fastdcgan.benchmarks.pix2pix import pix2pix_step
from fastdcgan.gan_step import GANStep
from fastdcgan.optim import FusedAdam


def _autocast(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype == torch.bfloat16 else None


def _autocast_region(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=_autocast(dtype), enabled=_autocast(dtype) is not None)


def _to(tensor: Tensor, peer: Peer, device: torch.device, dtype: torch.dtype) -> Tensor:
    # `.to` keeps strides that are already dense, so the format is set by a copy of its own.
    memory_format = torch.channels_last if peer.channels_last and tensor.dim() == 4 else torch.contiguous_format
    return tensor.to(device, dtype, copy=True).contiguous(memory_format=memory_format)


def _capture(function: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph


def _fused_adam(net: nn.Module, device: torch.device) -> torch.optim.Adam:
    rate = torch.tensor(steps.LEARNING_RATE, device=device)
    return FusedAdam(net.parameters(), rate, steps.BETAS, capturable=device.type == "cuda")


@dataclass(frozen=True)
class Algorithm:
    """What all peers of a case do in a step, and the forward pass whose saved tensors are counted."""

    step: Callable[..., tuple[Tensor, Tensor]]
    forward: Callable[[nn.Module, nn.Module, Tensor], Tensor]


DCGAN = Algorithm(steps.gan_step, lambda generator, discriminator, noise: discriminator(generator(noise)))
PIX2PIX = Algorithm(pix2pix_step, lambda generator, discriminator, x: discriminator(x, generator(x)))


class StepRunner:
    """A peer that trains. Calling it runs one step on the next of its inputs and returns the two losses.

    Args:
        peer: see `Peer`.
        nets: vanilla (generator, discriminator) on the CPU, which are copied.
        data: (real, noise) pairs on the CPU, used in turn.
        device, dtype: where and in what; bfloat16 is autocast over float32 weights.
        algorithm: what a step is.
        graph: of `GANStep`, for the peer that is one.
    """

    def __init__(
        self,
        peer: Peer,
        nets: tuple[nn.Module, nn.Module],
        data: Sequence[tuple[Tensor, Tensor]],
        device: torch.device,
        dtype: torch.dtype,
        algorithm: Algorithm = DCGAN,
        graph: bool | None = None,
    ) -> None:
        peer.require(device)
        if peer.whole and algorithm is not DCGAN:
            raise NotHere("GANStep is the DCGAN's step")
        self.peer, self.device, self.dtype, self.algorithm = peer, device, dtype, algorithm
        self.generator, self.discriminator = (peer.transform(copy.deepcopy(net), device, dtype) for net in nets)
        adam = _fused_adam if peer.whole else steps.adam
        self.opt_g, self.opt_d = (adam(net, device) for net in (self.generator, self.discriminator))
        self.gan_step = self._whole_step(graph) if peer.whole else None
        self.initial = [tensor.detach().clone() for tensor in self._tensors()]
        data_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.data = [tuple(_to(tensor, peer, device, data_dtype) for tensor in pair) for pair in data]
        self.next = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capture_peak_bytes = 0
        # Where a graph reads and writes; eager peers read their data in place.
        self.real, self.noise = self.data[0]
        self.losses: tuple[Tensor, Tensor] | None = None

    def _whole_step(self, graph: bool | None) -> GANStep:
        nets, optimisers = (self.generator, self.discriminator), (self.opt_g, self.opt_d)
        return GANStep(*nets, *optimisers, real_label=1.0, dtype=_autocast(self.dtype), graph=graph)

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
        self.losses = self.algorithm.step(*nets, *optimisers, self.real, self.noise, _autocast(self.dtype))

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

    def train_on(self, real: Tensor, noise: Tensor) -> None:
        """A step of a peer without a graph of its own, on data that is on the device."""
        self.real, self.noise = real, noise
        self._step()

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
        """Bytes that autograd keeps between forward and backward of D(G(.)); None for compiled or captured nets."""
        if self.peer.compile_mode is not None or self.peer.graph:
            return None

        def forward() -> Tensor:
            with _autocast_region(self.device, self.dtype):
                return self.algorithm.forward(self.generator, self.discriminator, self.data[0][1])

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


class EvalRunner:
    """A peer that generates: calling it runs the generator in eval mode on its input.

    Args:
        peer: see `Peer`.
        net: the vanilla generator on the CPU, which is copied.
        noise: its input, float32 on the CPU.
        device, dtype: where and in what; bfloat16 is autocast over float32 weights.
    """

    def __init__(self, peer: Peer, net: nn.Module, noise: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        peer.require(device)
        self.peer, self.device, self.dtype = peer, device, dtype
        self.net = peer.transform(copy.deepcopy(net).eval(), device, dtype)
        self.noise = _to(noise, peer, device, torch.float64 if dtype == torch.float64 else torch.float32)
        self.out: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def _generate(self) -> None:
        if self.peer.own_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with _autocast_region(self.device, self.dtype):
            self.out = self.net(self.noise)

    def prepare(self) -> None:
        """Warm-up, compilation and capture."""
        self.peer.warm_up(self._generate, self.device)
        if self.peer.graph:
            self.graph = _capture(self._generate)

    def __call__(self) -> None:
        if self.graph is None:
            self._generate()
        else:
            self.graph.replay()

    def observe(self) -> list[Tensor]:
        """The images in float64 on the CPU."""
        self()
        assert self.out is not None
        return [self.out.double().cpu().contiguous()]

    def saved_bytes(self) -> None:
        """Nothing is kept for a backward."""
