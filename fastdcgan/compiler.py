"""Backends of torch.compile: `torch.compile(model, backend="fastdcgan")`, whatever style the model is written in.

In the graph that Dynamo traced, blocks are found as `fuse` finds them in a forward of a module's own
(`engine/deferred.py`). Dynamo's guards, graph breaks and dynamic sizes are as with any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdcgan.engine.deferred import Deferring
from fastdcgan.engine.pending import computed


class _Deferred(nn.Module):
    """A traced graph whose convolutions wait for what comes after them."""

    def __init__(self, graph: torch.fx.GraphModule, traced: bool) -> None:
        super().__init__()
        self.graph, self.traced = graph, traced

    def forward(self, *args: Any) -> Any:
        with Deferring(self.traced):
            out = self.graph(*args)
        return computed(out) if self.traced else out


def fastdcgan(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Blocks run fused, all else as it was: gradients of any order, measured choices as without a compiler."""
    return _Deferred(graph, traced=False).forward


def fastdcgan_inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], **options: Any) -> Callable[..., Any]:
    """Blocks run fused, and Inductor makes code of all else; on a CPU also of the blocks that it was measured to be
    faster with. `options` are `torch._inductor.compile`'s."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(enable_autograd_cache=False):  # what it keeps is told apart by `graph` alone
        return compile_fx(_Deferred(graph, traced=True), list(inputs), **options)  # type: ignore[arg-type, return-value]
