"""The census: whole networks as people write them, plain against `fuse()`d.

    python -m fastdcgan.benchmarks.census                              all of tests/models on a CPU: hours
    python -m fastdcgan.benchmarks.census --models unet --mode eager --batch 4 --json FILE
    python -m fastdcgan.benchmarks.census ... --against FILE           with the ratios of an earlier run beside
    python -m fastdcgan.benchmarks.census --blocks                     times nothing: what is fused, in seconds

Each row is a network at its usual size in a dtype, memory format and batch, eager or compiled. Both sides run forward
and backward from a given gradient of the output in turns; what is shown is plain over fused, above 1 where `fuse()`
pays. A row whose outputs or gradients aren't right has no time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fastdcgan.benchmarks import harness, plots, suites
from fastdcgan.benchmarks.harness import Summary, Timing
from fastdcgan.benchmarks.peers import Peer
from fastdcgan.benchmarks.results import Case, Results, environment
from fastdcgan.benchmarks.runners import BlockRunner
from fastdcgan.benchmarks.tables import format_ms, format_ratio, reason
from fastdcgan.dispatch import autotune
from fastdcgan.engine import forwards
from fastdcgan.engine.match import WHY_BARE
from fastdcgan.explain import explain, origins
from fastdcgan.fuse import fuse

if TYPE_CHECKING:
    from tests.models import Model

FORMATS, MODES, DTYPES = ("contiguous", "channels_last"), ("eager", "compile"), ("fp32", "bf16")
PLAIN, FUSED = "plain", "fused"
SLOWER, FASTER = 0.97, 1.03  # what may be noise lies between
CPU = torch.device("cpu")


# --- what there is in a net ------------------------------------------------------------------------------------------

_NORMS = {"batch_norm", "instance_norm", "group_norm", "layer_norm"}
_KINKED = {"relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "hardtanh", "hardtanh_", "relu6", "hardswish"}
_ACTS = _KINKED | {"tanh", "sigmoid", "silu", "gelu", "elu", "glu", "softplus", "mish", "log_sigmoid"}


class Watch(TorchFunctionMode):
    """While it is entered, collects `blocks`: the weights of convolutions whose output goes straight into a norm or an
    activation, and those of other norms of images whose output goes into an activation, whether by modules or by
    functions. `kinks` are how many values go into each function with a kink."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []
        self.kinks: list[int] = []
        self._begun: Tensor | None = None
        self._weight: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if name in ("conv2d", "conv_transpose2d"):
            self._begun, self._weight = out, kwargs["weight"] if len(args) < 2 else args[1]
        elif name in _NORMS | _ACTS and args[0] is self._begun:
            assert self._weight is not None
            self.blocks.append(self._weight)
            self._begun = None
        elif name in _NORMS and out.dim() == 4 and kwargs.get("weight") is not None:
            self._begun, self._weight = out, kwargs["weight"]
        elif out is self._begun:  # written to in place
            self._begun = None
        if name in _KINKED or name == "max_pool2d":
            self.kinks.append(args[0].numel())
        return out


WHY_APART = "its output is still held, or its norm or activation is called by another module"


class Blocks(NamedTuple):
    """How many blocks of a norm or an activation there are in a net, and of those that `fuse()` doesn't find the
    convolution's name and why."""

    there: int
    left: list[tuple[str, str]]

    @property
    def fused(self) -> int:
        return self.there - len(self.left)


def blocks_of(module: nn.Module, x: Tensor) -> Blocks:
    """In a copy of the module, whatever is faster."""
    plain = copy.deepcopy(module)
    with Watch() as watch:
        plain(x)
    with autotune.by_rule():
        rows = {row.name: row for row in explain(fuse(copy.deepcopy(module)), x)}
    modules = {id(p): name for name, m in plain.named_modules() for p in m.parameters(recurse=False)}
    left = []
    for weight in watch.blocks:
        stored = next(id(t) for t in (weight, *origins(weight)) if id(t) in modules)
        name = modules[stored].split(".parametrizations.")[0]
        row = rows.get(name)
        if row is None or not (row.fused and " + " in row.pattern):
            apart = row is None or row.fused or row.why == WHY_BARE
            left.append((name, WHY_APART if row is None or apart else row.why))
    return Blocks(len(watch.blocks), left)


def total(blocks: Mapping[str, Sequence[int]]) -> str:
    """The sum over nets, each (how many there are, how many of them are fused)."""
    there, fused = (sum(each[i] for each in blocks.values()) for i in range(2))
    return f"blocks: {fused} of {there} fused, {100 * fused / max(there, 1):.1f} %"


