"""Memory of large results on the CPU: used again, never by two tensors at once, and given back."""

from __future__ import annotations

import copy
import gc
import io
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdcgan import backends

resource = pytest.importorskip("resource")  # not on Windows
STATUS = backends.status()["cpu"]
pytestmark = pytest.mark.skipif(STATUS != "available", reason=STATUS)

MIB = 1 << 20
PAGE = resource.getpagesize()


@pytest.fixture(autouse=True)
def _nothing_cached() -> Iterator[None]:
    backends.get("cpu")
    gc.collect()
    torch.ops.fastdcgan_cpu.release_memory()
    yield
    torch.ops.fastdcgan_cpu.release_memory()


def result(mib: float, value: float = 1.0) -> Tensor:
    """A result of the backend that takes so much memory."""
    x = torch.full((1, 1, 1, int(mib * MIB / 4)), value)
    return torch.ops.fastdcgan_cpu.norm_act(x, torch.tensor([1.0, 0.0]).reshape(2, 1, 1), 0, 0.0)


def cached() -> tuple[int, int]:
    return torch.ops.fastdcgan_cpu.cached_memory()


def test_memory_is_used_again() -> None:
    first = result(1)
    place = first.data_ptr()
    assert cached() == (0, 0)
    del first
    assert cached() == (1, MIB)
    again = result(1, 2.0)
    assert again.data_ptr() == place and cached() == (0, 0)
    assert torch.equal(again, torch.full_like(again, 2.0))


@pytest.mark.parametrize("mib", [0.5, 0.85, 1.1])
def test_only_for_about_the_same_size(mib: float) -> None:
    del [result(1)][0]
    other = result(mib)
    assert cached() == (1, MIB)
    assert other.untyped_storage().nbytes() == int(mib * MIB / 4) * 4


def test_a_little_less_takes_the_block() -> None:
    del [result(1)][0]
    other = result(0.95)
    assert cached() == (0, 0)
    assert other.untyped_storage().nbytes() == int(0.95 * MIB / 4) * 4


def test_small_results_leave_nothing() -> None:
    del [result(0.2)][0]
    assert cached() == (0, 0)


def test_given_back_after_a_while_and_when_asked() -> None:
    del [result(1)][0]
    for _ in range(300):
        result(2)
    assert cached() == (2, 3 * MIB)
    for _ in range(300):
        result(2)
    assert cached() == (1, 2 * MIB)
    torch.ops.fastdcgan_cpu.release_memory()
    assert cached() == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0.3, 0.5, 0.52, 1.0, 1.02])), max_size=40))
@settings(max_examples=50)
def test_no_two_tensors_share_memory(calls: list[tuple[int, float]]) -> None:
    alive: dict[int, tuple[Tensor, float]] = {}
    for number, (slot, mib) in enumerate(calls):
        alive.pop(slot, None)
        alive[slot] = (result(mib, float(number)), float(number))
        places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t, _ in alive.values())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    for tensor, value in alive.values():
        assert bool((tensor == value).all())


def test_it_is_a_tensor_like_any_other() -> None:
    x = result(1, 3.0)
    assert x.untyped_storage().resizable()
    assert torch.equal(copy.deepcopy(x), x)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file), x)
    array = x.numpy()
    del x
    gc.collect()
    other = result(1, 4.0)
    assert (array == 3.0).all() and bool((other == 4.0).all())
    larger = result(1, 5.0)
    larger.resize_(1, 1, 2, MIB // 4)
    assert bool((larger[0, 0, 0] == 5.0).all())
    shared = result(1, 6.0).share_memory_()
    assert bool((shared == 6.0).all())


def test_gradients_do_not_outlive_their_memory() -> None:
    """A result that a view holds on to is not written over."""
    view = result(1, 7.0)[0, 0, 0, :5]
    others = [result(1, 8.0) for _ in range(3)]
    assert bool((view == 7.0).all())
    assert len({t.data_ptr() for t in (*others, view)}) == 4


def test_large_blocks_are_mappings_of_their_own() -> None:
    """From 4 MiB on they begin at a huge page, and all is given back."""
    first, second = result(5, 1.0), result(5, 2.0)
    if sys.platform == "linux":
        assert first.data_ptr() % (2 * MIB) == 0 and second.data_ptr() % (2 * MIB) == 0
    assert bool((first == 1.0).all()) and bool((second == 2.0).all())
    del first, second
    assert cached() == (2, 10 * MIB)
    before = resident()
    torch.ops.fastdcgan_cpu.release_memory()
    assert cached() == (0, 0) and before - resident() > 8 * MIB


def resident() -> int:
    """Bytes of this process that are in memory."""
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(status.read_text().split()[1]) * PAGE


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_no_fresh_pages() -> None:
    """Tensors that the C library gives back to the system at once, since they have more than its 32 MiB."""
    mib, times = 40, 5
    x = torch.ones(1, 1, 1, mib * MIB // 4)
    coef = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)

    def counted(function) -> float:
        function()
        before = faults()
        for _ in range(times):
            function()
        return (faults() - before) / (times * mib * MIB / PAGE)

    if counted(lambda: x.clone()) < 0.5:
        pytest.skip("here the system does not take back the pages of a large tensor, or they are huge")
    assert counted(lambda: torch.ops.fastdcgan_cpu.norm_act(x, coef, 0, 0.0)) < 0.1
