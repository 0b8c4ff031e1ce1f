"""What the machine counts, for kernels whose counts are known by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.cuda.compiling import needs_nvcc, nvcc
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.ptx.interpreter import Counts, Machine, tensor_map
from tests.ptx.test_sm90_machine import HALF, SWIZZLE_128

pytestmark = [needs_nvcc, needs_compiler, pytest.mark.compiles]
ALL = 2**62


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("ptx") / "counted.ptx"
    return nvcc(target, "-ptx", "-arch=sm_80", Path(__file__).parent / "counted.cu").read_text()


@pytest.fixture(scope="module")
def sm90(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("ptx") / "plain_sm90.ptx"
    return nvcc(target, "-ptx", "-arch=sm_90a", Path(__file__).parent / "plain_sm90.cu").read_text()


def counts(
    ptx: str, kernel: str, *arguments: object, grid: int = 1, block: int = 32, shared: int = 0, most: int = ALL
) -> Counts:
    machine = Machine(counted=most)
    for x in arguments:
        if isinstance(x, Tensor):
            machine.add(x)
    machine.load(ptx)(kernel, (grid,), (block,), *arguments, shared=shared)
    (found,) = machine.counts
    assert found.kernel == kernel and found["blocks"] == grid and found["local_bytes"] == 0
    return found


def requests(found: Counts, what: str) -> tuple[int, ...]:
    """(requests, bytes, sectors, the least, those that took more)"""
    return tuple(found[f"{what}_{part}"] for part in ("requests", "bytes", "sectors", "least_sectors", "uncoalesced"))


def wavefronts(found: Counts, what: str) -> tuple[int, int]:
    return found[f"shared_{what}_wavefronts"], found[f"shared_{what}_phases"]


def floats(count: int) -> Tensor:
    return torch.zeros(count)


def test_a_coalesced_copy(ptx: str) -> None:
    found = counts(ptx, "copy", floats(256), floats(256), grid=4, block=64)
    assert requests(found, "load") == requests(found, "store") == (8, 1024, 32, 32, 0)
    assert found["l2_sectors"] == 64 and found["read"] == found["written"] == 1024
    assert not found.waste


def test_a_copy_of_vectors(ptx: str) -> None:
    found = counts(ptx, "copy_vectors", floats(1024), floats(1024), grid=4, block=64)
    assert requests(found, "load") == requests(found, "store") == (8, 4096, 128, 128, 0)


def test_a_stride_of_two(ptx: str) -> None:
    found = counts(ptx, "strided", floats(64), floats(32))
    assert requests(found, "load") == (1, 128, 8, 4, 1)
    assert requests(found, "store") == (1, 128, 4, 4, 0)
    ((line, *waste),) = found.waste
    assert line.startswith("ld.global") and waste == [1, 4, 0]


def test_part_of_a_warp_and_a_shifted_address(ptx: str) -> None:
    found = counts(ptx, "half_of_a_warp", floats(17), floats(16))
    assert requests(found, "load") == (1, 64, 3, 2, 1)
    assert requests(found, "store") == (1, 64, 2, 2, 0)


def test_the_first_level_cache_keeps_what_may_lie_there(ptx: str) -> None:
    found = counts(ptx, "twice", floats(32), floats(32), floats(32))
    assert found["load_sectors"] == 8 * 4
    assert found["l2_sectors"] == 4 + 4 * 4 + 4  # cached, volatile, stored


def test_a_transposition_through_shared_memory(ptx: str) -> None:
    plain = counts(ptx, "transpose", floats(1024), floats(1024))
    assert wavefronts(plain, "store") == (32, 32)
    assert wavefronts(plain, "load") == (32 * 32, 32)
    assert sum(wasted for *_, wasted in plain.waste) == 32 * 31
    padded = counts(ptx, "transpose_padded", floats(1024), floats(1024))
    assert wavefronts(padded, "store") == wavefronts(padded, "load") == (32, 32)


@pytest.mark.parametrize(
    ("kernel", "step", "expected"),
    [
        ("vectors_of_8", 1, (2, 2)),  # 16 lanes of 8 bytes at a time
        ("vectors_of_8", 2, (4, 2)),
        ("vectors_of_8", 3, (2, 2)),
        ("vectors_of_8", 16, (32, 2)),  # all in two banks
        ("vectors_of_16", 1, (4, 4)),  # 8 lanes of 16 bytes
        ("vectors_of_16", 2, (8, 4)),
        ("vectors_of_16", 5, (4, 4)),
        ("vectors_of_16", 8, (32, 4)),
    ],
)
def test_vectors_in_shared_memory(ptx: str, kernel: str, step: int, expected: tuple[int, int]) -> None:
    found = counts(ptx, kernel, step, floats(32), shared=32 * step * 16)
    assert wavefronts(found, "store") == wavefronts(found, "load") == expected


def test_a_word_for_all_is_no_conflict(ptx: str) -> None:
    found = counts(ptx, "broadcast", floats(32))
    assert wavefronts(found, "load") == (1 + 2, 2)


@pytest.mark.parametrize(
    ("pitch", "swizzled", "expected"),
    [(64, 0, 16), (128, 0, 32), (80, 0, 4), (144, 0, 4), (128, 1, 4)],
)
def test_matrices(ptx: str, pitch: int, swizzled: int, expected: int) -> None:
    """Rows of 64 bytes: each matrix's first rows are in 4 of 8 groups of 4 banks; of 128: in one of them."""
    found = counts(ptx, "matrices", pitch, swizzled, torch.zeros(32, dtype=torch.int32), shared=pitch * 8)
    assert wavefronts(found, "load") == (expected, 4)


