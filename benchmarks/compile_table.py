"""What the Triton contractions compile to, without a GPU: `python -m fastdcgan.benchmarks.compile_table`.

Every launch of a DCGAN training step with the tile that the heuristic gives it is compiled for sm_80, sm_90 and sm_100,
and what the compiler made of it goes to `results/triton_compile.json` and `.md`: registers, spills, shared memory,
instructions. Kernels are compiled on the way that a launch takes (Triton's own specialisation of the arguments), with a
driver that names a target in the place of a GPU, and tensors without memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastdcgan.benchmarks.results import RESULTS
from fastdcgan.benchmarks.shapes import Block, NetShape
from fastdcgan.geometry import Geometry
from fastdcgan.kernels import conv, conv_transpose, launch, tiles, tuning, weight_grad
from fastdcgan.spec import STORE, Epilogue, Operand

ARCHITECTURES = (80, 90, 100)
BATCHES = (128, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TABLE = RESULTS / "triton_compile.json"
# Shared memory that one program may have, in bytes (CUDA C++ Programming Guide, Compute Capabilities).
SHARED_MEMORY = {arch: device.shared_memory for arch, device in tiles.KNOWN.items()}


@dataclass(frozen=True)
class Case:
    """One launch: a contraction of a block, for training or evaluation."""

    arch: int
    dtype: str
    op: str  # "conv" | "conv_transpose" | "weight_grad"
    block: Block
    batch: int
    prologue: str  # of weight_grad's two operands, joined by a space
    epilogue: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.block.name} b{self.batch} {self.dtype} {self.prologue} {self.epilogue} sm_{self.arch}"


@dataclass(frozen=True)
class Compiled:
    """What a kernel became.

    `spills` are loads and stores of local memory; they and `instructions` are the machine's (SASS), the other counts
    are of PTX.
    """

    key: str
    arch: int
    op: str
    dtype: str
    prologue: str
    epilogue: str
    geometry: str
    tile: str
    loads: str  # "descriptors" | "pointers"
    aligned: bool  # whether the rows of both operands are multiples of 16 bytes
    registers: int
    spills: int
    shared_memory: int
    instructions: int
    tensor_core: int  # wgmma, tcgen05.mma or mma.sync
    wgmma: int
    bulk_copies: int
    async_copies: int


# --- the launches of a step ------------------------------------------------------------------------------------------


def cases(
    architectures: Sequence[int] = ARCHITECTURES,
    dtypes: Sequence[str] = tuple(DTYPES),
    batches: Sequence[int] = BATCHES,
    pixels: Sequence[int] = (64, 32),
) -> Iterator[Case]:
    """Forward in training and evaluation, input gradient and weight gradient of every block but the image-side ones.

    Those have kernels of their own (`kernels/narrow.py`).
    """
    for arch in architectures:
        for dtype in dtypes:
            for batch in batches:
                for size in pixels:
                    net = NetShape(image_size=size)
                    for blocks in (net.generator(), net.discriminator()):
                        for first, block in zip([True, *[False] * len(blocks)], blocks, strict=False):
                            if net.channels not in (block.in_channels, block.out_channels):
                                yield from _of_block(arch, dtype, batch, block, first)


def _of_block(arch: int, dtype: str, batch: int, block: Block, first: bool) -> Iterator[Case]:
    forward, adjoint = ("conv_transpose", "conv") if block.transposed else ("conv", "conv_transpose")
    a, dy = "none" if first else "activate", "bn_backward" if block.norm else "none"
    for prologue in dict.fromkeys((a, "none")):
        yield Case(arch, dtype, forward, block, batch, prologue, "stats" if block.norm else "none")
    yield Case(arch, dtype, forward, block, batch, "none", "activate" if block.norm else "none")
    for prologue in dict.fromkeys((dy, "none")):
        yield Case(arch, dtype, adjoint, block, batch, prologue, "none" if first else "grad_stats")
        if not first:
            yield Case(arch, dtype, adjoint, block, batch, prologue, "none")
    for left, right in ((a, dy), ("none", "none")):
        gathered, linear = (right, left) if block.transposed else (left, right)
        yield Case(arch, dtype, "weight_grad", block, batch, f"{gathered} {linear}", "none")


def _start(case: Case) -> None:
    """Make the launch that `case` stands for."""
    block, dtype = case.block, DTYPES[case.dtype]
    geometry = Geometry((block.kernel,) * 2, (block.stride,) * 2, (block.padding,) * 2)
    small, large = (block.in_size, block.out_size) if block.transposed else (block.out_size, block.in_size)
    narrow, wide = (
        (block.in_channels, block.out_channels) if block.transposed else (block.out_channels, block.in_channels)
    )

    def tensor(channels: int, size: int) -> Tensor:
        x = torch.empty(case.batch, channels, size, size, dtype=dtype, device="meta")
        return x.contiguous(memory_format=torch.channels_last)

    def operand(prologue: str, channels: int, size: int) -> Operand:
        if prologue == "none":
            return Operand(tensor(channels, size))
        y = tensor(channels, size) if prologue == "bn_backward" else None
        return Operand(tensor(channels, size), y, torch.empty(4, 1, channels, device="meta"), "leaky_relu", 0.2)

    # A strided gather goes from the large grid to the small one, its adjoint back.
    if case.op == "weight_grad":
        left, right = case.prologue.split()
        weight_grad.weight_grad(operand(left, wide, large), operand(right, narrow, small), geometry)
        return
    weight = torch.empty(narrow, wide, block.kernel, block.kernel, dtype=dtype, device="meta")
    weight = weight.contiguous(memory_format=torch.channels_last)
    channels, size = (narrow, small) if case.op == "conv" else (wide, large)
    a = operand(case.prologue, *((wide, large) if case.op == "conv" else (narrow, small)))
    vectors = torch.empty(4, 1, channels, device="meta")
    epilogue = {
        "none": STORE,
        "stats": Epilogue("stats"),
        "activate": Epilogue("activate", None, vectors[:2], "relu", 0.0),
        "grad_stats": Epilogue("grad_stats", tensor(channels, size), vectors, "leaky_relu", 0.2),
    }[case.epilogue]
    if case.op == "conv":
        conv.conv(a, weight, geometry, epilogue)
    else:
        conv_transpose.conv_transpose(a, weight, geometry, (size, size), epilogue)


# --- compiling -------------------------------------------------------------------------------------------------------


class _Target:
    """A driver without a GPU: all that Triton's launch path asks for before the launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


