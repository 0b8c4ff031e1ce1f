"""The suites: build the peers, check them against float64, time those that are right."""

from __future__ import annotations

import contextlib
import copy
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastdcgan.benchmarks import floors, harness, peers, profiling
from fastdcgan.benchmarks.peers import DTYPES, PEERS, Peer
from fastdcgan.benchmarks.pix2pix import Pix2PixShape
from fastdcgan.benchmarks.results import Case, Row
from fastdcgan.benchmarks.runners import DCGAN, PIX2PIX, Algorithm, BlockRunner, EvalRunner, StepRunner
from fastdcgan.benchmarks.shapes import Block, NetShape, inputs

Runner = StepRunner | BlockRunner | EvalRunner
Say = Callable[[str], None]
DATA_SETS = 2


def reference_of(names: Sequence[str]) -> str:
    """The peer that ratios are relative to: ours, the whole of it where that is there, else the first."""
    return next((name for name in ("train", "fused-graph", "fused") if name in names), names[0])


@contextlib.contextmanager
def device_settings(device: torch.device, search: bool = True) -> Iterator[None]:
    """cuDNN's search for the fastest algorithm, for all peers alike; put back at the end."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = search
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def left_out() -> Iterator[list[str]]:
    """Inside a `with`, what we warn of when a kernel can't run here: with all of ours left out, a row would look as if
    nothing were wrong."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "fastdcgan", RuntimeWarning)
        yield found
    for each in caught:
        if issubclass(each.category, RuntimeWarning) and str(each.message).startswith("fastdcgan"):
            found.append(str(each.message))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _explain(error: Exception) -> str:
    """The error's own words, with the cause's where it has one."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain += [line.strip() for line in traceback.format_exception_only(cause)]
        cause = cause.__cause__
    return "\n".join(dict.fromkeys(chain))


class Contest:
    """The peers of one case, from building them to timing them.

    Args:
        peers: who takes part, by name of `PEERS` or as they are.
        device, dtype: where, and a key of `DTYPES`.
        say: is told what is being done.
    """

    def __init__(
        self, peers: Sequence[Peer | str], device: torch.device, dtype: str, say: Say = lambda text: None
    ) -> None:
        self.device, self.dtype, self.say = device, dtype, say
        found = [PEERS[peer] if isinstance(peer, str) else peer for peer in peers]
        self.peers = {peer.name: peer for peer in found}
        self.rows = {peer.name: Row(peer.name, peer.label, dtype) for peer in found}
        self.runners: dict[str, Runner] = {}
        self.samples: dict[str, list[list[float]]] = {}

    def build(self, make: Callable[[Peer, torch.dtype], Runner], kinked: int) -> None:
        """Build and check every peer (`kinked` as in `peers.tolerance`).

        One that can't run, fails or is wrong keeps its row, which then says so."""
        with device_settings(self.device, search=False):  # which in float64 would take longer than what it saves
            exact = make(peers.TRUTH, torch.float64)
            truth = exact.observe()
            progress = exact.progress() if isinstance(exact, StepRunner) else None
            del exact
        yardstick = make(peers.YARDSTICK, DTYPES[self.dtype]).observe()
        tolerance = peers.tolerance(peers.distance(yardstick, truth), DTYPES[self.dtype], kinked)
        for name, row in self.rows.items():
            self.say(f"preparing {name}")
            row.tolerance = tolerance
            try:
                self._build(make, name, truth, progress)
            except peers.NotHere as error:
                row.status, row.detail = "unavailable", str(error)
            # Any error of a peer is a fact to report, and the others go on.
            except Exception as error:
                row.status, row.detail = "failed", _explain(error)

    def _build(
        self,
        make: Callable[[Peer, torch.dtype], Runner],
        name: str,
        truth: Sequence[Tensor],
        progress: Tensor | None,
    ) -> None:
        row = self.rows[name]
        cuda = self.device.type == "cuda"
        allocated = torch.cuda.memory_allocated(self.device) if cuda else 0
        began = time.perf_counter()
        with left_out() as found:
            runner = make(self.peers[name], DTYPES[self.dtype])
            runner.prepare()
            row.prepare_s = time.perf_counter() - began
            row.error = peers.distance(runner.observe(), truth)
        if found:  # it is timed all the same
            row.status, row.detail = "failed", "; ".join(found)
        assert row.tolerance is not None
        if not row.error <= row.tolerance:
            row.status = "wrong"
            row.detail = f"{row.error:.2e} from float64, expected at most {row.tolerance:.2e}"
            return
        if progress is not None and isinstance(runner, StepRunner):
            change = runner.progress()
            if not peers.distance([change], [progress]) <= peers.PROGRESS_TOLERANCE:
                row.status = "wrong"
                row.detail = f"an update changes the losses by {change.tolist()}, expected about {progress.tolist()}"
                return
        row.saved_bytes = runner.saved_bytes()
        if cuda and isinstance(runner, StepRunner):
            row.peak_bytes = self._peak(runner) - allocated
        self.runners[name] = runner

    def _peak(self, runner: StepRunner) -> int:
        if runner.graph is not None:
            return runner.capture_peak_bytes  # a replay allocates nothing
        torch.cuda.reset_peak_memory_stats(self.device)
        runner()
        return torch.cuda.max_memory_allocated(self.device)

    def time(
        self, segments: Mapping[str, harness.Segments], timing: harness.Timing, timer: harness.Timer | None = None
    ) -> None:
        """Time the segments of the peers that are right; `case` makes a case of each segment.

        `timer` None is one that times what the device does, with whatever its caches hold."""
        if segments:
            self.say("timing")
            self.samples = harness.interleave(segments, timer or harness.timer_for(self.device, cold=False), timing)

    def profile(self, case: Case) -> None:
        """Enter into the rows of a timed step what it does on a GPU."""
        for row in case.rows if self.device.type == "cuda" else ():
            runner = self.runners.get(row.peer)
            if isinstance(runner, StepRunner):
                row.kernels = profiling.kernels(runner, self.device)
                row.host_ms = profiling.host_ms(runner, self.device)

    def case(
        self, suite: str, name: str, part: str, batch: int, segment: int = 0, reference: str | None = None
    ) -> Case:
        """The case of one segment, with ratios to the peer `reference`, or to `reference_of` those that were timed."""
        timed_peers = list(self.samples) or list(self.rows)
        reference = reference if reference in timed_peers else reference_of(timed_peers)
        rows = []
        for peer, row in self.rows.items():
            rows.append(replace(row))  # a case for each segment, and a row of its own in each
            if peer in self.samples:
                rows[-1].enter(self.samples[peer][segment], self.samples[reference][segment])
        return Case(suite, name, part, batch, self.dtype, reference, rows)


