"""How far generated images are from real ones, by their features: Fréchet distance, precision and recall."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEIGHBOUR = 3  # of each point that its ball reaches to, as in the paper's experiments
_ROWS = 1024  # rows of the matrix of distances that are computed at a time


class Moments(NamedTuple):
    """Mean [F] and covariance [F, F] of features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """The moments of features [N, F]. Raises ValueError for less than two rows or values that are not finite."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {list(features.shape)}: expected [N, F] with N of at least 2")
    if not np.isfinite(features).all():
        raise ValueError("features have values that are not finite")
    x = features.astype(np.float64)
    return Moments(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance (squared 2-Wasserstein distance) of two Gaussians:

        |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2))

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule ..." (2017), equation 6. The eigenvalues of A B are
    those of A^(1/2) B A^(1/2), which is symmetric and has no negative ones but by rounding: so there is no square root
    of a matrix that may not have one, and singular covariances do no harm.
    """
    root = _symmetric_root(a.covariance)
    values = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(values.clip(0)).sum()
    between = np.square(a.mean - b.mean).sum()
    return max(0.0, float(between + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


class PrecisionRecall(NamedTuple):
    """The share of generated images that look real, and of real images that could have been generated."""

    precision: float
    recall: float


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = NEIGHBOUR) -> PrecisionRecall:
    """Precision and recall of features [N, F] and [M, F].

    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019), section 2.
    A set's manifold is the union of the balls around its points that reach to the `k`th nearest other point; precision
    is the share of generated points in the real manifold, recall the other way.

    Raises ValueError for sets of `k` points or less.
    """
    a, b = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) for x in (real, generated))
    return PrecisionRecall(_share_within(b, a, k), _share_within(a, b, k))


def _share_within(points: Tensor, manifold: Tensor, k: int) -> float:
    if k < 1 or len(manifold) <= k:
        raise ValueError(f"k is {k} for {len(manifold)} points: expected at least 1, and more points")
    radii = torch.cat([part.topk(k + 1, largest=False).values[:, -1] for part in _distances(manifold, manifold)])
    inside = torch.cat([(part <= radii).any(1) for part in _distances(points, manifold)])
    return float(inside.float().mean())


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Rows of distances, some at a time. From differences, not by a matrix product, whose rounding hides small ones."""
    return (torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist") for part in a.split(_ROWS))