# --- one row ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a row is run: keys of `peers.DTYPES`, `FORMATS` and `MODES`, and a batch."""

    batch: int
    dtype: str
    form: str
    mode: str

    @property
    def part(self) -> str:
        return f"{self.form}, {self.mode}"

    def peers(self) -> list[Peer]:
        """The two sides."""
        nhwc, compile_mode = self.form == "channels_last", "default" if self.mode == "compile" else None
        return [
            Peer(PLAIN, "PyTorch", channels_last=nhwc, compile_mode=compile_mode),
            Peer(FUSED, "fastdcgan", channels_last=nhwc, compile_mode=compile_mode, fused=True),
        ]


class NetRunner(BlockRunner):
    """A peer that runs a whole net in training mode: one call is one forward and one backward.

    Its input is float32 under autocast too, as a data loader gives it."""

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
        super().__init__(peer, module, x, grad, device, dtype, input_grad)
        if dtype == torch.bfloat16:
            self.x = self.x.detach().float().requires_grad_(input_grad)
            self.inputs = [*self.module.parameters(), *([self.x] if input_grad else [])]
        self.initial = [buffer.clone() for buffer in self.module.buffers()]

    def __call__(self) -> None:
        self.forward()
        self.backward()

    def settle(self) -> None:
        """Call it as a script would, until it is known which way of it is the fastest."""
        for module in self.module.modules():
            module.__dict__.pop("_trials", None)
        self()
        while forwards.undecided(self.module):
            self()

    def observe(self) -> list[Tensor]:
        """The output, all parameters' gradients as one vector, and the input's gradient; float64 on the CPU.

        From the initial buffers, since spectral norm iterates on its own; and with only the norms in training mode, so
        that nothing is left to chance. One vector, since of a bias in front of a norm there is only rounding."""
        with torch.no_grad():
            for buffer, initial in zip(self.module.buffers(), self.initial, strict=True):
                buffer.copy_(initial)
        modes = [(module, module.training) for module in self.module.modules()]
        for module, _ in modes:
            module.training = isinstance(module, _NormBase)
        try:
            out, *grads = super().observe()
        finally:
            for module, training in modes:
                module.training = training
        count = len(list(self.module.parameters()))
        return [out, torch.cat([grad.flatten() for grad in grads[:count]]), *grads[count:]]


def measure(name: str, model: Model, setting: Setting, timing: Timing, timer: harness.Timer) -> Case:
    """Check and time one row."""
    torch.compiler.reset()
    torch.manual_seed(0)
    module, x = model.make(model.width), torch.randn(setting.batch, *model.shape)
    with torch.no_grad(), Watch() as watch:
        grad = torch.randn_like(module(x))

    def make(peer: Peer, dtype: torch.dtype) -> NetRunner:
        return NetRunner(peer, module, x, grad, CPU, dtype, model.input_grad)

    contest = suites.Contest(setting.peers(), CPU, setting.dtype)
    with autotune.at_once():
        contest.build(make, min(watch.kinks, default=0))
    runners = {key: runner for key, runner in contest.runners.items() if isinstance(runner, NetRunner)}
    for runner in runners.values():
        runner.settle()
    contest.time({key: (runner,) for key, runner in runners.items()}, timing, timer)
    return contest.case("census", name, setting.part, setting.batch, reference=FUSED)


# --- what is shown ---------------------------------------------------------------------------------------------------

Key = tuple[str, int, str, str]


def key_of(case: Case) -> Key:
    return case.name, case.batch, case.dtype, case.part


def gain(case: Case) -> Summary | None:
    """Plain over fused; None where one of them has no time."""
    return next((r.ratio for r in case.rows if r.peer == PLAIN and r.ratio and case.reference == FUSED), None)


def line(case: Case, blocks: Sequence[int], before: Mapping[Key, Summary] | None = None) -> str:
    """One row in a line; with `before`, the ratio that it had there comes first."""
    what = f"{case.name:36} {case.batch:3} {case.dtype} {case.part:22} {blocks[1]:3} of {blocks[0]:3} fused"
    found = gain(case)
    if found is None:
        bad = next((row for row in case.rows if row.status != "ok"), case.rows[0])
        return f"{what}  {bad.peer} {reason(bad)}"
    times = " ".join(f"{format_ms(row.ms):>7} ms" for row in case.rows)
    earlier = "" if before is None else f"{format_ratio(before.get(key_of(case))):>22} ->"
    return f"{what}  {times} {earlier} {format_ratio(found)}"