def kinked(block: Block, batch: int) -> int:
    """How many values of a block's output go through a ReLU's kink, as `peers.tolerance` takes them."""
    return block.outputs(batch) if block.act in ("relu", "leaky_relu") else 0


def least_kinked(blocks: Sequence[Block], batch: int) -> int:
    """The fewest of any block that has kinks at all."""
    return min(count for count in (kinked(block, batch) for block in blocks) if count)


def run_step(contest: Contest, shape: NetShape, batch: int, timing: harness.Timing) -> Case:
    """The training step of a DCGAN."""
    data = [inputs(shape, batch, seed) for seed in range(DATA_SETS)]
    train(contest, shape.nets, data, DCGAN, least_kinked(shape.generator() + shape.discriminator(), batch), timing)
    return contest.case("step", f"{shape.image_size}x{shape.image_size}", "step", batch)


def run_pix2pix(contest: Contest, shape: Pix2PixShape, batch: int, timing: harness.Timing) -> Case:
    """The training step of a U-Net and a PatchGAN that know nothing of fused layers."""
    data = [shape.inputs(batch, seed) for seed in range(DATA_SETS)]
    train(contest, shape.nets, data, PIX2PIX, shape.kinked(batch), timing)
    return contest.case("step", f"pix2pix {shape.image_size}x{shape.image_size}", "step", batch)


def train(
    contest: Contest,
    make_nets: Callable[[], tuple[nn.Module, nn.Module]],
    data: Sequence[tuple[Tensor, Tensor]],
    algorithm: Algorithm,
    kinked: int,
    timing: harness.Timing,
    timer: harness.Timer | None = None,
) -> None:
    """Check and time a whole training step of every peer; `kinked` as in `peers.tolerance`, `timer` as in `time`."""
    torch.compiler.reset()
    torch.manual_seed(0)
    nets = make_nets()
    with device_settings(contest.device):
        contest.build(lambda peer, compute: StepRunner(peer, nets, data, contest.device, compute, algorithm), kinked)
        segments = {name: (runner,) for name, runner in contest.runners.items() if isinstance(runner, StepRunner)}
        for (runner,) in segments.values():
            runner.learn(False)  # faster peers take more steps: all stay on the same weights, so on the same values
        contest.time(segments, timing, timer)


def run_generate(contest: Contest, shape: NetShape, batch: int, timing: harness.Timing) -> Case:
    """The generator in eval mode."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net = shape.nets()[0]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # neither 0 nor 1, as after some training
            module.running_mean = torch.randn(module.num_features) / 10
            module.running_var = torch.rand(module.num_features) + 0.5
    noise = torch.randn(batch, shape.nz, 1, 1)
    with device_settings(contest.device):
        contest.build(lambda peer, compute: EvalRunner(peer, net, noise, contest.device, compute), 0)
        contest.time({name: (runner,) for name, runner in contest.runners.items() if callable(runner)}, timing)
    return contest.case("generate", f"{shape.image_size}x{shape.image_size}", "eval", batch)


def run_block(contest: Contest, block: Block, batch: int, timing: harness.Timing) -> tuple[Case, Case]:
    """Forward and backward of one block, as two cases. The noise's gradient is not computed, as in training."""
    torch.compiler.reset()
    torch.manual_seed(0)
    module, device = block.module(), contest.device
    x, grad = block.data(batch)
    if kinked(block, batch):
        grad = _off_the_kink(module, x, grad, DTYPES[contest.dtype])
    with device_settings(device):
        contest.build(
            lambda peer, compute: BlockRunner(peer, module, x, grad, device, compute, input_grad=block.in_size > 1), 0
        )
        segments = {
            name: (runner.forward, runner.backward)
            for name, runner in contest.runners.items()
            if isinstance(runner, BlockRunner)
        }
        contest.time(segments, timing, harness.timer_for(device, cold=True))
    return contest.case("blocks", block.title, "forward", batch), contest.case(
        "blocks", block.title, "backward", batch, 1
    )


def _off_the_kink(module: nn.Sequential, x: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad`, the gradient of the output of a block that ends in a ReLU, with zeros where the ReLU's input is so near
    to its kink that rounding in `dtype` may take it across: such a value says nothing of a peer."""
    with torch.no_grad():
        z = copy.deepcopy(module[:-1]).double()(x.double())
    return grad * (z.abs() > torch.finfo(dtype).eps ** 0.5 * z.std())


def step_floors(shape: NetShape, batch: int, flops_per_s: float, bytes_per_s: float) -> dict[str, float]:
    """level -> milliseconds of the floor of a step at the given ceilings."""
    return {level: 1e3 * floors.step_seconds(shape, batch, level, flops_per_s, bytes_per_s) for level in floors.LEVELS}
