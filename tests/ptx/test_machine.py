"""The machine by itself: what nvcc makes of plain CUDA with known answers, and each fault that it has to name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.csrc.cuda.compiling import needs_nvcc, nvcc
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.ptx.interpreter import ORDERS, Fault, Machine

pytestmark = needs_compiler
HERE = Path(__file__).parent


def of_nvcc(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of what nvcc makes of plain.cu."""
    return needs_nvcc(pytest.mark.compiles(test))


# --- plain CUDA ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("ptx") / "plain.ptx"
    return nvcc(target, "-ptx", "-arch=sm_80", HERE / "plain.cu").read_text()


def run(
    ptx: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object, shared: int = 0
) -> None:
    """In each order, on the same memory: results that depend on it would differ from what is expected."""
    for order in ORDERS:
        machine = Machine(order, seed=7)
        for x in arguments:
            if isinstance(x, Tensor):
                machine.add(x)
        machine.load(ptx)(kernel, grid, block, *arguments, shared=shared)


def some_integers(count: int) -> np.ndarray:
    found = np.random.default_rng(0).integers(-(2**31), 2**31, count, dtype=np.int64).astype(np.int32)
    found[:8] = (0, 1, -1, 2**31 - 1, -(2**31), 7, -7, 32)
    return found


def bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) & 0xFFFFFFFF


def of_integers(x: int, y: int) -> list[int]:
    """`integers` of plain.cu in Python's integers."""
    u, v = x & 0xFFFFFFFF, y & 0xFFFFFFFF

    def c(a: int, b: int) -> int:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    def signed(a: int, width: int) -> int:
        return (a + (1 << width - 1)) % (1 << width) - (1 << width - 1)

    picked = [*u.to_bytes(4, "little"), *v.to_bytes(4, "little")]
    permuted = sum(picked[p] << 8 * k for k, p in enumerate((5, 1, 7, 3)))
    reverse = int(f"{u:032b}"[::-1], 2)
    wide = x * y
    return [
        c(x, y), x - c(x, y) * y, u // v, u % v, wide, wide >> 32, u * v >> 32, x >> (y & 31),
        (u << (v & 31)) & 0xFFFFFFFF, u >> (v & 31), 32 - u.bit_length(), u.bit_count(), reverse, permuted,
        ((v << 32 | u) << (y & 31) >> 32) & 0xFFFFFFFF, signed((x & y) | (~x ^ y), 32), c(x * x, y | 1),
        wide - c(wide, 1000003) * 1000003, signed(abs(x), 32), min(x, y), max(u, v), signed(x, 16) * signed(y, 16),
        signed(x, 8), c(x, 7), u // 10, u % 12, (u & -u).bit_length(), wide >> (v & 63), signed(reverse << 32, 64),
        signed(-x, 32),
    ]  # fmt: skip


