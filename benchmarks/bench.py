"""What `fastdcgan bench` times: the sizes that suit a device, and the cases of the suites that were asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdcgan.benchmarks import host, profiling, suites
from fastdcgan.benchmarks.end_to_end import run_end_to_end
from fastdcgan.benchmarks.harness import Timing
from fastdcgan.benchmarks.peers import DTYPES, PEERS, default_peers, eval_peers
from fastdcgan.benchmarks.pix2pix import Pix2PixShape
from fastdcgan.benchmarks.results import Case
from fastdcgan.benchmarks.runners import StepRunner
from fastdcgan.benchmarks.shapes import Block, NetShape, inputs

SUITES = ("step", "folder", "pix2pix", "generate", "blocks", "host")
GENERATED = (1, 16, 64)  # batches of the generator alone


@dataclass(frozen=True)
class Sizes:
    """How much a run does."""

    shape: NetShape
    batch: int
    block_timing: Timing
    step_timing: Timing
    all_blocks: bool = True


_CPU = Sizes(NetShape(), 32, Timing(15, 0.02, 2.0, 5), Timing(15, 0.1, 45.0, 5))
_CUDA = Sizes(NetShape(), 128, Timing(30, 0.02, 2.0, 10), Timing(30, 0.1, 30.0, 10))
_QUICK = Sizes(NetShape(32, ngf=32, ndf=32), 16, Timing(5, 0.01, 1.0), Timing(5, 0.02, 4.0), all_blocks=False)


@dataclass(frozen=True)
class Request:
    """What to time, and on what; None is what suits the device. Raises ValueError for what makes no sense."""

    device: torch.device
    suites: Sequence[str] = SUITES
    image_size: int | None = None
    batches: Sequence[int] | None = None
    dtypes: Sequence[str] | None = None
    peers: Sequence[str] | None = None
    rounds: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        for name, values in (("batch", self.batches or ()), ("rounds", () if self.rounds is None else (self.rounds,))):
            if min(values, default=1) < 1:
                raise ValueError(f"--{name} has to be at least 1, not {min(values)}")

    @property
    def sizes(self) -> Sizes:
        return _QUICK if self.quick else _CUDA if self.device.type == "cuda" else _CPU

    @property
    def shape(self) -> NetShape:
        shape = self.sizes.shape
        return NetShape(self.image_size or shape.image_size, ngf=shape.ngf, ndf=shape.ndf)

    @property
    def batch(self) -> int:
        return self.batches[0] if self.batches else self.sizes.batch

    def dtype_names(self) -> Sequence[str]:
        return self.dtypes or (["bf16"] if self.device.type == "cuda" else ["fp32"])


def cases(request: Request, show: Callable[[str, str], None]) -> Iterator[Case]:
    """Every case that was asked for, as it is done; `show` gets the case's name and what is being done for it."""
    sizes, shape, device, wanted = request.sizes, request.shape, request.device, request.suites
    step_timing, block_timing = (_timing(t, request) for t in (sizes.step_timing, sizes.block_timing))
    for dtype in request.dtype_names():
        names = request.peers or default_peers(device, dtype)
        for batch in request.batches or [sizes.batch]:
            if "step" in wanted:
                say = functools.partial(show, f"step {shape.image_size}x{shape.image_size}, batch {batch}, {dtype}")
                contest = suites.Contest(names, device, dtype, say)
                case = suites.run_step(contest, shape, batch, step_timing)
                contest.profile(case)
                yield case
            if "folder" in wanted:
                show(f"training from a folder, batch {batch}, {dtype}", "making files, decoding them, timing")
                yield run_end_to_end(shape, batch, device, dtype, step_timing)
            if "pix2pix" in wanted:
                images = Pix2PixShape(shape.image_size, width=shape.ngf)
                say = functools.partial(show, f"pix2pix, batch {batch}, {dtype}")
                contest = suites.Contest(_without_whole(names, "pix2pix"), device, dtype, say)
                case = suites.run_pix2pix(contest, images, batch, step_timing)
                contest.profile(case)
                yield case
            if "blocks" in wanted:
                able = _block_peers(request, names)
                for block in _blocks(shape, sizes):
                    say = functools.partial(show, f"block {block.name}, batch {batch}, {dtype}")
                    contest = suites.Contest(able, device, dtype, say)
                    yield from suites.run_block(contest, block, batch, block_timing)
        for batch in request.batches or GENERATED if "generate" in wanted else ():
            say = functools.partial(show, f"generation, batch {batch}, {dtype}")
            peers = _without_whole(request.peers or eval_peers(device), "generate")
            yield suites.run_generate(suites.Contest(peers, device, dtype, say), shape, batch, block_timing)
    if "host" in wanted:
        yield from host.run_host(device, block_timing, show)


def trace(request: Request, path: Path) -> tuple[str, list[profiling.Share]]:
    """Profile our step without a CUDA graph, and write a Chrome trace to `path`: what was run on which machine, and
    each primitive's time and floor."""
    shape, batch, device = request.shape, request.batch, request.device
    dtype = DTYPES[request.dtype_names()[0]]
    size, copied = (8192, 2**31) if device.type == "cuda" else (1024, 2**26)
    rates = profiling.ceilings(device, dtype, size, copied, 0.2)
    torch.manual_seed(0)
    runner = StepRunner(PEERS["train"], shape.nets(), [inputs(shape, batch)], device, dtype, graph=False)
    with suites.device_settings(device):
        shares = profiling.trace(runner, device, path, rates)
    title = (
        f"One step, {shape.image_size}x{shape.image_size}, batch {batch}, against {rates.flops_per_s / 1e12:.3g} "
        f"TFLOP/s and {rates.bytes_per_s / 1e9:.0f} GB/s"
    )
    return title, shares


def _timing(timing: Timing, request: Request) -> Timing:
    return timing if request.rounds is None else Timing(request.rounds, timing.seconds_per_round)


def _without_whole(names: Sequence[str], suite: str) -> list[str]:
    """The peers that `suite` can run: there is no GANStep in it."""
    able = [name for name in names if not PEERS[name].whole]
    if not able:
        raise ValueError(f"the suite {suite} has no DCGAN's step: expected --peers of more than 'train'")
    return able


def _block_peers(request: Request, names: Sequence[str]) -> list[str]:
    names = _without_whole(names, "blocks")
    if request.quick and not request.peers:  # compiling is most of a quick run's time: the step has it
        names = [name for name in names if PEERS[name].compile_mode is None]
    return names


def _blocks(shape: NetShape, sizes: Sizes) -> list[Block]:
    generator, discriminator = shape.generator(), shape.discriminator()
    if sizes.all_blocks:
        return [*generator, *discriminator]
    return [generator[1], generator[-1], *discriminator[:2]]
