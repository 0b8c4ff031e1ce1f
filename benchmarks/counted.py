"""What our kernels ask of a GPU, by counting: the PTX that nvcc and Triton make of them runs on the CPU.

    python -m fastdcgan.benchmarks.counted [--backend cuda] [--gpu a100] [--sm 80] [--only weight_grad] [--lines]

From the root of a checkout, whose tests/ptx runs the PTX. Nothing here is a time that was measured. A row is a launch
of a 64x64 DCGAN's block or pass, in bfloat16 and channels_last. Of its grid a sample of blocks runs, spread evenly;
what they count is scaled to the grid.

blocks     run, of those in the grid
least MB   the tensors that the launch touches, each read or written once
L2         bytes that pass the second-level cache, in least MB: what multiprocessors load past a first level that keeps
           32 KB of a block's loads (cp.async.cg and bulk copies pass it by), and what they store
load, store  32-byte sectors of global memory, in the fewest that could hold the bytes of each warp's request
apart      percentage of those requests that take more sectors than the fewest
smem       wavefronts of shared memory, in those without bank conflicts: loads (with ldmatrix, wgmma), stores (with
           cp.async, bulk copies)
int ...    instructions for each useful value, which is one of the result, or for reductions one that is read: integer,
           float, special functions, memory and shuffles, tensor cores, control. They are PTX's: ptxas makes fewer of
           the integers. Moves are left out.
tc         operations of tensor cores, in those of the contraction (the last of a kernel's taps on padding count)
us         the least time by each ceiling of --gpu: memory (the tensors once where they fit the second-level cache
           together, else all that passes it), second-level cache, and of the multiprocessor with the most blocks
           shared memory, tensor cores, float, special functions, integers, and instructions of any kind
binds      the largest of them
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastdcgan.backends import cuda_tiles
from fastdcgan.backends.triton import TritonBackend
from fastdcgan.benchmarks.shapes import LEAKY_SLOPE, Block, NetShape
from fastdcgan.benchmarks.traffic import IMAGE_CHANNELS, contractions
from fastdcgan.spec import Call, Epilogue, Operand

SAMPLE = 200_000  # instructions of warps in a launch's blocks, after which no other block begins


@dataclass(frozen=True)
class GPU:
    """Published ceilings: NVIDIA's architecture whitepapers and data sheets of the A100 SXM 80 GB and the H100 SXM, and
    the throughput table of the CUDA C++ programming guide. Of the H100's second-level cache NVIDIA publishes no rate:
    what others measured goes up to this one."""

    sm: int  # whose kernels it runs
    processors: int
    clock: float  # the highest, in Hz
    memory: float  # bytes a second
    l2: float
    l2_bytes: int
    tensor: float  # FLOP a second, dense, of 16-bit numbers
    # Lanes a clock of a multiprocessor; it issues four instructions a clock, and moves 128 bytes of shared memory.
    floating: int
    integer: int = 64
    special: int = 16
    issue: int = 128

    def times(self, launch: Any) -> dict[str, float]:
        """Microseconds, by each of them."""
        scale = launch["blocks"] / launch["blocks_run"]
        turns = -(-launch["blocks"] // self.processors)  # blocks of the busiest multiprocessor
        through = 32 * launch["l2_sectors"] * scale
        least = launch["read"] + launch["written"]

        def of_processor(many: float, a_clock: float) -> float:
            return many / launch["blocks_run"] * turns / a_clock / self.clock

        seconds = {
            "mem": (least if least <= self.l2_bytes else max(least, through)) / self.memory,
            "L2": through / self.l2,
            "smem": of_processor(launch["shared_load_wavefronts"] + launch["shared_store_wavefronts"], 1),
            "tc": of_processor(launch["flops"], self.tensor / self.processors / self.clock),
            "fp": of_processor(32 * launch["floating"], self.floating),
            "sfu": of_processor(32 * launch["special"], self.special),
            "int": of_processor(32 * launch["integer"], self.integer),
            "issue": of_processor(32 * sum(launch[kind] for kind in KINDS), self.issue),
        }
        return {name: 1e6 * time for name, time in seconds.items()}


KINDS = ("integer", "floating", "special", "memory", "tensor", "control")
GPUS = {
    "a100": GPU(80, 108, 1.41e9, 2.039e12, 5120 * 1.41e9, 40 * 10**6, 312e12, 64),
    "h100": GPU(90, 132, 1.98e9, 3.35e12, 7.0e12, 50 * 10**6, 989.4e12, 128),
}
DEVICES = {  # CUDA C++ Programming Guide, Compute Capabilities
    80: cuda_tiles.Device(108, 163 * 1024, 164 * 1024),
    90: cuda_tiles.H100,
}


class Case(NamedTuple):
    what: str
    values: int  # useful ones
    flops: int  # of a contraction
    run: Callable[[Any], Any]  # on a backend


# --- what is run ------------------------------------------------------------------------------------------------------


def tensor(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def _of_step(before: Block | None, block: Block, call: Call) -> Call:
    """A block's contraction with the prologue and the epilogue that it has in a training step, by the rule of
    `backends/boundaries.py`: operands are finished tensors but for the image's layers."""
    forward = "conv_transpose" if block.transposed else "conv"
    images = call.a.x.shape[0]

    def coef(channels: int) -> Tensor:
        return torch.ones(4, 1, channels)

    narrow = min(block.in_channels, block.out_channels) <= IMAGE_CHANNELS
    deferred = narrow and block.transposed and before is not None
    if call.op == "weight_grad":
        x, dy = (call.b, call.a) if block.transposed else (call.a, call.b)
        if deferred:
            x = x._replace(coef=coef(block.in_channels), act="relu")
        if narrow and not block.transposed:
            dy = dy._replace(y=tensor(*dy.x.shape), coef=coef(block.out_channels)[:2], act=block.act, slope=LEAKY_SLOPE)
        return call._replace(a=dy, b=x) if block.transposed else call._replace(a=x, b=dy)
    if call.op == forward:
        if deferred:
            call = call._replace(a=call.a._replace(coef=coef(block.in_channels), act="relu"))
        if block.norm:
            return call._replace(epilogue=Epilogue("stats"))
        if block.act != "identity":
            vectors = coef(block.out_channels)[:2]
            return call._replace(epilogue=Epilogue("activate", None, vectors, block.act, LEAKY_SLOPE))
        return call
    if before is not None and before.norm:
        y = tensor(images, block.in_channels, block.in_size, block.in_size)
        return call._replace(epilogue=Epilogue("grad_stats", y, coef(block.in_channels), before.act, LEAKY_SLOPE))
    return call