def summary(cases: Sequence[Case]) -> Iterator[str]:
    """A line for each dtype, part and batch: the median and quartiles over the networks, how many are slower and how
    many faster, and which gain least."""
    groups: dict[tuple[str, str, int], dict[str, float]] = {}
    for case in cases:
        if found := gain(case):
            groups.setdefault((case.dtype, case.part, case.batch), {})[case.name] = found.median
    for (dtype, part, batch), gains in sorted(groups.items()):
        over = harness.summarise(list(gains.values()))
        slower, faster = (sum(g < SLOWER for g in gains.values()), sum(g > FASTER for g in gains.values()))
        worst = ", ".join(f"{name} {gains[name]:.2f}" for name in sorted(gains, key=gains.__getitem__)[:3])
        yield (
            f"{dtype}, {part}, batch {batch}: median {over.median:.2f} ({over.q1:.2f}-{over.q3:.2f}) of {len(gains)}, "
            f"{slower} under {SLOWER}, {faster} over {FASTER}; worst: {worst}"
        )


# --- the command -----------------------------------------------------------------------------------------------------


def _models() -> dict[str, Model]:
    """The networks, which belong to the tests and so aren't installed."""
    try:
        from tests.models import MODELS
    except ImportError as error:
        raise ValueError(f"tests.models can't be imported ({error}): run it from the root of a checkout") from error
    return MODELS


def _chosen(models: Mapping[str, Model], parts: Sequence[str] | None) -> dict[str, Model]:
    for part in parts or ():
        if not any(part in name for name in models):
            raise ValueError(f"--models has {part!r}, which is part of no name: expected parts of {', '.join(models)}")
    return {name: model for name, model in models.items() if parts is None or any(part in name for part in parts)}


def print_blocks(models: Mapping[str, Model]) -> None:
    """Of each network at its small size: how many blocks are fused, and why the others aren't."""
    counts = {}
    for name, model in models.items():
        torch.manual_seed(0)
        width, shape = model.small
        blocks = blocks_of(model.make(width), torch.randn(2, *shape))
        counts[name] = (blocks.there, blocks.fused)
        print(f"{name:36} {blocks.fused:3} of {blocks.there:3} fused")
        for module, why in blocks.left:
            print(f"    {module}: {why}")
    print(total(counts))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastdcgan.benchmarks.census", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", help="those whose names have one of these in them")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="bf16 is autocast")
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 4, 16), help="(default: 1 4 16)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=FORMATS, help="of model and input")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seconds", type=float, default=4.0, help="per row, at least 5 rounds (default: 4)")
    parser.add_argument("--cpu-time", action="store_true", help="time what the processor spends: for a busy machine")
    parser.add_argument("--blocks", action="store_true", help="time nothing: print the blocks fused of small networks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as they come, and a plot beside it")
    parser.add_argument("--against", type=Path, metavar="FILE", help="show that run's ratios beside")
    args = parser.parse_args(arguments)
    for name, value in (("batch", min(args.batch)), ("seconds", args.seconds)):
        if value <= 0:
            raise ValueError(f"--{name} has to be more than 0, not {value}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it. 0; 1 if a row was wrong or ours failed; 2 for arguments that make no sense."""
    try:
        args = _arguments(arguments)
        models = _chosen(_models(), args.models)
        earlier = Results.read(args.against).cases if args.against else []
    except (ValueError, OSError) as error:
        print(f"census: error: {error}", file=sys.stderr)
        return 2
    if args.blocks:
        print_blocks(models)
        return 0
    before = {key_of(case): found for case in earlier if (found := gain(case))} if args.against else None
    timing = Timing(25, args.seconds / 50, args.seconds, least_rounds=5)
    timer = harness.CPUTimer(time.process_time if args.cpu_time else time.perf_counter)
    # Before anything is measured: then chains run fused whatever is faster.
    blocks = {name: blocks_of(model.make(model.width), torch.randn(2, *model.shape)) for name, model in models.items()}
    counts = {name: [found.there, found.fused] for name, found in blocks.items()}
    results = Results("census", environment(CPU), [], extra={"blocks": counts, "cpu_time": args.cpu_time})
    settings = [Setting(*each) for each in itertools.product(args.batch, args.dtype, args.format, args.mode)]
    for (name, model), setting in itertools.product(models.items(), settings):
        case = measure(name, model, setting, timing, timer)
        results.cases.append(case)
        print(line(case, counts[name], before), flush=True)
        if args.json:
            results.write(args.json)
    for each in ("", *summary(results.cases), total(counts)):
        print(each)
    gains = [(case.name, case.dtype, found.median) for case in results.cases if (found := gain(case))]
    if args.json and gains:
        plots.plot_census(results, gains, SLOWER, args.json.with_suffix(".png"))
    return int(bool(results.bad))


if __name__ == "__main__":
    sys.exit(main())
