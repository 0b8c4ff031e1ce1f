"""Networks as people write them: fused, they train and run as before."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.networks import VARIANTS
from tests.helpers.twins import assert_fuses_right
from tests.models import SMALL


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*SMALL, *VARIANTS])
def test_fused_is_vanilla(name: str, train: bool, device: torch.device) -> None:
    factory, shape = (SMALL | VARIANTS)[name]
    assert_fuses_right(factory, shape, device, train)