Launch = tuple[Any, int, dict[str, Any], tiles.TileConfig]


def launches(case: Case) -> list[Launch]:
    """The launches (kernel, programs, arguments, config) of a case, caught before they start."""
    caught: list[Launch] = []

    def catch(kernel: Any, programs: int, arguments: dict[str, Any], config: tiles.TileConfig) -> None:
        caught.append((kernel, programs, arguments, config))

    def choose(problem: tiles.Problem, device: torch.device, attempt: Callable) -> tiles.TileConfig:
        return tiles.heuristic(problem, tiles.KNOWN[case.arch])

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (launch, "run", catch),
            (launch, "dot_precision", lambda dtype: "tf32"),  # of fp32, as PyTorch's convolutions have it by default
            (tuning, "choose", choose),
            (conv, "combined", lambda out, partials, epilogue: partials),
            (conv_transpose, "combined", lambda out, partials, epilogue: partials),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        _start(case)
    return caught


def key(case: Case) -> str:
    """What one kernel of the table stands for: cases of one key differ in the sizes of tensors alone."""
    _, _, arguments, config = launches(case)[0]
    return (
        f"{case.op} k{case.block.kernel}s{case.block.stride}p{case.block.padding} {case.dtype} {case.prologue} "
        f"{case.epilogue} {_tile(config)} {_loads(arguments)} sm_{case.arch}"
        + (" split" if config.splits > 1 else "")
        + ("" if case.op == "weight_grad" or arguments["SINK"].descriptors or config.splits > 1 else " pointer store")
    )


def _tile(config: tiles.TileConfig) -> str:
    return f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"


def _loads(arguments: dict[str, Any]) -> str:
    return "pointers" if arguments["SOURCE"].form == "pointer" else "descriptors"


def distinct(found: Sequence[Case]) -> list[Case]:
    """One case for each kernel that they compile to: the sizes of tensors are arguments."""
    by_key: dict[str, Case] = {}
    for case in found:
        by_key.setdefault(key(case), case)
    return list(by_key.values())


