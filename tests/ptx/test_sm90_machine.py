"""What sm_90 adds to the machine by itself: plain CUDA with inline PTX and known answers, and each fault that it has to
name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.cuda.compiling import needs_nvcc, nvcc
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.ptx.interpreter import ORDERS, Fault, Machine, tensor_map
from tests.ptx.test_machine import run

pytestmark = [needs_compiler, needs_nvcc, pytest.mark.compiles]
HALF, SWIZZLE_128 = 6, 3  # as the driver numbers them


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("ptx") / "plain_sm90.ptx"
    return nvcc(target, "-ptx", "-arch=sm_90a", Path(__file__).parent / "plain_sm90.cu").read_text()


def tiles(ptx: str, order: str = "random", seed: int = 1) -> tuple[Tensor, Tensor]:
    """(what the kernel copied, what it should have)."""
    x = torch.arange(40 * 136).view(40, 136).half()
    row_tiles, across = 3, 3
    out = torch.zeros(row_tiles * across, 16, 64, dtype=torch.float16)
    machine = Machine(order, seed)
    machine.add(x), machine.add(out)
    module = machine.load(ptx)
    map_ = tensor_map(x.data_ptr(), HALF, (136, 40), (272,), (64, 16), SWIZZLE_128)
    numbers = [(out.data_ptr(), 8), (row_tiles * across, 4), (across, 4)]
    module.launch("tiles", (1,), (160,), map_ + b"".join(value.to_bytes(size, "little") for value, size in numbers))
    padded = torch.nn.functional.pad(x, (8, 64, 3, 16))
    return out, torch.stack([padded[i // 3 * 16 :, i % 3 * 64 :][:16, :64] for i in range(9)])


@pytest.mark.parametrize("order", ORDERS)
def test_bulk_copies_and_mbarriers(plain: str, order: str) -> None:
    found, expected = tiles(plain, order)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kernel", ["along", "across"])
def test_a_product_without_a_swizzle(plain: str, kernel: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randint(-9, 9, (64, 16)).half(), torch.randint(-9, 9, (16, 8)).half()
    out = torch.zeros(64, 8)
    run(plain, kernel, (1,), (128,), a, b, out)
    rows = (torch.arange(64) // 8 % 2)[:, None] * 2 + torch.arange(8)[None] % 2 + 1
    assert torch.equal(out, a.float() @ b.float() + rows)


def test_an_mbarrier_orders_what_came_before_it(plain: str) -> None:
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(plain, "meeting", (1,), (64,), x, out)
    assert torch.equal(out, x.flip(0))


def changed(ptx: str, kernel: str, pattern: str, by: str) -> str:
    begin = ptx.index(f".entry {kernel}(")
    text, count = re.subn(pattern, by, ptx[begin:], count=1)
    assert count == 1
    return ptx[:begin] + text


@pytest.mark.parametrize(
    ("pattern", "by", "fault"),
    [
        (r"(expect_tx.*), 2048;", r"\1, 2000;", "brings more bytes than its mbarrier expects"),
        (r"(expect_tx.*), 2048;", r"\1, 2064;", "deadlock: .* parity 0, of which 0 arrivals and 16 bytes never come"),
        (r"fence\.proxy\.async.*;", "", "no proxy fence: a bulk copy or wgmma writes .* which threads? .* read"),
        (r"mbarrier\.arrive\.shared.*;", "", "deadlock: .* arrivals and 0 bytes never come"),
        (r"(mbarrier\.init.*), 128;", r"\1, 64;", "race: a bulk copy .* writes|more arrivals|deadlock"),
        (r"@!done bra again;", "", "race: a bulk copy|may not have brought|more arrivals"),
    ],
    ids=["fewer bytes", "more bytes", "a proxy fence", "arrivals", "a count", "a wait that gives up"],
)
def test_a_planted_fault_of_copies_is_named(plain: str, pattern: str, by: str, fault: str) -> None:
    broken = changed(plain, "tiles", pattern, by)

    def several() -> None:  # whether a wait gives up is up to chance
        for seed in range(5):
            tiles(broken, "random", seed)

    with pytest.raises(Fault, match=fault):
        several()


@pytest.mark.parametrize(
    ("kernel", "pattern", "by", "fault"),
    [
        ("along", r"fence\.proxy\.async.*;", "", "no proxy fence: a bulk copy or wgmma reads"),
        ("along", r"wgmma\.fence.*;", "", "without wgmma.fence"),
        ("along", r"wgmma\.wait_group.*;", "", "stores a value that nobody wrote"),
        ("along", r"wgmma\.commit_group.*;", "", "stores a value that nobody wrote"),
        ("along", r"bar\.sync\s+0;", "", "race: a bulk copy or wgmma reads|nobody wrote"),
        ("meeting", r"bar\.warp\.sync\s+-1;", "", "race: reads .* which thread"),
        ("meeting", r"bar\.sync\s+0;", "", "no mbarrier|race"),
        ("meeting", r"(mbarrier\.init.*), 2;", r"\1, 1;", "race: reads|more arrivals|nobody wrote"),
    ],
)
def test_a_planted_fault_is_named(plain: str, kernel: str, pattern: str, by: str, fault: str) -> None:
    broken = changed(plain, kernel, pattern, by)
    arguments = [torch.ones(64, 16).half(), torch.ones(16, 8).half(), torch.zeros(64, 8)]
    if kernel == "meeting":
        arguments = [torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)]
    with pytest.raises(Fault, match=fault):
        run(broken, kernel, (1,), (64 if kernel == "meeting" else 128,), *arguments)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"base": 8}, "does not begin at a multiple of 16 bytes"),
        ({"sizes": (136, 0)}, "size"),
        ({"strides": (264,)}, "stride"),
        ({"box": (64, 257)}, "side of the box"),
        ({"box": (4, 16), "swizzle": 0}, "no multiple of 16 bytes"),
        ({"box": (128, 16)}, "longer than the swizzle's span"),
        ({"sizes": (8,) * 6, "strides": (128,) * 5, "box": (8,) * 6}, "1 to 5 dimensions"),
        ({"dtype": 1, "nan": True}, "NaNs"),
    ],
    ids=str,
)
def test_a_tensor_map_that_the_driver_would_refuse(change: dict, fault: str) -> None:
    arguments = {"base": 0, "dtype": HALF, "sizes": (136, 40), "strides": (272,), "box": (64, 16)}
    make: Callable[..., bytes] = tensor_map
    assert len(make(**{**arguments, "swizzle": SWIZZLE_128})) == 128
    with pytest.raises(Fault, match=fault):
        make(**{**arguments, "swizzle": SWIZZLE_128, **change})
