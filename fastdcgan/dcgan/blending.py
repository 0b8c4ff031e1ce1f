"""Poisson blending: the gradients of one image inside the known pixels of another.

Perez, Gangnet and Blake, "Poisson Image Editing" (SIGGRAPH 2003), sections 2 and 3.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.linalg import splu
from torch import Tensor


def poisson(images: Tensor, source: Tensor, known: Tensor) -> Tensor:
    """`images` [N, C, H, W] with what is not `known`, bool [N or 1, 1, H, W], made anew: the values whose differences
    between neighbours are nearest to those of `source` [N, C, H, W], and that meet the known pixels around.

    Values are clamped to [-1, 1]. Where nothing is known the result is `source`.
    """
    n = len(images)
    to, of = images.double().cpu().numpy(), source.double().cpu().numpy()
    masks = known.expand(n, 1, *images.shape[2:])[:, 0].cpu().numpy()
    kinds, numbers = np.unique(masks.reshape(n, -1), axis=0, return_inverse=True)
    result = to.copy()
    for number, mask in enumerate(kinds.reshape(-1, *images.shape[2:])):
        mine = numbers.reshape(-1) == number
        result[mine] = _blend(to[mine], of[mine], mask)  # images with one mask share one factorisation
    return torch.from_numpy(result).clamp(-1, 1).to(images)


def _blend(to: np.ndarray, of: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Solves for the correction e = result - of inside, which is to be as flat as it can be: at every missing pixel the
    sum over its neighbours of e - e_neighbour is 0, where e of a known neighbour is to - of."""
    height, width = known.shape
    missing = ~known.ravel()
    unknowns = np.flatnonzero(missing)
    if not len(unknowns):
        return to
    if len(unknowns) == known.size:
        return of
    number = np.full(known.size, -1)
    number[unknowns] = np.arange(len(unknowns))
    pairs = _neighbours(height, width)
    here, there = np.concatenate([pairs, pairs[:, ::-1]]).T
    inside = missing[here]
    here, there = here[inside], there[inside]
    border = ~missing[there]

    offset = (to - of).reshape(-1, known.size)  # [images and channels, pixels]
    right = np.zeros((len(unknowns), len(offset)))
    np.add.at(right, number[here[border]], offset[:, there[border]].T)
    rows = np.concatenate([number[here], number[here[~border]]])
    columns = np.concatenate([number[here], number[there[~border]]])
    values = np.concatenate([np.ones(len(here)), -np.ones(int((~border).sum()))])
    laplacian = coo_array((values, (rows, columns)), shape=(len(unknowns), len(unknowns))).tocsc()

    result = to.reshape(-1, known.size).copy()
    result[:, unknowns] = of.reshape(-1, known.size)[:, unknowns] + splu(laplacian).solve(right).T
    return result.reshape(to.shape)


def _neighbours(height: int, width: int) -> np.ndarray:
    """All pairs of pixels that lie side by side or above each other, as flat indices [P, 2]."""
    pixel = np.arange(height * width).reshape(height, width)
    across = np.stack([pixel[:, :-1].ravel(), pixel[:, 1:].ravel()], 1)
    down = np.stack([pixel[:-1].ravel(), pixel[1:].ravel()], 1)
    return np.concatenate([across, down])
