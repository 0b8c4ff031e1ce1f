"""nvcc's PTX of the CUDA contractions for sm_90a on the machine, against float64, through the package's own launch
code."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from fastdcgan.backends.cuda_tiles import OF_SM90, Choice
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Call
from tests.csrc.cuda.compiling import needs_nvcc
from tests.cuda_on_cpu.host_programs import needs_compiler
from tests.helpers.contractions import run
from tests.ptx.cuda_kernels import cuda_on
from tests.ptx.interpreter import ORDERS, Fault, Machine

checks = pytest.importorskip("tests.kernels.test_contraction", reason="what is checked there, is so in Triton")
pytestmark = [needs_nvcc, needs_compiler, pytest.mark.compiles]
K4 = Geometry((4, 4), (2, 2), (1, 1))
BF16, FP16 = torch.bfloat16, torch.float16
OPS = ("conv", "conv_transpose", "weight_grad")


def dcgan(op: str, dtype: torch.dtype) -> checks.Case:
    size = (4, 4) if op == "conv_transpose" else (8, 8)
    return checks.Case(op, K4, size, images=4, groups=2, channels=(64, 72), dtype=dtype)


Check = Callable[..., None]


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Check:
    """Checks a contraction with its prologues and its epilogue, as those of Triton are checked."""

    def check(
        case: checks.Case,
        prologues: tuple[str, str],
        epilogue: str,
        choice: Choice,
        order: str = "random",
        change: Callable[[str], str] = lambda ptx: ptx,
    ) -> None:
        def run_on_machine(call: Call, tile: Choice) -> object:
            with cuda_on(Machine(order), change, capability=90) as backend:
                return run(backend, call, "cuda", tile)

        monkeypatch.setitem(checks.RUN, case.op, run_on_machine)
        monkeypatch.setattr(checks, "weight_grad", run_on_machine)
        if case.op == "weight_grad":
            checks.check_weight_grad(case, prologues, "leaky_relu", choice)
        else:
            checks.check_output(case, prologues[0], epilogue, "leaky_relu", choice)

    return check


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("number", OF_SM90)
@pytest.mark.parametrize("op", OPS)
def test_tiles(op: str, number: int, dtype: torch.dtype, contract: Check) -> None:
    """Every tile without a prologue, and with the heaviest."""
    contract(dcgan(op, dtype), ("none", "none"), "stats", Choice(number, 1))
    contract(dcgan(op, dtype), ("bn_backward", "activate"), "grad_stats", Choice(number, 1))


@pytest.mark.parametrize("number", OF_SM90)
@pytest.mark.parametrize("op", OPS)
def test_ragged_edges_and_sums_in_parts(op: str, number: int, contract: Check) -> None:
    """Tiles that reach beyond the tensors on each side, a sum of three parts."""
    size = (4, 4) if op == "weight_grad" else (6, 10)
    channels = (40, 24) if op == "conv_transpose" else (64, 40)
    case = checks.Case(op, Geometry((3, 3), (2, 2), (1, 1)), size, 1, 3, channels, dtype=BF16)
    contract(case, ("activate", "bn_backward"), "grad_stats", Choice(number, 3))


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_in_any_order(op: str, contract: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []
    kept = checks.assert_as_accurate
    monkeypatch.setattr(
        checks, "assert_as_accurate", lambda got, *rest, **named: (found.append(got), kept(got, *rest, **named))
    )
    results = []
    for order in ORDERS:
        found.clear()
        contract(dcgan(op, BF16), ("activate", "activate"), "stats", Choice(9, 2), order)
        results.append(list(found))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], result, strict=True))


def changed(pattern: str, by: str, which: int = 0) -> Callable[[str], str]:
    """Replaces one occurrence in the kernels that have it."""

    def change(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))
        if "sm90_contraction" not in ptx:
            return ptx
        at = found[which]
        return ptx[: at.start()] + at.expand(by) + ptx[at.end() :]

    return change


@pytest.mark.parametrize(
    ("op", "prologues", "change", "fault"),
    [
        ("conv", "none", changed(r"expect_tx(.*), (%r\d+);", r"expect_tx\1, 1024;"), "brought|more bytes"),
        ("conv", "none", changed(r"expect_tx(.*), (%r\d+);", r"expect_tx\1, 65536;"), "deadlock: .* bytes never come"),
        ("conv", "none", changed(r"(try_wait.*\]), %r\d+,", r"\1, 1,", -1), "deadlock|brought|race: a bulk copy"),
        ("conv", "none", changed(r"(try_wait.*\]), %r\d+,", r"\1, 0,"), "deadlock"),
        ("conv", "none", changed(r"wgmma\.wait_group\S+ 1;", ""), "race: a bulk copy .* writes .* wgmma of warp"),
        ("conv", "none", changed(r"wgmma\.wait_group\S+ 0;", ""), "nobody wrote|ends before"),
        ("conv", "none", changed(r"wgmma\.fence\S+;", ""), "without wgmma.fence"),
        ("conv", "none", changed(r"mbarrier\.arrive\.release.*;", ""), "deadlock: .* arrivals and 0 bytes"),
        ("conv", "none", changed(r"griddepcontrol\.wait;", ""), "before griddepcontrol.wait"),
        ("conv", "activate", changed(r"fence\.proxy\.async.*;", "", -1), "no proxy fence: a bulk copy .* writes"),
        ("conv", "activate", changed(r"bar\.warp\.sync\s+-1;", ""), "race: a bulk copy|no proxy fence"),
        ("weight_grad", "activate", changed(r"fence\.proxy\.async.*;", "", -1), "no proxy fence: a bulk copy .* reads"),
    ],
    ids=[
        "fewer bytes",
        "more bytes",
        "a parity of the multiplying",
        "a parity of the copying",
        "a wait",
        "the last wait",
        "a fence of registers",
        "an arrival",
        "a wait for the kernels before",
        "a fence after reading",
        "a barrier of a warp",
        "a fence after writing",
    ],
)
def test_a_planted_fault_is_named(
    op: str, prologues: str, change: Callable[[str], str], fault: str, contract: Check
) -> None:
    case = checks.Case(op, K4, (16, 16), images=4, groups=1, channels=(64, 64), dtype=BF16)
    with pytest.raises(Fault, match=fault):
        contract(case, (prologues, "none"), "none", Choice(9, 1), change=change)


@pytest.mark.parametrize("field", [16, 32], ids=["leading", "stride"])
def test_a_planted_offset_of_a_descriptor_is_wrong(field: int, contract: Check) -> None:
    """Twice the distance from 8 rows, or from a panel, to the next."""
    descriptors = re.compile(r"(\d{19})")

    def change(ptx: str) -> str:
        assert descriptors.search(ptx) or "sm90_contraction" not in ptx
        return descriptors.sub(lambda found: str(doubled(int(found[1]), field)), ptx)

    with pytest.raises((AssertionError, Fault)):
        contract(dcgan("weight_grad", BF16), ("none", "none"), "none", Choice(8, 1), change=change)


def doubled(descriptor: int, field: int) -> int:
    value = descriptor >> field & 0x3FFF
    return descriptor + (value << field)