def compile_case(case: Case) -> Compiled:
    """Compile the contraction of `case`, and what adds its parts up; read what became of the contraction."""
    triton.runtime.driver.set_active(_Target(case.arch))
    _, _, arguments, config = launches(case)[0]
    binary, *others = (
        kernel.warmup(**given, grid=(programs,), num_warps=tile.num_warps, num_stages=tile.num_stages)
        for kernel, programs, given, tile in launches(case)
    )
    ptx: str = binary.asm["ptx"]
    usage = _cuobjdump("--dump-resource-usage", binary.asm["cubin"])
    code, *followers = (_cuobjdump("-sass", compiled.asm["cubin"]) for compiled in (binary, *others))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    return Compiled(
        key=key(case),
        arch=case.arch,
        op=case.op,
        dtype=case.dtype,
        prologue=case.prologue,
        epilogue=case.epilogue,
        geometry=f"k{case.block.kernel}s{case.block.stride}p{case.block.padding}",
        tile=_tile(config),
        loads=_loads(arguments),
        aligned=all(
            channels * DTYPES[case.dtype].itemsize % 16 == 0
            for channels in (case.block.in_channels, case.block.out_channels)
        ),
        registers=int(registers.group(1)),
        spills=sum(len(re.findall(r"\b(?:STL|LDL)\b", text)) for text in (code, *followers)),
        shared_memory=binary.metadata.shared,
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE)),
        tensor_core=wgmma + len(re.findall(r"tcgen05\.mma|mma\.sync", ptx)),
        wgmma=wgmma,
        bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
    )


def _cuobjdump(option: str, cubin: bytes) -> str:
    """The output of the cuobjdump that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_cases(found: Sequence[Case], workers: int = 2) -> list[Compiled]:
    """`compile_case` of each, in `workers` processes."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_case, found))


# --- the table -------------------------------------------------------------------------------------------------------


def faults(compiled: Compiled) -> list[str]:
    """What no kernel may be, in words; empty if it is fine."""
    found = []
    if compiled.spills:
        found.append(f"{compiled.spills} spills")
    if compiled.shared_memory > SHARED_MEMORY[compiled.arch]:
        found.append(f"{compiled.shared_memory} bytes of shared memory, {SHARED_MEMORY[compiled.arch]} is all there is")
    if not compiled.tensor_core:
        found.append("no tensor core instruction")
    if compiled.arch == 90 and compiled.dtype == "bf16" and compiled.loads == "descriptors":
        found += [f"no {what}" for what in ("wgmma", "bulk_copies") if not getattr(compiled, what)]
    if compiled.loads == "pointers" and compiled.aligned and not compiled.async_copies:
        found.append("no asynchronous copy")
    return found


def read(path: Path = TABLE) -> tuple[str, dict[str, Compiled]]:
    """(Triton's version, key -> row) of a table."""
    content = json.loads(path.read_text())
    return content["triton"], {row["key"]: Compiled(**row) for row in content["kernels"]}


def write(rows: Sequence[Compiled], path: Path = TABLE) -> None:
    """The table as JSON, and next to it as Markdown."""
    rows = sorted(rows, key=lambda row: (row.arch, row.dtype, row.op, row.key))
    kernels = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{kernels}\n]}}\n')
    columns = ("op", "geometry", "dtype", "prologue", "epilogue", "tile", "loads")
    counts = ("registers", "spills", "shared_memory", "instructions", "tensor_core", "bulk_copies", "async_copies")
    lines = [f"# What the Triton contractions compile to (triton {triton.__version__})", ""]
    lines += ["Written by `python -m fastdcgan.benchmarks.compile_table`, which says what the columns mean.", ""]
    for arch in sorted({row.arch for row in rows}):
        lines += [f"## sm_{arch}", "", "| " + " | ".join((*columns, *counts)).replace("_", " ") + " |"]
        lines.append("|" + "---|" * len(columns) + "---:|" * len(counts))
        lines += [
            "| " + " | ".join(str(getattr(row, name)) for name in (*columns, *counts)) + " |"
            for row in rows
            if row.arch == arch
        ]
        lines.append("")
    path.with_suffix(".md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE, help="the JSON file (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="architectures (default: all)")
    arguments = parser.parse_args()
    found = distinct(list(cases(arguments.arch)))
    print(f"{len(found)} kernels")
    rows = compile_cases(found, arguments.workers)
    write(rows, arguments.out)
    bad = {row.key: faults(row) for row in rows if faults(row)}
    for key, reasons in bad.items():
        print(f"{key}: {'; '.join(reasons)}")
    print(arguments.out)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