def of_blocks(batch: int) -> Iterator[Case]:
    """The contractions of a training step, and of one block those with prologues."""
    tests = importlib.import_module("tests.helpers.contractions")

    def case(block: Block, call: Call) -> Case:
        values = {"conv": block.outputs(batch), "conv_transpose": block.inputs(batch), "weight_grad": block.weights}
        if block.transposed:
            values |= {"conv_transpose": block.outputs(batch), "conv": block.inputs(batch)}
        e = call.epilogue.kind
        operands = [call.a, call.b] if call.op == "weight_grad" else [call.a]
        prologues = ["" if a.coef is None else "bn_backward" if a.y is not None else "activate" for a in operands]
        name = " ".join(filter(None, [block.title, call.op, *prologues, "" if e == "none" else f"> {e}"]))
        return Case(name, values[call.op], block.flops(batch), lambda on: tests.run(on, call))

    net = NetShape()
    for blocks in (net.generator(), net.discriminator()):
        for before, block in zip((None, *blocks[:-1]), blocks, strict=True):
            for op, call in contractions(block, batch, "cpu").items():
                if before is not None or op == "weight_grad" or (op == "conv_transpose") == block.transposed:
                    yield case(block, _of_step(before, block, call))
    block = net.discriminator()[2]
    for call in contractions(block, batch, "cpu").values():
        weights = call.op == "weight_grad"
        x = call.a._replace(coef=torch.ones(4, 1, call.a.x.shape[1]), act="leaky_relu", slope=LEAKY_SLOPE)
        dy = call.b._replace(y=tensor(*call.b.x.shape), coef=torch.ones(4, 1, call.b.x.shape[1])) if weights else call.b
        if call.op == "conv_transpose":
            x = x._replace(y=tensor(*x.x.shape))
        yield case(block, call._replace(a=x, b=dy))


PASSES: dict[str, Callable[..., Any]] = {  # on, y, da, coef
    "activate": lambda on, y, da, coef: on.norm_act(Operand(y, None, coef, "relu")),
    "bn_backward": lambda on, y, da, coef: on.norm_act(Operand(da, y, coef, "leaky_relu", LEAKY_SLOPE)),
    "norm_act_reduce": lambda on, y, da, coef: on.norm_act_reduce(da, y, coef, "leaky_relu", LEAKY_SLOPE),
    "grad_stats": lambda on, y, da, coef: on.grad_stats(da, y, coef, "leaky_relu", LEAKY_SLOPE),
    "batch_stats": lambda on, y, da, coef: on.batch_stats(y, 1),
}


def of_passes(batch: int) -> Iterator[Case]:
    """The elementwise passes and reductions on the largest and the smallest tensor that has a norm."""
    for channels, size, layout in ((64, 32, "NHWC"), (512, 4, "NHWC"), (64, 32, "NCHW")):
        for name, run in PASSES.items():
            y, da = (tensor(batch, channels, size, size) for _ in range(2))
            if layout == "NCHW":
                y, da = y.contiguous(), da.contiguous()
            coef = torch.ones(4, 1, channels)
            what = f"{name} {channels}x{size}x{size} {layout}"
            yield Case(what, y.numel(), 0, functools.partial(run, y=y, da=da, coef=coef))


