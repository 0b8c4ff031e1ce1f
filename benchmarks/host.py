"""Host time: fused nets so tiny that what is timed is the Python and C++ between kernels, against the plain modules.

Everything runs on one thread and in float32. Times are CPU time of this process, which others that run beside it change
little; ratios are fused over plain, and at most 1 is the aim.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastdcgan.benchmarks import harness
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.results import Case
from fastdcgan.benchmarks.runners import DCGAN, BlockRunner
from fastdcgan.benchmarks.shapes import Block, NetShape, inputs
from fastdcgan.benchmarks.suites import Contest, least_kinked, train
from fastdcgan.engine import forwards

PARTS = ("forward, no_grad", "forward", "backward")
_NETS = NetShape(16, nz=8, ngf=4, ndf=4)
_STEP_BATCH = 4
_CLOCK = harness.CPUTimer(time.process_time)
_FORMATS = {"NCHW": False, "channels_last": True}


@dataclass(frozen=True)
class Chain:
    """Blocks that feed each other, and the batch that they run on."""

    name: str
    blocks: Sequence[Block]
    batch: int = 2

    def module(self) -> nn.Sequential:
        return nn.Sequential(*(layer for block in self.blocks for layer in block.layers()))


def _blocks(count: int, norm: bool) -> Chain:
    block = Block("B", False, 8, 8, 4, "leaky_relu", norm, kernel=3, stride=1)
    title = f"{count} block{'s' * (count > 1)}{' with BatchNorm' * norm}"
    return Chain(title, [block] * count)


# 1 and 4 blocks on [2, 8, 4, 4], and the two nets of a 16x16 DCGAN
CHAINS = (
    *(_blocks(count, norm) for norm in (False, True) for count in (1, 4)),
    Chain("generator", _NETS.generator()),
    Chain("discriminator", _NETS.discriminator()),
)


class _ChainRunner(BlockRunner):
    """A chain in float32, called with nothing around it that would take host time, too."""

    def prepare(self) -> None:
        """Until it is known which way of it is the fastest, since finding out takes host time."""
        super().prepare()
        for call in (self._both, self.without_gradients):
            call()
            while forwards.undecided(self.module):
                call()

    def _both(self) -> None:
        self._forward()
        self._backward()

    def _forward(self) -> None:
        self.out = self.module(self.x)

    def without_gradients(self) -> None:
        with torch.no_grad():
            self.module(self.x)


def run_host(
    device: torch.device, timing: harness.Timing, show: Callable[[str, str], None] = lambda case, text: None
) -> Iterator[Case]:
    """A case for each part of each chain in each memory format, and for a whole training step, GANStep against the
    textbook loop."""
    for format, channels_last in _FORMATS.items():
        for chain in CHAINS:
            show(f"host time, {chain.name}, {format}", "timing")
            with _one_thread():
                contest = _run_chain(chain, channels_last, device, timing)
            for i, part in enumerate(PARTS):
                yield contest.case("host", f"{chain.name}, {format}", part, chain.batch, i, "eager")
        show(f"host time, training step, {format}", "timing")
        with _one_thread():
            contest = _contest("train", channels_last, device)
            data = [inputs(_NETS, _STEP_BATCH)]
            least = least_kinked(_NETS.generator() + _NETS.discriminator(), _STEP_BATCH)
            train(contest, _NETS.nets, data, DCGAN, least, timing, _CLOCK)
        yield contest.case("host", f"training step, {format}", "step", _STEP_BATCH, 0, "eager")


def _run_chain(chain: Chain, channels_last: bool, device: torch.device, timing: harness.Timing) -> Contest:
    torch.manual_seed(0)
    module = chain.module()
    (x, _), (_, grad) = chain.blocks[0].data(chain.batch), chain.blocks[-1].data(chain.batch)
    contest = _contest("fused", channels_last, device)
    contest.build(
        lambda peer, compute: _ChainRunner(peer, module, x, grad, device, compute),
        least_kinked(chain.blocks, chain.batch),
    )
    segments = {
        name: (runner.without_gradients, runner.forward, runner.backward)
        for name, runner in contest.runners.items()
        if isinstance(runner, _ChainRunner)
    }
    contest.time(segments, timing, _CLOCK)
    return contest


def _contest(ours: str, channels_last: bool, device: torch.device) -> Contest:
    """The plain modules against ours, both in one memory format."""
    plain = replace(PEERS["eager"], label="plain modules", channels_last=channels_last)
    return Contest([plain, replace(PEERS[ours], channels_last=channels_last)], device, "fp32")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
