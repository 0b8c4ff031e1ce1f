"""Distances between sets of features."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan.dcgan.distances import Moments, frechet_distance, moments, precision_recall


def covariance(dimensions: int, rank: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(dimensions, rank))
    return factor @ factor.T


def test_frechet_of_one_dimension() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2."""
    a, b = Moments(np.array([1.0]), np.array([[4.0]])), Moments(np.array([-2.0]), np.array([[25.0]]))
    assert frechet_distance(a, b) == pytest.approx(9 + 9)


@given(st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_frechet_of_commuting_covariances(dimensions: int, seed: int) -> None:
    """With common axes, the sum over them of the distances in one dimension; zeros among the variances too."""
    random = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(random.normal(size=(dimensions, dimensions)))
    s1, s2 = random.uniform(0, 3, (2, dimensions)) * (random.random((2, dimensions)) > 0.3)
    m1, m2 = random.normal(size=(2, dimensions))
    a, b = Moments(m1, (axes * s1**2) @ axes.T), Moments(m2, (axes * s2**2) @ axes.T)
    expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rank", [3, 8, 20])
def test_frechet_against_a_general_square_root(rank: int) -> None:
    """SciPy's square root of the product, where that has one; symmetric, and zero for the same."""
    from scipy.linalg import sqrtm

    a, b = Moments(np.zeros(8), covariance(8, 20, 0)), Moments(np.ones(8), covariance(8, rank, 1))
    found = frechet_distance(a, b)
    if rank >= 8:
        cross = np.trace(sqrtm(a.covariance @ b.covariance)).real
        assert found == pytest.approx(8 + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
    assert found == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(b, b) == pytest.approx(0, abs=1e-5)


def test_frechet_of_samples() -> None:
    """Of many points, near the distance of what they were drawn from."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(20_000, 3)), 2 * random.normal(size=(20_000, 3)) + 1
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(3 + 3, rel=0.05)
    with pytest.raises(ValueError, match="N of at least 2"):
        moments(a[:1])
    a[3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        moments(a)


def test_precision_and_recall_of_halves() -> None:
    """Real: two far clusters. Generated in one of them alone: precise, half of the recall; in both and elsewhere: the
    other way round."""
    random = np.random.default_rng(0)
    here, there, elsewhere = (random.normal(size=(200, 4)) + centre for centre in (0, 100, -100))
    real = np.concatenate([here, there])
    again, other = random.normal(size=(2, 200, 4))
    one = precision_recall(real, again)
    assert one.precision > 0.85
    assert 0.4 < one.recall < 0.5
    two = precision_recall(real, np.concatenate([again, other + 100, elsewhere, elsewhere + 500]))
    assert 0.4 < two.precision < 0.5
    assert two.recall > 0.85
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, elsewhere) == (0, 0)


def test_manifolds_by_hand() -> None:
    """On a line, k=1: the balls' radii are the distances to the nearest other point."""
    real, generated = np.array([[0.0], [1.0], [5.0]]), np.array([[1.9], [2.1], [9.1], [0.5]])
    # Balls of the real: [-1, 1], [0, 2], [1, 9]; of the generated: [1.7, 2.1], [1.9, 2.3], [2.1, 16.1], [-0.9, 1.9].
    assert precision_recall(real, generated, k=1) == (0.75, 1)
    with pytest.raises(ValueError, match="k is 3 for 3 points"):
        precision_recall(real, generated)