def test_products(ptx: str) -> None:
    found = counts(ptx, "products", 5, floats(128), block=128)
    assert found["tensor"] == 4 * 5 and found["flops"] == 4 * 5 * 2 * 16 * 8 * 16


def test_copies_that_are_asynchronous(ptx: str) -> None:
    """Half of the lanes copy nothing and fill with zeros: 16 lanes read 256 bytes, 32 write 512."""
    found = counts(ptx, "async_copies", floats(128), floats(32), 16)
    assert requests(found, "load") == (1, 256, 8, 8, 0)
    assert wavefronts(found, "store") == (4, 4)
    assert wavefronts(found, "load") == (4, 1)


def test_bulk_copies_and_products_of_warpgroups(sm90: str) -> None:
    """Boxes that reach beyond their tensor read what is in it, once, and fill their own size of shared memory."""
    x, out = torch.zeros(40, 136, dtype=torch.float16), torch.zeros(9, 16, 64, dtype=torch.float16)
    machine = Machine(counted=ALL)
    machine.add(x), machine.add(out)
    map_ = tensor_map(x.data_ptr(), HALF, (136, 40), (272,), (64, 16), SWIZZLE_128)
    machine.load(sm90).launch("tiles", (1,), (160,), map_ + struct.pack("<qii", out.data_ptr(), 9, 3))
    (found,) = machine.counts
    assert found["load_requests"] == 9 and found["load_bytes"] == found["read"] == x.nbytes
    assert found["store_bytes"] == out.nbytes and wavefronts(found, "store") == (9 * 16, 9 * 16)

    arguments = torch.zeros(64, 16).half(), torch.zeros(16, 8).half(), torch.zeros(64, 8)
    assert counts(sm90, "along", *arguments, block=128)["flops"] == 2 * 64 * 16 * 8


def test_classes(ptx: str) -> None:
    found = counts(ptx, "classes", floats(32), floats(32))
    assert [found[kind] for kind in ("special", "floating", "memory", "tensor", "control")] == [1, 1, 2, 0, 1]


def test_a_sample_of_the_blocks(ptx: str) -> None:
    whole = counts(ptx, "copy", floats(64 * 1000), floats(64 * 1000), grid=1000, block=64)
    some = counts(ptx, "copy", floats(64 * 1000), floats(64 * 1000), grid=1000, block=64, most=1000)
    assert whole["blocks_run"] == 1000 and 0 < some["blocks_run"] < 100
    assert whole["load_sectors"] * some["blocks_run"] == some["load_sectors"] * 1000
