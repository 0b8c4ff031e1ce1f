"""Batch statistics over several processes (`nn.SyncBatchNorm`), on any device that the process group serves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def combine(stats: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """The `stats` [3, stat_groups, C] of all processes together (Chan et al., 1983), and the total count [1].

    Every process combines the same parts in rank order, so all of them get the same bits.
    """
    part = torch.stack([stats[0], stats[1] * count, torch.full_like(stats[0], count)])
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    means, m2s, counts = torch.stack(parts, dim=1)  # each [processes, stat_groups, C]
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    return torch.stack([mean, m2 / total, m2 / (total - 1)]), total[:1, :1].reshape(1)


def mean_sums(sums: Tensor, count: int, total: Tensor, group: Any) -> Tensor:
    """The `sums` of all processes, scaled so that dividing by the local `count` divides by `total`."""
    shared = sums.clone()
    dist.all_reduce(shared, group=group)
    return shared * (count / total)
