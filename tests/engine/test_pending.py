"""What waits is computed before somebody gets it who asks no `__torch_function__`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import fastdcgan
from tests.engine.test_deferred import run
from tests.helpers.twins import assert_same, numbers
from tests.helpers.ways import SHAPE, conv, net


@pytest.mark.filterwarnings("error:Dynamo does not know how to trace")
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("part", ["a submodule", "a function"])
def test_compiled_inside(part: str, fullgraph: bool) -> None:
    """Compiled code gets tensors: it is traced once, without a graph break."""

    def way(m: Any, x: Tensor) -> Tensor:
        h = m.act(m.bn(m.conv(x)))
        k = m.conv2(x)  # waits meanwhile
        return m.act(inner(m)(h)) + h + k

    def inner(m: Any) -> Callable:
        return compiled[0] if part == "a submodule" else compiled[1]

    plain = net(way, tail=nn.Sequential(conv(), nn.Tanh()))
    found = []
    for model in (plain, fastdcgan.fuse(copy.deepcopy(plain))):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled: list[Callable] = [
            torch.compile(f, fullgraph=fullgraph, backend=counter)
            for f in (model.tail, lambda t, up=model.up: F.relu(up(t)))
        ]
        found.append(run(model, numbers(*SHAPE), passes=4))
        assert counter.frame_count == 1
    assert_same(found[1], found[0])
