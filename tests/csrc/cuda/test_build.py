"""The CUDA extension, built and linked where there is an nvcc: what its machine code is, and the operators' schemas.

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

from tests.csrc.cuda import machine_code
from tests.csrc.cuda.compiling import ROOT, extension, needs_nvcc
from tests.csrc.cuda.machine_code import dump

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def library() -> Path:
    return extension()


@pytest.fixture(scope="module")
def code(library: Path) -> dict[str, list[str]]:
    """Name -> instructions with their operands of each kernel for sm_90a."""
    return machine_code.functions(dump(library, "-sass", "-arch", "sm_90a"))


def test_architectures(library: Path) -> None:
    text = dump(library, "--list-elf", "--list-ptx")
    machine_code = set(re.findall(r"ELF file.*\.(sm_\w+)\.cubin", text))
    assert machine_code == {"sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"}
    assert set(re.findall(r"PTX file.*\.(sm_\w+)\.ptx", text)) == {"sm_80", "sm_90a", "sm_100"}


IMAGE_SIDE = ("image_side_conv", "image_side_transpose", "image_side_weight_grad")
KERNELS = (
    "norm_act", "norm_act_backward", "grad_sums", "batch_stats", "combine", "coefficients", "contraction",
    "sm90_contraction", "reduce_splits", "combine_weight_grad", "adam", "bce", "images",
    *IMAGE_SIDE, *(f"{name}_tensor" for name in IMAGE_SIDE),
)  # fmt: skip


def test_nothing_is_spilled(library: Path) -> None:
    """No kernel has a stack: neither spilled registers nor arrays that the compiler couldn't keep in registers."""
    usage = dump(library, "--dump-resource-usage")
    found = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", usage)
    names = {name for name, *_ in found}
    for kernel in KERNELS:
        assert any(f"{len(kernel)}{kernel}" in name for name in names), kernel
    assert [entry for entry in found if entry[1:] != ("0", "0")] == []


def test_contractions_are_on_tensor_cores(code: dict[str, list[str]]) -> None:
    """Matrix instructions and asynchronous copies; on warpgroups no product waits for the one before, and what they add
    up and multiply in registers stays as it is from their fence to their wait."""
    sm90 = {name: each for name, each in code.items() if "16sm90_contraction" in name}
    warps = {name: each for name, each in code.items() if "11contraction" in name}
    assert len(sm90) == 3 * 2 * 3 * 2 and len(warps) == 3 * (2 * 5 + 2 * 2)  # contractions, dtypes, tiles, prologues
    for name, instructions in sm90.items():
        products = [each for each in instructions if each.startswith("HGMMA")]
        assert products and any(each.startswith("UTMALDG") for each in instructions), name
        assert 2 * sum("gsb0" in each for each in products) <= len(products), name
        assert not list(machine_code.touched_products(instructions)), name
    for name, instructions in warps.items():
        assert all(any(each.startswith(kind) for each in instructions) for kind in ("HMMA", "LDGSTS")), name
    for kernel in IMAGE_SIDE:
        found = {name: each for name, each in code.items() if f"{kernel}_tensor" in name}
        assert found and all(any(each.startswith("HMMA") for each in own) for own in found.values()), kernel


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


OPERATORS = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[2])
torch.ops.load_library(sys.argv[1])
from fastdcgan.backends import cuda_facts
cuda_facts.require_agreement(torch.ops.fastdcgan_cuda)
for schema in sorted(str(s) for s in torch._C._jit_get_all_schemas() if str(s).startswith("fastdcgan_cuda::")):
    print(schema)
"""

# What a torch with CUDA exports and one without doesn't.
CUDA_TORCH = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'


def test_the_operators_are_those_that_run_on_the_cpu(library: Path, tmp_path: Path) -> None:
    """It loads where a torch with CUDA was imported, which leaves that library's names to those that ask for it; its
    kernels are what the backend knows of them, and it registers the same schemas as the library whose kernels the shim
    runs, which the backend calls."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ makes what stands in for a torch with CUDA, and it is not here")
    (tmp_path / "stand_in.cpp").write_text(CUDA_TORCH)
    stand_in, name = tmp_path / "stand_in.so", "-Wl,-soname,libtorch_cuda.so"
    subprocess.run([gxx, "-shared", "-fPIC", name, "-o", str(stand_in), str(tmp_path / "stand_in.cpp")], check=True)
    if torch.version.cuda is not None:
        pytest.skip("a torch with CUDA needs no stand-in, and runs the operators themselves")
    done = subprocess.run(
        [sys.executable, "-c", OPERATORS, str(library), str(stand_in)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    sources = [path.read_text() for path in sorted((ROOT / "csrc/cuda/ops").glob("*bindings.cpp"))]
    literals = [found for source in sources for found in re.findall(r'm\.def\(((?:\s*"[^"]*")+)', source)]
    defined = ["".join(re.findall(r'"([^"]*)"', each)) for each in literals]
    assert len(defined) >= 14
    assert done.stdout.splitlines() == sorted(f"fastdcgan_cuda::{schema}" for schema in defined)
    callers = [*(ROOT / "fastdcgan/backends").glob("cuda*.py")]
    callers += [ROOT / "fastdcgan" / f"{name}.py" for name in ("optim", "losses", "images")]
    text = "".join(path.read_text() for path in callers)
    called = set(re.findall(r"(?:(?<!torch\.)\bops|operators\([\w.]+\))\.(\w+)\(", text))
    assert called and called <= {schema.split("(")[0] for schema in defined}
