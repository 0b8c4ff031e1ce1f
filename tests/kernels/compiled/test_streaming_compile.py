"""What the byte-bound Triton kernels compile to, without a GPU: no spills, 16-byte accesses, few enough registers.

The launches are those of the public functions on tensors without memory; each is caught before it starts, and compiled
for sm_90, in bfloat16 and NHWC also for sm_80 and sm_100.
"""

from __future__ import annotations

import ast
import math
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastdcgan.geometry import Geometry  # noqa: E402
from fastdcgan.kernels import narrow, norm_act  # noqa: E402
from fastdcgan.spec import STORE, Epilogue, Operand  # noqa: E402

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may have
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
K4, K5 = Geometry((4, 4), (2, 2), (1, 1)), Geometry((5, 5), (2, 2), (2, 2))


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def launches(call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` makes, none of them started."""
    caught = []

    def catch(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        caught.append(Launch(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | named, options))

    with mock.patch.object(JITFunction, "run", catch), torch.backends.cudnn.flags(allow_tf32=True):
        call()
    return caught


def source(launch: Launch) -> ASTSource:
    """The kernel specialised as a launch does: 1 is a constant, and multiples of 16 are known as such."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int
    stack: int  # bytes of local memory: spills
    shared: int
    threads: int

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.ptx))

    @property
    def bytes_loaded(self) -> int:
        """By one program, in 16-byte accesses, each counted once."""
        asynchronous = r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"
        return 16 * self.threads * (self.count(r"ld\.global\.v4\.b32") + self.count(asynchronous))

    @property
    def bytes_stored(self) -> int:
        return 16 * self.threads * self.count(r"st\.global\.v4\.b32")


def compiled(launch: Launch, arch: int, folder: Path) -> Compiled:
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source(launch), target=target, options=launch.options)
    cubin = folder / f"{launch.kernel.__name__}_{id(binary)}.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    threads = 32 * binary.metadata.num_warps
    return Compiled(binary.asm["ptx"], found["REG"], found["STACK"] + found["LOCAL"], binary.metadata.shared, threads)


# --- the launches -----------------------------------------------------------------------------------------------------


def images(channels: int, size: int, dtype: torch.dtype, layout: torch.memory_format = LAST) -> Tensor:
    return torch.empty(128, channels, size, size, dtype=dtype, device="meta").contiguous(memory_format=layout)


def vectors(rows: int, channels: int) -> Tensor:
    return torch.empty(rows, 1, channels, device="meta")


def passes(y: Tensor) -> dict[str, Callable[[], object]]:
    coef = vectors(4, y.shape[1])
    return {
        "activate": lambda: norm_act.norm_act(Operand(y, None, coef, "relu")),
        "bn_backward": lambda: norm_act.norm_act(Operand(y, y, coef, "leaky_relu", 0.2)),
        "reduce": lambda: norm_act.norm_act_reduce(y, y, coef, "leaky_relu", 0.2),
        "grad_stats": lambda: norm_act.grad_stats(y, y, coef, "relu", 0.0),
        "stats": lambda: norm_act.batch_stats(y, 1),
    }


def vector_passes() -> dict[str, Callable[[], object]]:
    mean, channel, stats = torch.empty(1, 64, device="meta"), torch.empty(64, device="meta"), vectors(3, 64)
    return {
        "coefficients": lambda: norm_act.coefficients(mean, mean, channel, channel, channel, 1e-5),
        "grad_coefficients": lambda: norm_act.grad_coefficients(vectors(2, 64), vectors(4, 64), 131072),
        "update_running": lambda: norm_act.update_running(channel, channel, stats, channel, None, 0.1),
    }


def narrow_layers(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """First layer of the discriminator, last of the generator, and their gradients."""
    x, features = images(3, 64, dtype), images(64, 32, dtype)
    weight = torch.empty(64, 3, 4, 4, dtype=dtype, device="meta").contiguous(memory_format=LAST)
    weight5 = torch.empty(64, 3, 5, 5, dtype=dtype, device="meta").contiguous(memory_format=LAST)
    coef, few = vectors(4, 64), vectors(2, 3)
    act, tanh = Epilogue("activate", None, coef[:2], "leaky_relu", 0.2), Epilogue("activate", None, few, "tanh")
    grad_stats = Epilogue("grad_stats", features, coef, "relu")
    plain, deferred = Operand(features), Operand(features, None, coef, "relu")
    gradient, image_gradient = Operand(features, features, coef, "leaky_relu", 0.2), Operand(x, x, few, "tanh")
    return {
        "conv": lambda: narrow.conv(Operand(x), weight, K4, act),
        "conv stats": lambda: narrow.conv(Operand(x), weight, K4, Epilogue("stats")),
        "conv grad_stats": lambda: narrow.conv(image_gradient, weight, K4, grad_stats),
        "conv k5": lambda: narrow.conv(Operand(x), weight5, K5, act),
        "weight_grad": lambda: narrow.weight_grad(Operand(x), plain, K4),
        "weight_grad of D": lambda: narrow.weight_grad(Operand(x), gradient, K4),
        "weight_grad of G": lambda: narrow.weight_grad(image_gradient, deferred, K4),
        "conv_transpose": lambda: narrow.conv_transpose(plain, weight, K4, (64, 64), STORE),
        "conv_transpose of G": lambda: narrow.conv_transpose(deferred, weight, K4, (64, 64), tanh),
        "conv_transpose of D": lambda: narrow.conv_transpose(gradient, weight, K4, (64, 64), STORE),
        "conv_transpose k5": lambda: narrow.conv_transpose(deferred, weight5, K5, (64, 64), tanh),
    }


def _calls() -> Iterator[tuple[str, Callable[[], object]]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for name, y in (
        ("64x32x32 bf16", images(64, 32, bf16)),
        ("512x4x4 fp32", images(512, 4, fp32)),
        ("3x64x64 bf16", images(3, 64, bf16)),
        ("NCHW 64x32x32 bf16", images(64, 32, bf16, CONTIGUOUS)),
        ("NCHW 512x4x4 fp32", images(512, 4, fp32, CONTIGUOUS)),
    ):
        yield from ((f"{kind} {name}", call) for kind, call in passes(y).items())
    yield from vector_passes().items()
    for name, dtype in (("bf16", bf16), ("fp32", fp32)):
        yield from ((f"{kind} {name}", call) for kind, call in narrow_layers(dtype).items())


CALLS = dict(_calls())
MAIN = [name for name in CALLS if "bf16" in name and "NCHW" not in name and "3x64x64" not in name]
CASES = [(name, arch) for name in CALLS for arch in ARCHITECTURES if arch == 90 or name in (*MAIN, *vector_passes())]


def cases(*prefixes: str) -> list[tuple[str, int]]:
    """(call, architecture), of calls whose name begins so."""
    return [case for case in CASES if case[0].startswith(prefixes)]


# What each kernel may use, so that two programs (of four warps: four) fit on a multiprocessor.
REGISTERS = {
    "norm_act_kernel": 96,
    "grad_sums_kernel": 128,
    "stats_kernel": 160,
    "conv_kernel": 128,
    "weight_grad_kernel": 168,
    "conv_transpose_kernel": 168,
}
FIVE_BY_FIVE = 255  # 128 gathered columns, or 256 products, for each pixel
Table = dict[tuple[str, int], list[tuple[Launch, Compiled]]]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("cubin")
    calls = {name: launches(call) for name, call in CALLS.items()}
    jobs = [(name, arch, launch) for name, arch in CASES for launch in calls[name]]
    results: Table = {}
    one_at_a_time, parse = threading.Lock(), ast.parse

    def locked(*args: Any, **kwargs: Any) -> ast.AST:
        with one_at_a_time:  # two threads in it at once are a SystemError in Python 3.11
            return parse(*args, **kwargs)

    # ptxas is a process of its own.
    with mock.patch.object(ast, "parse", locked), ThreadPoolExecutor(2) as pool:
        for (name, arch, launch), done in zip(
            jobs, pool.map(lambda j: compiled(j[2], j[1], folder), jobs), strict=True
        ):
            results.setdefault((name, arch), []).append((launch, done))
    return results


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_no_spills_and_few_registers(name: str, arch: int, table: Table) -> None:
    assert table[name, arch]
    for launch, kernel in table[name, arch]:
        assert kernel.stack == 0
        assert kernel.shared <= SHARED_MEMORY[arch]
        limit = FIVE_BY_FIVE if "k5" in name else REGISTERS.get(launch.kernel.__name__, 192)
        assert kernel.registers <= limit


@pytest.mark.parametrize(("name", "arch"), cases("activate", "bn_backward", "reduce", "grad_stats", "stats"))
def test_passes_touch_wide_tensors_in_16_byte_accesses(name: str, arch: int, table: Table) -> None:
    """Whole tiles are read and written so, each once."""
    launch, kernel = table[name, arch][0]
    arguments = launch.arguments
    tile = arguments["BLOCK_R"] * arguments["BLOCK_C"] * arguments.get("y", arguments.get("x")).element_size()
    read = 1 if name.startswith(("activate", "stats")) else 2
    written = 1 if name.startswith(("activate", "bn_backward", "grad_stats")) else 0
    assert kernel.bytes_loaded >= read * tile  # and some vectors per channel
    assert kernel.bytes_stored == written * tile
    assert not kernel.count(r"st\.global\.b16")
    elements = math.prod(launch.grid) * arguments.get("steps", 1) * arguments["BLOCK_R"] * arguments["BLOCK_C"]
    assert elements <= 1.35 * arguments.get("y", arguments.get("x")).numel()  # little of a tile or a last step is idle


@pytest.mark.parametrize(("name", "arch"), cases("conv", "weight_grad"))
def test_narrow_layers_touch_the_wide_tensor_in_16_byte_accesses(name: str, arch: int, table: Table) -> None:
    launch, kernel = table[name, arch][0]
    arguments = launch.arguments
    if launch.kernel is narrow.conv_kernel:
        sink, size = arguments["SINK"], arguments["out"].element_size()
        assert kernel.bytes_stored >= sink.rows * sink.block_c * size
        assert not kernel.count(r"st\.global\.b16")
        if sink.epilogue == "grad_stats":
            assert kernel.bytes_loaded >= sink.rows * sink.block_c * size
    else:
        wide = arguments["dy"] if launch.kernel is narrow.weight_grad_kernel else arguments["x"]
        load = arguments["LINEAR"] if launch.kernel is narrow.weight_grad_kernel else arguments["SOURCE"]
        assert kernel.bytes_loaded >= load.rows * load.block_c * wide.element_size()


@pytest.mark.parametrize(("name", "arch"), cases("conv", "weight_grad"))
def test_narrow_layers_run_on_the_tensor_cores(name: str, arch: int, table: Table) -> None:
    instruction = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma|mma\.sync"}[arch]
    assert table[name, arch][0][1].count(instruction)


def test_vectors_per_channel_are_not_contracted(table: Table) -> None:
    """A fused multiply-add has other bits than PyTorch's formulas."""
    for name in ("coefficients", "grad_coefficients", "update_running"):
        for arch in ARCHITECTURES:
            assert not table[name, arch][0][1].count(r"fma\.rn\.f32")
