"""bfloat16 on AMX tiles: the kernels on an emulation of the instructions, and the instructions of the built library."""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastdcgan
from fastdcgan import backends
from fastdcgan.build_info import library
from fastdcgan.dispatch import autotune, router
from tests.csrc.cpu import amx_library
from tests.csrc.cpu.test_contractions import block
from tests.engine import test_autograd as test_chain

REASON = amx_library.why_not() or (backends.status()["cpu"] if backends.status()["cpu"] != "available" else None)
pytestmark = [pytest.mark.compiles, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
BF16 = torch.bfloat16


# --- the emulation ---------------------------------------------------------------------------------------------------


def config(rows: Sequence[int] = (16, 16, 16), row_bytes: Sequence[int] = (64, 64, 64), palette: int = 1) -> bytearray:
    """The 64 bytes that LDTILECFG reads, for the sum, A and B."""
    found = bytearray(64)
    found[0] = palette
    for i, size in enumerate(row_bytes):
        found[16 + 2 * i : 18 + 2 * i] = size.to_bytes(2, "little")
    for i, count in enumerate(rows):
        found[48 + i] = count
    return found


def product(settings_: bytearray | None, a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> str:
    """One product of tiles [16, 32] of bfloat16, added to `total` [16, 16] in place; what went wrong, or ""."""
    message = ctypes.create_string_buffer(200)
    given_ = None if settings_ is None else np.zeros(128, np.uint8)
    if given_ is not None and settings_ is not None:
        given_ = given_[(-given_.ctypes.data) % 64 :][:64]
        given_[:] = np.frombuffer(settings_, np.uint8)
    pointers = [None if x is None else ctypes.c_void_p(x) for x in (None if given_ is None else given_.ctypes.data,)]
    pointers += [ctypes.c_void_p(x.data_ptr()) for x in (a, b, total)]
    failed = amx_library.library().amx_emulated_product(*pointers, message)
    assert bool(failed) == bool(message.value)
    return message.value.decode()


def tiles(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(16, 32).to(BF16), torch.randn(16, 32).to(BF16), torch.randn(16, 16)


def test_a_product_of_tiles() -> None:
    a, b, total = tiles()
    # Row k of B has rows 2k and 2k + 1 of the matrix, column by column.
    matrix = b.view(16, 16, 2).permute(0, 2, 1).reshape(32, 16)
    expected = total.double() + a.double() @ matrix.double()
    assert product(config(), a, b, total) == ""
    assert (total.double() - expected).abs().max() < 1e-5
    assert total.abs().max() > 1


def test_a_product_of_smaller_tiles_leaves_the_rest() -> None:
    a, b, total = tiles()
    before = total.clone()
    expected = total[:3, :5].double() + a[:3, :14].double() @ (
        b[:7, :10].view(7, 5, 2).permute(0, 2, 1).reshape(14, 5).double()
    )
    assert product(config((3, 3, 7), (20, 28, 20)), a, b, total) == ""
    assert (total[:3, :5].double() - expected).abs().max() < 1e-5
    total[:3, :5] = before[:3, :5]
    assert torch.equal(total, before)


def test_denormal_numbers_are_zeros() -> None:
    tiny, small = 2.0**-130, 2.0**-70
    for a_value, b_value, sum_value in ((tiny, 2.0**100, 0.0), (small, small, 0.0), (0.0, 0.0, tiny)):
        a, b, total = (torch.zeros(16, 32, dtype=BF16), torch.zeros(16, 32, dtype=BF16), torch.zeros(16, 16))
        a[:, 0], b[0, :], total[:] = a_value, b_value, sum_value
        assert product(config(), a, b, total) == ""
        assert not total.any()


def test_the_even_and_the_odd_products_are_summed_apart() -> None:
    """2**30 + 1 - 2**30: the one survives if it is of the other parity, and not if it is of the same."""
    for column, expected in ((1, 1.0), (2, 0.0)):
        a, b, total = torch.zeros(16, 32, dtype=BF16), torch.ones(16, 32, dtype=BF16), torch.zeros(16, 16)
        a[:, 0], a[:, column], a[:, 4] = 2.0**30, 1.0, -(2.0**30)
        assert product(config(), a, b, total) == ""
        assert (total == expected).all()


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        (None, "this thread has configured none"),
        (config(palette=2), "no palette 2"),
        (config(palette=0), "this thread has configured none"),
        (config((17, 16, 16)), "tile 0 can't have 17 rows of 64 bytes"),
        (config((16, 16, 16), (64, 68, 64)), "tile 1 can't have 16 rows of 68 bytes"),
        (config((16, 16, 0)), "tile 2 can't have 0 rows of 64 bytes"),
        (config((16, 16), (64, 64)), "tile 2 has no shape"),
        (config((16,) * 9, (64,) * 9), "there is no tile 8"),
        (config((16, 8, 16)), "do not fit"),
        (config((16, 16, 8)), "do not fit"),
        (config((16, 16, 16), (32, 64, 64)), "do not fit"),
        (config()[:1] + b"\0\1" + config()[3:], "a reserved byte"),
    ],
)  # fmt: skip
def test_what_the_processor_refuses(settings_: bytearray | None, expected: str) -> None:
    assert expected in product(settings_, *tiles())


# --- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [test_chain.generator, test_chain.discriminator])
def test_networks(emulated: ctypes.CDLL, make: type) -> None:
    with fastdcgan.backend("cpu"):
        test_chain.test_network_is_as_accurate_as_vanilla(make, BF16, "cpu")


@pytest.mark.parametrize(("transposed", "norm"), test_chain.KINDS)
def test_chains_of_one(emulated: ctypes.CDLL, transposed: bool, norm: str | None) -> None:
    with fastdcgan.backend("cpu"):
        test_chain.test_block_is_as_accurate_as_vanilla(transposed, norm, "leaky_relu", BF16, "cpu")


def test_a_contiguous_net_runs_in_channels_last(emulated: ctypes.CDLL) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(10, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                        nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh())  # fmt: skip
    ours, x = fastdcgan.fuse(copy.deepcopy(net)).to(BF16), torch.randn(8, 10, 1, 1).to(BF16)
    with fastdcgan.backend("cpu"):
        found = ours(x)
    assert found.is_contiguous()
    truth = net.double()(x.double())
    assert (found - truth).norm() < 0.02 * truth.norm()


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faster", ["cpu amx", "pytorch"])
def test_it_is_compared_with_pytorchs_own(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
    """No rule says which is faster where both are on AMX tiles."""

    def times(calls: dict, firsts: dict) -> dict:
        for call in calls.values():
            call()
        assert {"cpu amx", "pytorch"} <= {name for name, _ in calls}
        return {(name, tile): 1.0 if name == faster else 2.0 for name, tile in calls}

    monkeypatch.setattr(autotune, "_comparing", True)
    monkeypatch.setattr(autotune, "_cpu_milliseconds", times)
    for op, call in block("wide", BF16).calls().items():
        assert router.route(call, "cpu").algorithm.name == faster, op


def test_a_cap_and_this_processor() -> None:
    """The built library: tiles where Linux lists them among the processor's flags, and not under the cap."""
    code = "from fastdcgan import backends; import torch; backends.get('cpu')\n"
    code += "print(torch.ops.fastdcgan_cpu.amx_usable())"
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = {None: {"amx_tile", "amx_bf16"} <= set(flags), "avx512": False, "avx2": False}
    for cap, runs_on_amx in expected.items():
        environment = os.environ | ({} if cap is None else {"ATEN_CPU_CAPABILITY": cap})
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [str(runs_on_amx)], (cap, done.stderr)


# --- the instructions of the library that was built ------------------------------------------------------------------


@functools.cache
def disassembly() -> str:
    """Of the library for AVX-512."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump")
    command = [objdump, "-d", "--no-show-raw-insn", str(library("_cpu_avx512"))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def inner_loops() -> list[list[str]]:
    """The instructions of each innermost loop: from the target of a jump backwards up to that jump."""
    lines = re.findall(r"^ *([0-9a-f]+):\t(.+?) *$", disassembly(), re.MULTILINE)
    place = {address: i for i, (address, _) in enumerate(lines)}
    found: list[list[str]] = []
    before = -1  # the last jump
    for i, (_, instruction) in enumerate(lines):
        if instruction.startswith("j"):
            target = re.match(r"j\w+ +([0-9a-f]+)", instruction)
            if target and before < place.get(target[1], i + 1) <= i:
                found.append([text for _, text in lines[place[target[1]] : i + 1]])
            before = i
    return found


def test_inner_loops_of_the_library() -> None:
    """Tiles are loaded and multiplied there, and nothing else is: no sum is stored, no register goes to the stack."""
    text = disassembly()
    names = ("ldtilecfg", "tilerelease", "tileloadd", "tilestored", "tilezero", "tdpbf16ps")
    assert all(f"{name} " in text or f"{name}\n" in text for name in names)
    inner = [body for body in inner_loops() if any("tdpbf16ps" in line for line in body)]
    counts = {tuple(sum(name in line for line in body) for name in ("tdpbf16ps", "tileloadd")) for body in inner}
    assert counts == {(4, 4), (2, 3), (1, 2)}  # 2x2 tiles, 1x2 and 2x1, 1x1
    for body in inner:
        assert not any(re.search(r"tilestored|tilezero|%rsp|%zmm|call", line) for line in body), body
    # Nothing but the strips multiplies tiles.
    assert text.count("tdpbf16ps") == sum("tdpbf16ps" in line for body in inner for line in body)
