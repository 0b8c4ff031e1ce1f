"""DistributedDataParallel and SyncBatchNorm: two gloo processes on the CPU against one with all data.

The processes are started once; each runs every function of `SCENARIOS` and stores what it found.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastdcgan
from tests.helpers.twins import assert_same, build, draw

WORLD = 2
CPU = torch.device("cpu")
SHAPES = {"even": (4, 4), "uneven": (3, 5), "empty": (8, 0)}


def network(momentum: float | None = 0.1, bias: bool = True, affine: bool = True) -> nn.Sequential:
    def norm(width: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(width, momentum=momentum, affine=affine)

    down = [nn.Conv2d(3, 4, 3, 2, 1, bias=bias), norm(4), nn.LeakyReLU(0.2, True)]
    up = [nn.ConvTranspose2d(4, 5, 4, 2, 1, bias=bias), norm(5), nn.ReLU(True)]
    return nn.Sequential(norm(3), nn.SiLU(), *down, *up, nn.Conv2d(5, 2, 1), nn.Tanh(), norm(2))


def model(sync: bool, fused: bool = True, **kwargs: Any) -> nn.Module:
    net = build(lambda: network(**kwargs), torch.float64, CPU)
    if sync:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return fastdcgan.fuse(net) if fused else net


def batch(sizes: tuple[int, ...] = SHAPES["even"], step: int = 0) -> Tensor:
    return draw((sum(sizes), 3, 8, 6), torch.float64, CPU, seed=10 + step)


def share(x: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return x.split(sizes)[rank].clone()


def state(net: nn.Module) -> dict[str, Tensor]:
    found = {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {**found, **dict(net.named_buffers())}


def pass_through(net: nn.Module, x: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """One pass with a weighted sum as loss."""
    leaf = x.clone().requires_grad_()
    out = net(leaf, **kwargs)
    (out * weights).sum().backward()
    assert leaf.grad is not None
    return {"output": out.detach(), "input gradient": leaf.grad}


def out_weights(x: Tensor) -> Tensor:
    return draw((x.shape[0], 2, 8, 6), torch.float64, CPU, seed=3)


# --- what the processes run ------------------------------------------------------------------------------------------


def data_parallel(rank: int, sync: bool) -> dict[str, Tensor]:
    """Two steps of SGD on the mean loss of the even shares."""
    net = model(sync=False).train(sync)
    ddp = DistributedDataParallel(net)
    if sync:  # only now, since DDP refuses SyncBatchNorm on a CPU, where PyTorch's own does not run
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        ddp(share(batch(step=step), SHAPES["even"], rank)).square().mean().backward()
        optimizer.step()
    return state(net) | {name: p.detach() for name, p in net.named_parameters()}


def accumulated(rank: int) -> dict[str, Tensor]:
    """Gradients of two micro-batches, synchronised at the second."""
    net = model(sync=False).eval()
    ddp = DistributedDataParallel(net)
    with ddp.no_sync():
        ddp(share(batch(step=0), SHAPES["even"], rank)).square().mean().backward()
    local = state(net)["gradient of 0.weight"].clone()
    ddp(share(batch(step=1), SHAPES["even"], rank)).square().mean().backward()
    return state(net) | {"local": local}


def own_statistics(rank: int, fused: bool) -> dict[str, Tensor]:
    """Plain BatchNorm in training: each process has its own statistics."""
    net = model(sync=False, fused=fused)
    DistributedDataParallel(net)(share(batch(), SHAPES["even"], rank)).square().mean().backward()
    return state(net)


def synchronised(rank: int, sizes: str, stat_groups: int = 1, **kwargs: Any) -> dict[str, Tensor]:
    """SyncBatchNorm without DDP; the processes' gradients are summed here."""
    net, x = model(sync=True, **kwargs), batch(SHAPES[sizes])
    weights = out_weights(x)
    found = {}
    for _ in range(2):
        mine = share(x, SHAPES[sizes], rank), share(weights, SHAPES[sizes], rank)
        extra = {"stat_groups": stat_groups} if stat_groups > 1 else {}
        found = pass_through(net, *mine, **extra)
    for p in net.parameters():
        dist.all_reduce(p.grad)
    return found | state(net)


def evaluated(rank: int) -> dict[str, Tensor]:
    """In eval mode SyncBatchNorm needs nobody: the processes run different numbers of passes."""
    net = model(sync=True).eval()
    x = batch()
    outs = [net(x).detach() for _ in range(1 + rank)]
    return {"output": outs[-1]}


def refused(rank: int) -> dict[str, Any]:
    net = model(sync=True)
    x = share(batch(), SHAPES["even"], rank).requires_grad_()
    try:
        torch.autograd.grad(net(x).sum(), x, create_graph=True)
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": ""}


