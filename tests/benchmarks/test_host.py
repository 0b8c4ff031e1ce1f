"""The host suite: what it times, and that a net that computes something else is not timed."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.benchmarks import harness, host, tables
from fastdcgan.benchmarks.harness import Timing
from fastdcgan.benchmarks.results import Results
from tests.benchmarks.broken_peers import change_fused, scale_a_weight

CPU = torch.device("cpu")


@pytest.fixture
def one_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHAINS", host.CHAINS[2:3])


def test_chains_are_tiny_and_run() -> None:
    for chain in host.CHAINS:
        first, last = chain.blocks[0], chain.blocks[-1]
        out = chain.module()(torch.randn(chain.batch, first.in_channels, first.in_size, first.in_size))
        assert out.shape == (chain.batch, last.out_channels, last.out_size, last.out_size)
        assert max(block.outputs(chain.batch) for block in chain.blocks) <= 2**12


def test_every_part_is_timed_in_both_formats_on_one_thread(one_chain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    interleave, threads = harness.interleave, []

    def spy(*args):
        threads.append(torch.get_num_threads())
        return interleave(*args)

    monkeypatch.setattr(harness, "interleave", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cases = list(host.run_host(CPU, Timing(3, 1e-4)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1] * 4
    assert [(case.name, case.part) for case in cases] == [
        (f"{net}, {layout}", part)
        for layout in ("NCHW", "channels_last")
        for net, parts in (("1 block with BatchNorm", host.PARTS), ("training step", ("step",)))
        for part in parts
    ]
    for case in cases:
        plain, fused = case.rows
        assert case.reference == plain.peer
        assert [(row.status, row.detail) for row in case.rows] == [("ok", "")] * 2
        assert fused.ratio == harness.ratio(fused.samples_ms, plain.samples_ms)
    header, lines = tables.host_cells(Results("bench", {}, cases))
    assert len(lines) == len(cases) and all(len(line) == len(header) for line in lines)


def test_a_wrong_net_is_not_timed(one_chain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    change_fused(monkeypatch, scale_a_weight)
    results = Results("bench", {}, list(host.run_host(CPU, Timing(2, 1e-4))))
    assert len(results.bad) == len(results.cases)
    for line in tables.host_cells(results)[1]:
        assert line[-2].startswith("wrong: ") and line[-1] == "-"
