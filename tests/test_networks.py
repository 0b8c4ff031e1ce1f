"""Networks as people write them: fused, they train and run as before."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.networks import MODELS, VARIANTS
from tests.helpers.twins import assert_fuses_right


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*MODELS, *VARIANTS])
def test_fused_is_vanilla(name: str, train: bool, device: torch.device) -> None:
    factory, shape = (MODELS | VARIANTS)[name]
    assert_fuses_right(factory, shape, device, train)
