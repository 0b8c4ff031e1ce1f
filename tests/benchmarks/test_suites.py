"""The benchmark suite: statistics, the check of the peers, FLOP counts."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdcgan.benchmarks import floors, harness, peers, runners, steps, suites
from fastdcgan.benchmarks.harness import Summary, Timing
from fastdcgan.benchmarks.peers import PEERS
from fastdcgan.benchmarks.results import Case, Results
from fastdcgan.benchmarks.runners import BlockRunner, StepRunner
from fastdcgan.benchmarks.shapes import Block, NetShape, inputs
from tests.benchmarks.broken_peers import change_fused, scale_a_weight

CPU = torch.device("cpu")
TINY = NetShape(16, ngf=8, ndf=8)
BLOCK = Block("G1", True, 8, 4, 4, "relu", True)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny shapes gain nothing from more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_summary_is_median_and_quartiles():
    assert harness.summarise([5, 1, 2, 3, 4]) == Summary(3, 2, 4)
    assert harness.summarise([5, 1, 2, 3, 4]).spread == 2


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_summary_rejects(samples):
    with pytest.raises(ValueError, match="finite samples"):
        harness.summarise(samples)


def test_ratio_cancels_drift():
    drift = [1.0, 1.5, 3.0, 2.0, 1.2]
    found = harness.ratio([2 * d for d in drift], drift)
    assert (found.median, found.spread) == (2.0, 0.0)
    assert not harness.is_noisy(found)


def test_ratio_shows_noise():
    found = harness.ratio([1.0, 1.4, 0.7, 1.1, 0.9], [1.0] * 5)
    assert found == Summary(1.0, 0.9, 1.1)
    assert harness.is_noisy(found)


@pytest.mark.parametrize(("samples", "reference"), [([1.0], [1.0, 2.0]), ([1.0, 1.0], [1.0, 0.0]), ([], [])])
def test_ratio_rejects(samples, reference):
    with pytest.raises(ValueError, match="expected"):
        harness.ratio(samples, reference)


class FakeTimer:
    """Times that are known, and who was called in which order."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.order, self.now = seconds, [], 0.0

    def __call__(self, segments, calls):
        (name,) = (segment() for segment in segments)
        self.order.append((name, calls))
        self.now += calls * self.seconds[name]
        return [self.seconds[name]]


def _candidates(*names: str) -> dict:
    return {name: (lambda name=name: name,) for name in names}


def test_rounds_alternate_their_order_and_calls_fill_the_round():
    timer = FakeTimer({"fast": 0.001, "slow": 0.5})
    samples = harness.interleave(_candidates("fast", "slow"), timer, Timing(3, 0.01))
    assert samples == {"fast": [[0.001] * 3], "slow": [[0.5] * 3]}
    fast, slow = ("fast", 10), ("slow", 1)
    assert timer.order[4:] == [fast, slow, slow, fast, fast, slow]


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 2), (5.5, 4), (1e9, 10)])
def test_rounds_end_with_the_budget_but_not_before_the_least(budget, rounds):
    timer = FakeTimer({"a": 1.0})
    timing = Timing(10, 1.0, budget, least_rounds=2)
    samples = harness.interleave(_candidates("a"), timer, timing, clock=lambda: timer.now)
    assert len(samples["a"][0]) == rounds


def test_timing_rejects_what_makes_no_sense():
    with pytest.raises(ValueError, match="rounds has to be at least 1, not 0"):
        Timing(0)
    with pytest.raises(ValueError, match="nothing to time"):
        harness.interleave({}, harness.CPUTimer(), Timing(1))
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        harness.timer_for(torch.device("meta"), cold=False)


def test_cpu_timer_times_each_segment():
    short, long = harness.CPUTimer()((lambda: None, lambda: time.sleep(0.01)), 2)
    assert 0 <= short < 0.005
    assert long >= 0.01


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_nets_have_the_shapes_of_a_dcgan(size):
    shape = NetShape(size, channels=1, nz=10, ngf=4, ndf=4)
    generator, discriminator = shape.nets()
    real, noise = inputs(shape, 2)
    fake = generator(noise)
    assert fake.shape == real.shape == (2, 1, size, size)
    assert discriminator(fake).shape == (2, 1, 1, 1)
    assert sum(p.numel() for net in (generator, discriminator) for p in net.parameters()) == floors.parameters(shape)


@pytest.mark.parametrize("size", [8, 48, 0])
def test_image_size_is_checked(size):
    with pytest.raises(ValueError, match=f"power of two of at least 16, not {size}"):
        NetShape(size)