def half_the_group(rank: int) -> dict[str, Tensor]:
    """A process group of one process: its own statistics."""
    groups = [dist.new_group([i]) for i in range(WORLD)]
    net = build(network, torch.float64, CPU)
    net = fastdcgan.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(net, groups[rank]))
    x = share(batch(), SHAPES["even"], rank)
    return pass_through(net, x, out_weights(x)) | state(net)


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ddp eval": lambda rank: data_parallel(rank, sync=False),
    "ddp sync": lambda rank: data_parallel(rank, sync=True),
    "ddp accumulated": accumulated,
    "ddp own vanilla": lambda rank: own_statistics(rank, False),
    "ddp own fused": lambda rank: own_statistics(rank, True),
    "sync even": lambda rank: synchronised(rank, "even"),
    "sync uneven": lambda rank: synchronised(rank, "uneven"),
    "sync empty": lambda rank: synchronised(rank, "empty"),
    "sync cumulative": lambda rank: synchronised(rank, "even", momentum=None, bias=False),
    "sync not affine": lambda rank: synchronised(rank, "uneven", affine=False),
    "sync groups": lambda rank: synchronised(rank, "even", stat_groups=2),
    "sync eval": evaluated,
    "sync double backward": refused,
    "sync group of one": half_the_group,
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {}
    for name, scenario in SCENARIOS.items():
        dist.barrier()
        found[name] = scenario(rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Per process: scenario -> what it found."""
    folder = tmp_path_factory.mktemp("gloo")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *([before] if before else [])])
    try:
        multiprocessing.spawn(work, (str(folder),), nprocs=WORLD, join=True)
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


# --- against one process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [False, True], ids=["eval", "sync"])
def test_data_parallel_is_one_process_with_the_whole_batch(found: list, sync: bool) -> None:
    net = model(sync=False, fused=False).train(sync)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        net(batch(step=step)).square().mean().backward()
        optimizer.step()
    expected = state(net) | {name: p.detach() for name, p in net.named_parameters()}
    for mine in found:
        assert_same(expected, mine["ddp sync" if sync else "ddp eval"])


def test_accumulation_without_synchronisation(found: list) -> None:
    net = model(sync=False, fused=False).eval()
    net(batch(step=0)).square().mean().backward()
    net(batch(step=1)).square().mean().backward()
    local = [mine["ddp accumulated"].pop("local") for mine in found]
    assert not torch.allclose(*local)
    for mine in found:
        assert_same(state(net), mine["ddp accumulated"])


def test_own_statistics_stay_own(found: list) -> None:
    for mine in found:
        assert_same(mine["ddp own vanilla"], mine["ddp own fused"])
    running = [mine["ddp own fused"]["0.running_mean"] for mine in found]
    assert not torch.allclose(*running)


@pytest.mark.parametrize(
    ("name", "sizes", "kwargs"),
    [
        ("sync even", "even", {}),
        ("sync uneven", "uneven", {}),
        ("sync empty", "empty", {}),
        ("sync cumulative", "even", {"momentum": None, "bias": False}),
        ("sync not affine", "uneven", {"affine": False}),
    ],
)
def test_synchronised_statistics_are_those_of_the_whole_batch(found: list, name: str, sizes: str, kwargs: dict) -> None:
    net, x = model(sync=False, fused=False, **kwargs), batch(SHAPES[sizes])
    once = {}
    for _ in range(2):
        once = pass_through(net, x, out_weights(x))
    for rank, mine in enumerate(found):
        parts = {key: share(value, SHAPES[sizes], rank) for key, value in once.items()}
        assert_same(parts | state(net), mine[name])
    assert all(torch.equal(found[0][name][key], found[1][name][key]) for key in state(net))  # the same bits


def test_statistics_groups_over_processes(found: list) -> None:
    """Group `i` is part `i` of every process' batch."""
    net, x = model(sync=False), batch()
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    once = {}
    for _ in range(2):
        once = pass_through(net, x[order], out_weights(x)[order], stat_groups=2)
    back = {key: value[order.argsort()] for key, value in once.items()}
    for rank, mine in enumerate(found):
        parts = {key: share(value, SHAPES["even"], rank) for key, value in back.items()}
        assert_same(parts | state(net), mine["sync groups"])


def test_nobody_waits_in_eval_mode_or_in_a_group_of_one(found: list) -> None:
    expected = model(sync=False, fused=False).eval()(batch())
    for rank, mine in enumerate(found):
        torch.testing.assert_close(mine["sync eval"]["output"], expected, rtol=1e-10, atol=1e-12)
        net, x = model(sync=False, fused=False), share(batch(), SHAPES["even"], rank)
        assert_same(pass_through(net, x, out_weights(x)) | state(net), mine["sync group of one"])


def test_a_gradient_of_a_gradient_is_refused_by_name(found: list) -> None:
    for mine in found:
        assert "create_graph=True is not supported through SyncBatchNorm" in mine["sync double backward"]["message"]


def test_without_processes_sync_batch_norm_is_batch_norm() -> None:
    net, x = model(sync=True), batch()
    assert isinstance(net[0], nn.SyncBatchNorm)
    expected = model(sync=False, fused=False)
    assert_same(
        pass_through(expected, x, out_weights(x)) | state(expected), pass_through(net, x, out_weights(x)) | state(net)
    )
    assert sum(row.fused for row in fastdcgan.explain(net)) == 5


def test_converting_a_fused_model_keeps_it_fused() -> None:
    net = model(sync=False)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert isinstance(converted, fastdcgan.FusedSequential)
    assert list(converted.state_dict()) == list(net.state_dict())
    assert next(row.pattern for row in fastdcgan.explain(converted)) == "SyncBatchNorm + SiLU"
