"""The helper that takes vanilla's own spread for the measure rejects what is wrong by a little more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.twins import assert_within_spread, numbers

BF16 = torch.bfloat16


def outcomes(size: int, magnitude: float, error: float) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A truth of numbers of a magnitude, and two of vanilla's results, which err by so much."""
    truth = magnitude * numbers(size)
    vanilla = [truth + error * numbers(size, seed=seed) for seed in (2, 3)]
    return {"it": truth}, [{"it": t.float()} for t in vanilla]


@pytest.mark.parametrize("magnitude", [1.0, 1e-9], ids=["a gradient", "one that cancels"])
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_what_errs_as_vanilla_does_passes_and_three_times_as_much_fails(size: int, magnitude: float) -> None:
    truth, vanilla = outcomes(size, magnitude, 0.03)
    noise = numbers(size, seed=4) / numbers(size, seed=4).square().mean().sqrt()
    worst = max(float((v["it"].double() - truth["it"]).square().mean().sqrt()) for v in vanilla)
    most = 2 * (1 + 2 / size**0.5)
    assert_within_spread({"it": (truth["it"] + worst * noise).float()}, vanilla, truth, BF16)
    with pytest.raises(AssertionError, match="it errs by"):
        assert_within_spread({"it": (truth["it"] + 1.5 * most * worst * noise).float()}, vanilla, truth, BF16)


@pytest.mark.parametrize("wrong", [0.98, 1.02])
def test_what_is_wrong_by_two_per_cent_fails(wrong: float) -> None:
    truth, vanilla = outcomes(1000, 1.0, 0.003)
    assert_within_spread({"it": truth["it"].float()}, vanilla, truth, BF16)
    with pytest.raises(AssertionError, match="it errs by"):
        assert_within_spread({"it": (wrong * truth["it"]).float()}, vanilla, truth, BF16)


def test_what_is_missing_or_of_another_dtype_fails() -> None:
    truth, vanilla = outcomes(4, 1.0, 0.1)
    for found in (None, truth["it"]):
        with pytest.raises(AssertionError, match="it"):
            assert_within_spread({"it": found}, vanilla, truth, BF16)
    nothing: dict[str, Tensor | None] = {"it": None}
    assert_within_spread(nothing, [nothing, nothing], nothing, BF16)