def test_step_is_the_textbook_one():
    """Against two backward passes for D, as most people write it, and no freezing of D in G's step."""
    torch.manual_seed(0)
    nets = TINY.nets()
    real, noise = inputs(TINY, 4)
    ours = copy.deepcopy(nets)
    optimisers = [steps.adam(net, CPU) for net in ours]
    loss_d, loss_g = steps.gan_step(*ours, *optimisers, real, noise)

    generator, discriminator = nets
    opt_g, opt_d = (steps.adam(net, CPU) for net in nets)
    one, zero = torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    on_real = F.binary_cross_entropy_with_logits(discriminator(real), one)
    on_real.backward()
    fake = generator(noise)
    on_fake = F.binary_cross_entropy_with_logits(discriminator(fake.detach()), zero)
    on_fake.backward()
    opt_d.step()
    expected_g = F.binary_cross_entropy_with_logits(discriminator(fake), one)
    expected_g.backward()
    opt_g.step()

    torch.testing.assert_close(loss_d, (on_real + on_fake).detach())
    torch.testing.assert_close(loss_g, expected_g.detach())
    for net, expected in zip(ours, nets, strict=True):
        for (name, value), other in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.requires_grad for p in ours[1].parameters())


# --- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "gflop"), [(128, 291), (1024, 2329)])
def test_flops_of_a_step_are_the_known_ones(batch, gflop):
    assert round(floors.step_flops(NetShape(), batch) / 1e9) == gflop


def test_flops_of_a_step_are_those_that_pytorch_counts():
    generator, discriminator = TINY.nets()
    optimisers = steps.adam(generator, CPU), steps.adam(discriminator, CPU)
    with FlopCounterMode(display=False) as counter:
        steps.gan_step(generator, discriminator, *optimisers, *inputs(TINY, 4))
    assert floors.step_flops(TINY, 4) == counter.get_total_flops()


def test_fusing_more_lowers_the_floor_to_flops_and_fewest_bytes():
    flops_per_s, bytes_per_s = 8e14, 3e12
    shape = NetShape()
    unfused, epilogues, full = (
        floors.step_seconds(shape, 128, level, flops_per_s, bytes_per_s) for level in floors.LEVELS
    )
    assert unfused > epilogues > full > floors.step_flops(shape, 128) / flops_per_s
    # Where bytes cost nothing, only FLOPs are left.
    assert floors.step_seconds(shape, 128, "full", flops_per_s, 1e30) == pytest.approx(
        floors.step_flops(shape, 128) / flops_per_s
    )


def test_bytes_of_a_block_by_hand():
    block = Block("D", False, 2, 3, 8, "leaky_relu", True)  # x 2*8*8, y 3*4*4, w 3*2*4*4, all for a batch of 1
    x, y, w = 128, 48, 96
    assert [work.bytes for work in floors.forward(block, 1, "unfused")] == [2 * (x + y + w), 2 * y, 4 * y]
    assert [work.bytes for work in floors.forward(block, 1, "full")] == [2 * (x + y + w)]
    assert [work.bytes for work in floors.backward(block, 1, "full")] == [2 * (x + 2 * y + w), 2 * (x + 2 * y) + 4 * w]
    assert list(floors.backward(block, 1, input_grad=False, weight_grad=False)) == []


def test_floors_reject():
    with pytest.raises(ValueError, match="unknown level 'none'"):
        floors.step_seconds(TINY, 1, "none", 1.0, 1.0)
    with pytest.raises(ValueError, match="bytes_per_s has to be positive, not 0"):
        floors.step_seconds(TINY, 1, "full", 1.0, 0.0)


# --- peers -----------------------------------------------------------------------------------------------------------


def _step_case(names: list[str], dtype: str = "fp32") -> Case:
    return suites.run_step(suites.Contest(names, CPU, dtype), TINY, 4, Timing(2, 1e-4))


def _block_cases(names: list[str], dtype: str = "fp32") -> tuple[Case, Case]:
    return suites.run_block(suites.Contest(names, CPU, dtype), BLOCK, 4, Timing(2, 1e-4))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peers_agree_and_are_timed(dtype):
    names = ["eager", "eager-nhwc", "fused"]
    cases = [_step_case(names, dtype), *_block_cases(names, dtype)]
    assert [case.part for case in cases] == ["step", "forward", "backward"]
    for case in cases:
        assert case.reference == "fused"
        for row in case.rows:
            assert row.status == "ok", row.detail
            assert len(row.samples_ms) == 2
            assert row.error <= row.tolerance
            assert row.saved_bytes > 0
            assert row.ms.median > 0
            assert row.ratio == harness.ratio(row.samples_ms, case.rows[-1].samples_ms)


