"""The comparison of features."""

from __future__ import annotations

import numpy as np

from fastdcgan.dcgan.classify import Score, compare, to_markdown
from tests.dcgan.conftest import clouds


def test_comparison() -> None:
    """Features that tell the classes apart beat noise; all get the same draws; impossible counts are left out."""
    x, labels = clouds(200, 4)
    noise = np.random.default_rng(0).normal(size=x.shape)
    test = np.arange(200) % 4 == 3
    scores = compare({"good": x, "noise": noise, "good again": x}, labels, test, counts=(2, 6, 150), draws=3)
    assert [(s.features, s.labels) for s in scores] == [
        (name, count) for name in ("good", "noise", "good again") for count in (6, 150)
    ]
    good, all_good, bad, _, again, _ = scores
    assert good.mean > 0.9 > 0.6 > bad.mean
    assert good.accuracies == again.accuracies
    assert len(good.accuracies) == 3
    assert len(all_good.accuracies) == 1
    table = to_markdown(scores).splitlines()
    assert table[0] == "| features | dimensions | 6 labels | 150 labels |"
    assert table[2].startswith(f"| good | 4 | {100 * good.mean:.1f} ± ")


def test_spread() -> None:
    assert str(Score("x", 3, 10, [0.5, 0.7, 0.9])) == "70.0 ± 20.0"
    assert str(Score("x", 3, 10, [0.5])) == "50.0"