# --- running it -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def backend_on(name: str, machine: Any, gpu: GPU, sm: int) -> Iterator[Any]:
    """The backend of this name, whose launches the machine runs: sm's kernels, on as many multiprocessors."""
    if name == "triton":
        tiles = importlib.import_module("fastdcgan.kernels.tiles")
        device = replace(tiles.KNOWN[sm], processors=gpu.processors)
        with (
            importlib.import_module("tests.ptx.triton_kernels").triton_on(machine, sm),
            mock.patch.object(tiles, "device_of", return_value=device),
        ):
            yield TritonBackend()
    else:
        cuda_kernels = importlib.import_module("tests.ptx.cuda_kernels")
        cuda_kernels.library().ptx_processors(gpu.processors)
        device = replace(DEVICES[sm], processors=gpu.processors)
        on_machine = cuda_kernels.cuda_on(machine, capability=sm)
        with mock.patch.object(cuda_tiles, "device_of", return_value=device), on_machine as backend:
            yield backend


def launches(backend: str, case: Case, gpu: GPU, sm: int, sample: int = SAMPLE) -> list[Any]:
    """What is counted of each launch of a case (`Counts` of tests/ptx/interpreter.py)."""
    machine = importlib.import_module("tests.ptx.interpreter").Machine(counted=sample)
    with backend_on(backend, machine, gpu, sm) as on:
        case.run(on)
    return machine.counts


def kernel_name(mangled: str) -> str:
    """The last name in a C++ symbol, without its template's arguments; any other name as it is."""
    rest, name = mangled.removeprefix("_ZN").removeprefix("_Z"), mangled
    while rest is not mangled and (found := re.match(r"(\d+)", rest)):
        length = int(found[1])
        name, rest = rest[found.end() :][:length], rest[found.end() + length :]
    return name


# --- the table --------------------------------------------------------------------------------------------------------

LIMITS = ("mem", "L2", "smem", "tc", "fp", "sfu", "int", "issue")
HEADER = (
    f"{'':58} {'kernel':28} {'blocks':>11} {'least MB':>8} {'L2':>5} {'load':>5} {'store':>5} "
    f"{'apart':>5} {'smem':>11} "
    f"{'int':>7} {'fp':>6} {'sfu':>6} {'mem':>6} {'tc':>6} {'ctl':>6} {'tc':>5} | us: "
    + " ".join(f"{name:>6}" for name in LIMITS)
    + "  binds"
)


def row(case: Case, launch: Any, gpu: GPU) -> str:
    def ratio(many: int, least: int) -> str:
        return f"{many / least:.2f}" if least else "-"

    scale = launch["blocks"] / launch["blocks_run"]
    requests = launch["load_requests"] + launch["store_requests"]
    apart = (launch["load_uncoalesced"] + launch["store_uncoalesced"]) / max(requests, 1)
    least = launch["read"] + launch["written"]
    shared = "/".join(ratio(launch[f"shared_{w}_wavefronts"], launch[f"shared_{w}_phases"]) for w in ("load", "store"))
    each = [f"{32 * launch[kind] * scale / case.values:.2f}" for kind in KINDS]
    tensor_cores = ratio(round(launch["flops"] * scale), case.flops if launch["flops"] else 0)
    times = gpu.times(launch)
    return (
        f"{case.what:58} {kernel_name(launch.kernel):28} {launch['blocks_run']:>4} of {launch['blocks']:<4}"
        f"{least / 1e6:8.2f} {32 * launch['l2_sectors'] * scale / least:5.2f} "
        f"{ratio(launch['load_sectors'], launch['load_least_sectors']):>5} "
        f"{ratio(launch['store_sectors'], launch['store_least_sectors']):>5} {apart:5.0%} {shared:>11} "
        f"{each[0]:>7} {' '.join(f'{x:>6}' for x in each[1:])} {tensor_cores:>5} |     "
        + " ".join(f"{times[name]:6.2f}" for name in LIMITS)
        + f"  {max(times, key=lambda name: times[name])}"
        + (f"  LOCAL MEMORY {launch['local_bytes']}" if launch["local_bytes"] else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100")
    parser.add_argument("--sm", type=int, choices=tuple(DEVICES), help="whose kernels; by default the GPU's own")
    parser.add_argument("--only", default="", help="rows with this in them")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sample", type=int, default=SAMPLE, help="instructions of warps, for each launch")
    parser.add_argument("--lines", action="store_true", help="and the instructions of PTX that waste most")
    args = parser.parse_args()
    try:
        importlib.import_module("tests.ptx.interpreter")
    except ImportError as error:
        parser.exit(1, f"counted runs tests/ptx, so from the root of a checkout, with the extra [test] ({error})\n")
    print(HEADER)
    for case in (*of_passes(args.batch), *of_blocks(args.batch)):
        if args.only not in case.what:
            continue
        gpu = GPUS[args.gpu]
        for launch in launches(args.backend, case, gpu, args.sm or gpu.sm, args.sample):
            print(row(case, launch, gpu), flush=True)
            if args.lines:
                worst = sorted(launch.waste, key=lambda line: -max(line[2:]))
                for ptx, often, sectors, wavefronts in worst[:8]:
                    print(f"    {often:7} times {sectors:8} sectors {wavefronts:8} wavefronts more  {ptx[:100]}")


if __name__ == "__main__":
    main()