@pytest.mark.parametrize(
    ("dtype", "kept"), [("fp32", [True, True, False, True, True]), ("bf16", [True] + 3 * [False] + [True])]
)
def test_a_block_has_no_gradient_where_rounding_may_cross_the_kink(monkeypatch, dtype: str, kept: list[bool]) -> None:
    seen: list[torch.Tensor] = []
    real = BlockRunner.__init__
    x = torch.tensor([-2.0, -0.01, 1e-5, 0.01, 2.0]).reshape(1, 1, 1, 5)

    def runner(self, peer, module, x, grad, *args, **kwargs):
        seen.append(grad)
        real(self, peer, module, x, grad, *args, **kwargs)

    monkeypatch.setattr(BlockRunner, "__init__", runner)
    monkeypatch.setattr(Block, "data", lambda self, batch: (x, torch.ones_like(x)))
    monkeypatch.setattr(Block, "module", lambda self: nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))
    monkeypatch.setattr(
        nn.Conv2d, "reset_parameters", lambda self: (nn.init.ones_(self.weight), nn.init.zeros_(self.bias))
    )
    _block_cases(["eager"], dtype)
    assert all((grad.flatten() != 0).tolist() == kept for grad in seen) and len(seen) == 3


def test_a_route_that_fell_back_is_a_failure_with_its_time(monkeypatch):
    """Whoever reads a row of ours should know that another's kernels ran."""
    real = StepRunner.prepare

    def prepare(self):
        warnings.warn("another's business", UserWarning, stacklevel=2)
        if self.peer.fused:
            warnings.warn("fastdcgan leaves algorithm 'cuda' out: OSError: no room", RuntimeWarning, stacklevel=2)
        real(self)

    monkeypatch.setattr(StepRunner, "prepare", prepare)
    with pytest.warns(UserWarning, match="another's business"):
        case = _step_case(["eager-nhwc", "fused"])
    plain, ours = case.rows
    assert plain.status == "ok" and ours.ms.median > 0
    assert (ours.status, ours.detail) == ("failed", "fastdcgan leaves algorithm 'cuda' out: OSError: no room")
    assert Results("bench", {}, [case]).bad == [(case, ours)]


@pytest.mark.parametrize("run", [_step_case, lambda names: _block_cases(names)[1]], ids=["step", "block"])
def test_a_wrong_peer_is_marked_and_not_timed(run, monkeypatch):
    change_fused(monkeypatch, scale_a_weight)
    case = run(["eager", "fused"])
    eager, fused = case.rows
    assert (eager.status, fused.status) == ("ok", "wrong")
    assert "from float64, expected at most" in fused.detail
    assert fused.samples_ms == []
    assert eager.ms is not None
    assert case.reference == "eager"
    assert Results("bench", {}, [case]).bad == [(case, fused)]


def test_a_peer_that_does_not_learn_is_wrong(monkeypatch):
    original = StepRunner.__init__

    def init(self, peer, *arguments):
        original(self, peer, *arguments)
        if peer.fused:
            self.opt_g.step = self.opt_d.step = lambda: None

    monkeypatch.setattr(StepRunner, "__init__", init)
    eager, fused = _step_case(["eager", "fused"]).rows
    assert eager.status == "ok"
    assert fused.status == "wrong"
    assert "an update changes the losses by [0.0, 0.0]" in fused.detail


def test_a_failing_peer_keeps_its_row_with_the_original_error(monkeypatch):
    def fail(module):
        raise RuntimeError("compiling it failed") from OSError("no compiler found")

    change_fused(monkeypatch, fail)
    eager, fused = _step_case(["eager", "fused"]).rows
    assert eager.status == "ok"
    assert fused.status == "failed"
    assert "compiling it failed" in fused.detail
    assert "no compiler found" in fused.detail


def test_compiling_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    (row,) = _step_case(["compile"]).rows
    assert (row.status, row.detail) == ("failed", "RuntimeError: torch.compile compiled nothing")


def test_peers_that_need_a_gpu_say_so():
    rows = _step_case(["eager", "graph", "fused-graph", "compile-max"]).rows
    assert [row.status for row in rows] == ["ok", "unavailable", "unavailable", "unavailable"]
    assert rows[1].detail == "needs a CUDA device"


