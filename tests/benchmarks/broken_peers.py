"""Ways to break our own peer, to see that the benchmarks notice."""

from __future__ import annotations

import torch
from torch import nn

from fastdcgan.benchmarks import peers


def change_fused(monkeypatch, change) -> None:
    """Let `change(module)` happen to what the fused peer runs."""
    original = peers.Peer.transform

    def transform(self, module, device, dtype):
        module = original(self, module, device, dtype)
        if self.fused:
            change(module)
        return module

    monkeypatch.setattr(peers.Peer, "transform", transform)


def scale_a_weight(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).mul_(1.5)
