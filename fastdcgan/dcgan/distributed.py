"""Several processes that train together, as `torchrun` starts them; one process alone needs nothing of this."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

# While one process decodes a million images the others wait; PyTorch's default is half an hour. Processes that wait for
# one that has died are ended by torchrun.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among those on this machine
    control: Any = None  # a gloo group: small agreements that don't wait for a GPU

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process; all must ask."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of a tensor on the CPU; all must ask."""
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
            values /= self.world
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def wrap(self, net: nn.Module, device: torch.device) -> nn.Module:
        """`net` with gradients averaged over the processes."""
        if self.world == 1:
            return net
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            # The name that replaces broadcast_buffers is not in every torch that is supported.
            warnings.simplefilter("ignore", FutureWarning)
            # Running statistics stay each process's own: there is no need to send them round before every forward.
            return DistributedDataParallel(net, device_ids=devices, broadcast_buffers=False)


def join(device: str) -> tuple[Processes, torch.device]:
    """The processes that torchrun started (RANK, WORLD_SIZE, ... in the environment) or this one alone, and the device
    of this one: `device` is "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".

    Raises ValueError for a device that is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    choose_device(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)  # a GPU that is missing is missing for all
    chosen = choose_device(device, local_rank)
    if world == 1:
        return Processes(), chosen
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), world, local_rank, dist.new_group(backend="gloo", timeout=_PATIENCE)), chosen


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; "auto" and "cuda" are the GPU number `local_rank`. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device is {name!r}, GPU number {index}: there are {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    return device


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()