def test_distance_is_the_worst_and_never_hides_nan():
    truth = [torch.ones(4), torch.full((2,), 2.0)]
    assert peers.distance(truth, truth) == 0
    assert peers.distance([truth[0], truth[1] * 1.5], truth) == pytest.approx(0.5)
    nan = peers.distance([truth[0], truth[1] * float("nan")], truth)
    assert not nan <= 1e9


def test_saved_bytes_are_distinct_and_without_weights():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    # The input of the convolution and the output of the ReLU, in whose place its input was.
    found = runners.saved_bytes(lambda: torch.relu_(conv(x)), list(conv.parameters()))
    assert found == 4 * (2 * 3 * 64 + 2 * 5 * 64)


class FakeGraph:
    """Runs on replay what was recorded, as a CUDA graph does with the kernels."""

    def __init__(self, function) -> None:
        self.function = function
        function()

    def replay(self) -> None:
        self.function()


@pytest.fixture
def fake_cuda_graphs(monkeypatch):
    """CUDA graphs' place taken by a recorder, so that the bookkeeping around them runs on a CPU."""

    class Stream:
        def __init__(self, *args) -> None:
            self.waited_for: list = []

        def wait_stream(self, other) -> None:
            self.waited_for.append(other)

    current = Stream()
    monkeypatch.setattr(peers.Peer, "require", lambda self, device: None)
    monkeypatch.setattr(runners, "_capture", lambda function, pool=None: FakeGraph(function))
    monkeypatch.setattr(FakeGraph, "pool", lambda self: "pool", raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1)
    return current


def test_a_captured_step_reads_its_own_buffers(fake_cuda_graphs):
    torch.manual_seed(0)
    nets, data = TINY.nets(), [inputs(TINY, 4, seed) for seed in range(2)]
    eager = StepRunner(PEERS["eager-nhwc"], nets, data, CPU, torch.float32)
    graph = StepRunner(PEERS["graph"], nets, data, CPU, torch.float32)
    graph.prepare()
    assert fake_cuda_graphs.waited_for, "the warm-up stream has to be waited for before the capture"
    buffers = graph.real, graph.noise
    assert all(buffer is not given for buffer, given in zip(buffers, graph.data[0], strict=True))
    for a, b in zip([*graph.observe(), graph.progress()], [*eager.observe(), eager.progress()], strict=True):
        torch.testing.assert_close(a, b)
    # The same buffers, now with the last data set in them.
    graph.next = 1
    graph()
    assert (graph.real, graph.noise) == buffers
    torch.testing.assert_close(graph.real, graph.data[1][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_real_cuda_graphs_are_right_and_timed(dtype):
    names, device, timing = ["eager-nhwc", "graph", "fused", "fused-graph"], torch.device("cuda"), Timing(2, 1e-3)
    cases = [
        suites.run_step(suites.Contest(names, device, dtype), TINY, 4, timing),
        *suites.run_block(suites.Contest(names, device, dtype), BLOCK, 4, timing),
    ]
    for case in cases:
        assert case.reference == "fused-graph"
        assert [(row.status, row.detail) for row in case.rows] == [("ok", "")] * 4
        assert all(row.ms.median > 0 for row in case.rows)
    assert all(row.peak_bytes > 0 for row in cases[0].rows)


def test_a_captured_block_gives_the_eager_gradients(fake_cuda_graphs):
    torch.manual_seed(0)
    arguments = BLOCK.module(), torch.randn(4, 8, 4, 4), torch.randn(4, 4, 8, 8), CPU, torch.float32
    eager, graph = (BlockRunner(PEERS[name], *arguments) for name in ("eager-nhwc", "graph"))
    graph.prepare()
    for a, b in zip(graph.observe(), eager.observe(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_runner_that_does_not_learn_keeps_its_weights():
    torch.manual_seed(0)
    runner = StepRunner(PEERS["eager"], TINY.nets(), [inputs(TINY, 4)], CPU, torch.float32)
    runner.learn(False)
    runner()
    parameters = [*runner.generator.parameters(), *runner.discriminator.parameters()]
    before = [p.detach().clone() for p in parameters]
    runner()
    assert all(map(torch.equal, parameters, before))
    runner.learn(True)
    runner()
    assert not any(map(torch.equal, parameters, before))


def test_reset_brings_a_runner_back():
    torch.manual_seed(0)
    runner = StepRunner(PEERS["eager"], TINY.nets(), [inputs(TINY, 4)], CPU, torch.float32)
    first = [*runner.observe(), runner.progress()]
    for _ in range(3):
        runner()
    for a, b in zip([*runner.observe(), runner.progress()], first, strict=True):
        assert torch.equal(a, b)