@of_nvcc
def test_integers(plain: str) -> None:
    a, b = some_integers(200), some_integers(200)[::-1].copy()
    a[3], b[b == 0] = 12345, 3
    expected = [of_integers(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    out = torch.zeros(200, len(expected[0]), dtype=torch.int64)
    run(plain, "integers", (4,), (64,), torch.from_numpy(a), torch.from_numpy(b), out, 200)
    for name, found in zip(range(len(expected[0])), (out == torch.tensor(expected)).T, strict=True):
        assert found.all(), f"value {name}: {out[~found, name][:3]} for {a[~found][:3]}, {b[~found][:3]}"


@of_nvcc
def test_floats(plain: str) -> None:
    random = np.random.default_rng(0)
    a = (random.standard_normal(96) * np.exp(random.standard_normal(96) * 4)).astype(np.float32)
    b = random.standard_normal(96).astype(np.float32)
    out = torch.zeros(96, 23)
    run(plain, "floats", (3,), (32,), torch.from_numpy(a), torch.from_numpy(b), out, 96)
    x, y = a.astype(np.float64), b.astype(np.float64)
    truth = [
        x + y, x * y, x * y + x, x / y, np.sqrt(abs(x)), np.minimum(x, y), np.maximum(x, y), np.rint(x), np.trunc(x),
        np.floor(y), np.trunc(x), x + y, x + y, x * y + x, 1 / y, np.copysign(x, y), np.clip(x, 0, 1),
        np.exp2(y), np.log(abs(x)),
        x * y + 1 / y, np.tanh(x), np.sin(x), 1 / np.sqrt(abs(y)),
    ]  # fmt: skip
    found = out.numpy().T.astype(np.float64)
    down, up = (
        (lambda t, n: np.where(n > t, np.nextafter(n, np.float32(-np.inf)), n)),
        (lambda t, n: np.where(n < t, np.nextafter(n, np.float32(np.inf)), n)),
    )
    directed: dict[int, Callable] = {11: lambda t, n: np.where(t > 0, down(t, n), up(t, n)), 12: up, 13: down}
    for k, exact in enumerate(truth):
        nearest = exact.astype(np.float32)
        if k in directed:
            nearest = directed[k](exact, nearest)
        ulps = {17: 2, 18: 2, 20: 2, 21: 2, 22: 2}.get(k, 0)  # of CUDA's own functions
        error = abs(found[k] - nearest)
        assert (error <= ulps * np.spacing(abs(nearest))).all(), f"value {k}: {found[k]}, not {nearest}"


@of_nvcc
def test_halves(plain: str) -> None:
    """One rounding of the exact result: that of float64, in which these are exact."""
    torch.manual_seed(0)
    pairs = [torch.randn(2, 64, 2).to(dtype) for dtype in (torch.float16, torch.bfloat16)]
    out = [torch.zeros(64, 4, 2, dtype=x.dtype) for x in pairs]
    run(plain, "halves", (1,), (64,), pairs[0][0], pairs[0][1], out[0], pairs[1][0], pairs[1][1], out[1])
    for (a, b), found in zip(pairs, out, strict=True):
        x, y = a.double(), b.double()
        third = torch.stack(((a[:, 0].float() * 3), (b[:, 1].float() / 3)), 1)
        last = third.to(a.dtype) if a.dtype == torch.float16 else torch.maximum(a, b)
        for k, expected in enumerate((x + y, x * y, x * y + x, last)):
            assert torch.equal(found[:, k], expected.to(a.dtype)), k


@of_nvcc
def test_lanes_that_part(plain: str) -> None:
    out = torch.zeros(192, dtype=torch.int32)
    run(plain, "collatz", (3,), (64,), out)

    def steps(n: int) -> int:
        count = 0
        while n != 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            count += 1
        return count

    assert out.tolist() == [steps(n + 1) for n in range(192)]


@of_nvcc
def test_shuffles_and_votes(plain: str) -> None:
    x = some_integers(32) >> 20
    out = torch.zeros(32, 10, dtype=torch.int32)
    run(plain, "shuffles", (1,), (32,), torch.from_numpy(x), out)
    k = np.arange(32)
    ballot = sum(1 << int(i) for i in k[x % 2 == 1])
    expected = [
        x[k ^ 5], np.where(k >= 3, x[k - 3], x), np.where(k < 23, x[np.minimum(k + 9, 31)], x), x[(k * 7) & 31],
        np.where(k % 8 < 6, x[np.minimum(k + 2, 31)], x), x[k // 16 * 16 + 3], np.full(32, ballot),
        np.full(32, int((x == 3).any()) + 2 * int((x > -100).all())),
        np.array([sum(1 << int(j) for j in k[(x & 3) == (v & 3)]) for v in x]), np.full(32, x.sum()),
    ]  # fmt: skip
    for i, values in enumerate(expected):
        assert (bits(out[:, i].numpy()) == bits(np.asarray(values))).all(), i


@of_nvcc
def test_halves_of_a_warp_shuffle_apart(plain: str) -> None:
    x = torch.arange(32, dtype=torch.int32) ** 2
    out = torch.zeros(32, dtype=torch.int32)
    run(plain, "apart", (1,), (32,), x, out)
    assert out[::2].eq(36).all() and out[1::2].eq(x[1::2].sum()).all()


@of_nvcc
def test_shared_memory(plain: str) -> None:
    x, out = torch.randn(45, 70), torch.zeros(70, 45)
    run(plain, "transpose", (3, 2), (32, 8), x, out, 45, 70)
    assert torch.equal(out, x.T)
    many, sums = torch.randint(0, 100, (1000,)).float(), torch.zeros(3)
    run(plain, "sums", (3,), (128,), many, sums, 1000, shared=512)
    assert sums.sum() == many.sum()


@of_nvcc
def test_local_memory_tables_and_generic_addresses(plain: str) -> None:
    x = torch.from_numpy(some_integers(64 * 13)).view(64, 13)
    out = torch.zeros_like(x)
    run(plain, "sorted", (1,), (64,), x, out, 13)
    assert torch.equal(out, x.sort(1).values)

    v = torch.from_numpy(some_integers(64) >> 8)
    out = torch.zeros(64, 2, dtype=torch.int32)
    for order in ORDERS:
        machine = Machine(order)
        machine.add(v), machine.add(out.zero_())
        machine.load(plain)("choices", (1,), (64,), v, out)
        assert torch.equal(out, torch.tensor([chosen(k, int(x)) for k, x in enumerate(v)], dtype=torch.int32))
    found = torch.zeros(64, dtype=torch.int32)
    run(plain, "generic", (1,), (64,), v, found, 1)
    assert torch.equal(found, v.flip(0) * torch.tensor([2, 1]).repeat(32))


def chosen(k: int, x: int) -> tuple[int, int]:
    primes = (2, 3, 5, 7, 11, 13, 17, 19)
    table = {
        0: (x * 3, 0), 1: (0, x ^ 0x55), 2: (x + primes[k & 7], 0), 3: (sum(j ^ x for j in range(k)), 0), 5: (0, ~x),
        4: (1, x * x + ~x), 6: (x << 3, 0), 7: (0, int(x / 3)), 8: (primes[x >> 4 & 7], 0),
    }  # fmt: skip
    return tuple((y + 2**31) % 2**32 - 2**31 for y in table.get(x & 15, (0, -1)))  # type: ignore[return-value]


@of_nvcc
def test_functions(plain: str) -> None:
    assert "call.uni" in plain
    x, out = torch.arange(-120, 136, 4, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(plain, "calls", (1,), (64,), x, out)
    assert torch.equal(out, x.clamp(-100, 100) + 1000 * x.clamp(-7, 7))


@of_nvcc
def test_places_in_a_grid(plain: str) -> None:
    out = torch.zeros(12, 30, dtype=torch.int32)
    run(plain, "places", (2, 3, 2), (5, 3, 2), out)
    assert torch.equal(out, (torch.arange(12)[:, None] * 1000 + torch.arange(30)).int())


@of_nvcc
def test_asynchronous_copies(plain: str) -> None:
    x, out = torch.randn(5, 64, 4), torch.zeros(5, 64, 4)
    run(plain, "pipeline", (1,), (64,), x, out, 5)
    assert torch.equal(out, x.flip(1) * torch.tensor([2.0, 1, 1, 1]) + torch.tensor([0.0, 0, 0, 1]))


@of_nvcc
@pytest.mark.parametrize(
    ("kernel", "old", "new", "fault"),
    [
        ("pipeline", r"cp\.async\.wait_group 1", "cp.async.wait_group 2", "cp.async may not have brought"),
        ("pipeline", r"bar\.sync\s+0;", "", "race|nobody wrote"),
        ("pipeline", r"cp\.async\.commit_group;", "", "cp.async may not have brought"),
        ("neighbours", r"bar\.warp\.sync\s+-1;", "", "race"),
        ("neighbours", r"bar\.warp\.sync\s+-1;", "bar.warp.sync 65535;", "isn't in its own mask"),
        ("neighbours", r"st\.shared\.u32\s+(\[.*\])", r"st.shared.u32 [%rd1]", "outside of"),
        ("neighbours", r"st\.shared\.u32.*;", "", "stores a value that nobody wrote"),
        ("neighbours", r"ld\.shared\.u32", "ld.shared.u64", "isn't aligned|outside of"),
        ("neighbours", r"ret;", "xyz.b32 %r1;", "xyz.b32 isn't known"),
        ("neighbours", r"add\.s32", "add.cc.s32", ".cc of add.cc.s32 isn't known"),
    ],
)
def test_a_planted_fault_is_named(plain: str, kernel: str, old: str, new: str, fault: str) -> None:
    begin = plain.index(f".entry {kernel}(")
    end = plain.index("\n}", begin)
    text, count = re.subn(old, new, plain[begin:end], count=1)
    assert count == 1
    broken = plain[:begin] + text + plain[end:]
    x, out = torch.randn(5, 64, 4), torch.zeros(5, 64, 4)
    arguments = ((64,), x, out, 5) if kernel == "pipeline" else ((32,), x, out)
    with pytest.raises(Fault, match=fault):
        run(broken, kernel, (1,), *arguments)


# --- PTX by hand -----------------------------------------------------------------------------------------------------


def by_hand(body: str) -> str:
    """A kernel of one block with an array `out` of 32-bit values, and its thread in %r0."""
    return f"""
.version 8.7
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out)
{{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    .shared .align 16 .b8 near[256];
    mov.u32 %r0, %tid.x;
    ld.param.u64 %rd0, [out];
    mad.wide.u32 %rd1, %r0, 4, %rd0;
    {body}
}}"""


def test_a_table_of_branches() -> None:
    body = """
    and.b32 %r1, %r0, 3;
targets: .branchtargets A, B, C, A;
    brx.idx %r1, targets;
A:  mov.u32 %r2, 10;
    bra.uni D;
B:  mov.u32 %r2, 20;
    bra.uni D;
C:  mov.u32 %r2, 30;
D:  shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
    st.global.u32 [%rd1], %r3;
    ret;"""
    out = torch.zeros(32, dtype=torch.int32)
    run(by_hand(body), "k", (1,), (32,), out)
    assert out.tolist() == [20, 10, 10, 30] * 8


APART = """setp.eq.u32 %p1, %r0, 3; @%p1 bra E; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; ret;
    E: shfl.sync.idx.b32 %r2, %r0, 0, 31, -1; ret;"""
FIRST_WRITES = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0;
    @!%p1 ld.global.u32 %r2, [%rd1]; @%p1 st.global.u32 [%rd1], 7;"""


def test_a_half_that_nothing_writes_may_be_masked_out_but_not_used() -> None:
    """LLVM makes such pairs, with an undefined half that it knows to be of no account."""
    body = "mov.b32 {%r7, %r8}, %r0; mov.b32 %r1, {%r2, %r7}; {ADD} st.global.u32 [%rd1], %r1;"
    out = torch.zeros(32, dtype=torch.int32)
    run(by_hand(body.replace("{ADD}", "shr.u32 %r1, %r1, 16;")), "k", (1,), (32,), out)
    assert out.tolist() == list(range(32))
    run(by_hand(body.replace("{ADD}", "")), "k", (1,), (32,), out)
    assert (out & 0xFFFF).ne(0).all()


def test_a_byte_that_nothing_writes_may_be_left_out_but_not_used() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    for select, known in (("0x4441", 0xCBCBCB00), ("0x3210", 0)):
        run(by_hand(f"prmt.b32 %r1, %r0, %r7, {select}; st.global.u32 [%rd1], %r1;"), "k", (1,), (32,), out)
        low = list(range(32)) if not known else [0] * 32
        assert [x & 0xFF for x in out.tolist()] == low
        assert [x & 0xFFFFFF00 for x in out.tolist()] == [known] * 32


BAR_0 = "setp.lt.u32 %p1, %r0, 32;\n @%p1 bar.sync 0;\n @!%p1 ret;"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("st.global.u32 [%rd1+2], %r0;", "isn't aligned to 4 bytes"),
        ("st.global.u32 [%rd1+4], %r0;", "outside of all global memory"),
        ("st.global.u32 [%rd0], %r0;", "race: writes byte 0 .* thread 0 writes"),
        ("st.global.u32 [%rd1], %r5;", "stores a value that nobody wrote"),
        ("add.s32 %r3, %r5, 1; setp.eq.s32 %p1, %r3, 0; @%p1 bra E; E: ret;", "a predicate that nobody wrote"),
        ("ld.global.u32 %r1, [%rd5];", "an address that nobody wrote"),
        ("ld.shared.u32 %r1, [near+256];", "outside of shared memory"),
        ("ld.shared.u32 %r1, [near]; st.global.u32 [%rd1], %r1;", "stores a value that nobody wrote"),
        (BAR_0, "waits at a barrier for threads that never come"),
        (
            "setp.eq.u32 %p1, %r0, 3; @%p1 ret; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;",
            "waits for a lane that has ended",
        ),
        (
            APART,
            "waits for lanes that never come",
        ),
        ("shfl.sync.idx.b32 %r1, %r0, 5, 31, 15;", "isn't in its own mask"),
        ("trap;", "trap"),
        ("mov.u32 %r1, %clock;", "%clock isn't known"),
        ("bra nowhere;", "no label nowhere"),
        ("add.s32 %r1, %r0;", "2 operands, expected 3"),
        ("mov.u32 %r99, 1;", "isn't known|a number expected"),
        ("st.global.u32 [%rd1], 1; mov.u32 %r1, %tid.x; st.param.u32 [out], 1;", "may only be read"),
    ],
)
def test_a_fault_is_named(body: str, fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        run(by_hand(body), "k", (1,), (64,), torch.zeros(64, dtype=torch.int32))


def test_blocks_that_share_global_memory_race() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    for body, fault in (
        ("mov.u32 %r1, %ctaid.x; st.global.u32 [%rd1], %r1;", "another block writes"),
        (
            FIRST_WRITES,
            "another block",
        ),
    ):
        with pytest.raises(Fault, match=fault):
            run(by_hand(body), "k", (2,), (32,), out)


def test_a_launch_that_the_driver_would_refuse() -> None:
    machine, out = Machine(), torch.zeros(32, dtype=torch.int32)
    module = machine.load(by_hand("ret;").replace("out)\n", "out)\n.reqntid 32\n"))
    module("k", (1,), (32,), out)
    for grid, block, fault in (
        ((1,), (64,), "reqntid"),
        ((0,), (32,), "no such grid"),
        ((1,), (2048,), "no such grid"),
    ):
        with pytest.raises(Fault, match=fault):
            module("k", grid, block, out)
    with pytest.raises(Fault, match="0 bytes of parameters, expected 8"):
        module.launch("k", (1,), (32,), b"")
