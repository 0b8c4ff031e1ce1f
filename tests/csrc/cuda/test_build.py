"""The CUDA extension, built and linked where there is an nvcc: architectures, spills, and the operators' schemas.

It needs no GPU and no CUDA build of torch. What was built stays in `build/`, so only changes are compiled again.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # whose cuobjdump looks into the library

from fastdcgan.backends.cuda_tiles import OF_SIZE, OF_WARPGROUPS
from fastdcgan.benchmarks import cuda_compile_table
from fastdcgan.benchmarks.cuda_compile_table import OPS, faults
from fastdcgan.benchmarks.regressions import worse

ROOT = cuda_compile_table.ROOT

pytestmark = pytest.mark.skipif(
    cuda_compile_table.nvcc() is None, reason="nvcc builds the CUDA extension, and it is not here"
)


@pytest.fixture(scope="module")
def library() -> Path:
    return cuda_compile_table.build()


@pytest.fixture(scope="module")
def code(library: Path) -> dict[str, list[str]]:
    """Name -> instructions of each kernel for sm_90a."""
    return dict(cuda_compile_table.machine_code(library, 90))


def dump(library: Path, *options: str) -> str:
    return "".join(cuda_compile_table.dump(library, *options))


def test_architectures(library: Path) -> None:
    text = dump(library, "--list-elf", "--list-ptx")
    machine_code = set(re.findall(r"ELF file.*\.(sm_\w+)\.cubin", text))
    assert machine_code == {"sm_80", "sm_90a", "sm_100"}
    assert set(re.findall(r"PTX file.*\.(sm_\w+)\.ptx", text)) == {"sm_100"}


IMAGE_SIDE = ("image_side_conv", "image_side_transpose", "image_side_weight_grad")  # kernels of image-side layers


def test_nothing_is_spilled(library: Path) -> None:
    """No kernel has a stack: neither spilled registers nor arrays that the compiler couldn't keep in registers."""
    usage = dump(library, "--dump-resource-usage")
    found = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", usage)
    names = {name for name, *_ in found}
    streaming = ("norm_act", "norm_act_backward", "grad_sums", "batch_stats", "combine", "coefficients")
    narrow = (*IMAGE_SIDE, *(f"{name}_tensor" for name in IMAGE_SIDE), "combine_weight_grad")
    for kernel in (
        *streaming,
        *narrow,
        "contraction",
        "sm90_contraction",
        "reduce_splits",
        "adam",
        "bce",
        "images",
    ):
        assert any(f"{len(kernel)}{kernel}" in name for name in names), kernel
    assert [entry for entry in found if entry[1:] != ("0", "0")] == []


def test_contractions_compile_well_and_no_worse_than_the_table(library: Path, code: dict[str, list[str]]) -> None:
    """Tensor cores, asynchronous copies, no product of a warpgroup that waits for the one before."""
    compiled = cuda_compile_table.contractions(library, 90, code.items())
    of_warps = 2 * len(OF_SIZE[2]) + 2 * len(OF_SIZE[4])
    assert len(compiled) == len(OPS) * (of_warps + 2 * 2 * len(OF_WARPGROUPS))  # two dtypes, a prologue or none
    assert not {row.key: faults(row) for row in compiled if faults(row)}
    version, table = cuda_compile_table.read()
    if version == cuda_compile_table.version():
        assert not {row.key: worse(row, table[row.key]) for row in compiled if worse(row, table[row.key])}


# Instructions of global memory, and the one that waits for the kernels before.
GLOBAL_MEMORY = re.compile(r"(?:LDG|LDGSTS|STG|ATOMG|RED|UTMALDG|LD\.E|ST\.E)\b")
WAITING = "ACQBULK"


def test_kernels_begin_early_and_wait_before_they_touch_global_memory(code: dict[str, list[str]]) -> None:
    """Every kernel has the wait of programmatic dependent launch, and no such instruction stands before it: not even a
    load that the compiler may have moved."""
    assert len(code) > 100
    for name, instructions in code.items():
        wait = next((i for i, each in enumerate(instructions) if each.startswith(WAITING)), None)
        assert wait is not None, name
        assert not any(GLOBAL_MEMORY.match(each) for each in instructions[:wait]), name


def test_image_side_kernels_of_16_bits_multiply_on_tensor_cores(code: dict[str, list[str]]) -> None:
    for name in IMAGE_SIDE:
        found = [instructions for kernel, instructions in code.items() if f"{name}_tensor" in kernel]
        assert found, name
        assert all(any(each.startswith("HMMA") for each in instructions) for instructions in found), name


OPERATORS = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
namespace = torch.ops.fastdcgan_cuda
for schema in sorted(str(s) for s in torch._C._jit_get_all_schemas() if str(s).startswith("fastdcgan_cuda::")):
    print(schema)
"""

# What a torch with CUDA exports and one without doesn't.
CUDA_TORCH = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'


def test_the_operators_are_those_that_run_on_the_cpu(library: Path, tmp_path: Path) -> None:
    """It loads, and registers the same schemas as the library whose kernels the shim runs, which the backend calls."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ makes what stands in for a torch with CUDA, and it is not here")
    (tmp_path / "stand_in.cpp").write_text(CUDA_TORCH)
    stand_in = tmp_path / "stand_in.so"
    subprocess.run([gxx, "-shared", "-fPIC", "-o", str(stand_in), str(tmp_path / "stand_in.cpp")], check=True)
    if torch.version.cuda is not None:
        pytest.skip("a torch with CUDA needs no stand-in, and runs the operators themselves")
    done = subprocess.run(
        [sys.executable, "-c", OPERATORS, str(library), str(stand_in)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sources = [path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*bindings.cpp"))]
    literals = [found for source in sources for found in re.findall(r'm\.def\(((?:\s*"[^"]*")+)', source)]
    defined = ["".join(re.findall(r'"([^"]*)"', each)) for each in literals]
    assert len(defined) >= 14
    assert done.stdout.splitlines() == sorted(f"fastdcgan_cuda::{schema}" for schema in defined)
    package = ROOT / "fastdcgan"
    callers = ("backends/cuda.py", "backends/cuda_narrow.py", "backends/cuda_contractions.py", "optim.py", "losses.py")
    text = "".join((package / name).read_text() for name in (*callers, "pixels.py"))
    called = set(re.findall(r"(?:(?<!torch\.)\bops|operators\([\w.]+\))\.(\w+)\(", text))
    assert called and called <= {schema.split("(")[0] for schema in defined}
