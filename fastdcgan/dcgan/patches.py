"""Features of patches by k-means, without a network: what learned features have to beat.

Coates, Ng and Lee, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning" (2011): patches of the
images, normalised and whitened; k-means on them; each patch of an image becomes how much closer than average it is to
every centre ("triangle"), averaged over the four quadrants of the image; each of these features standardised.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.images import normalize_images

_SAMPLES = 50_000  # patches that k-means sees
_IMAGES = 500  # that features are standardised by
_CONTRAST, _WHITENING = 10 / 127.5**2, 0.1  # the article's, the first for pixels in [-1, 1]
_QUADRANTS = 2


class PatchKMeans:
    """Images [N, C, H, W] in [-1, 1] -> [N, 4 * centres]; made by `fit`."""

    def __init__(self, side: int, mean: Tensor, whitening: Tensor, centres: Tensor) -> None:
        self.side, self.mean, self.whitening, self.centres = side, mean, whitening, centres
        self.shift, self.scale = torch.zeros(1), torch.ones(1)

    @classmethod
    def fit(cls, pixels: np.ndarray, *, centres: int = 200, side: int = 6, seed: int = 0) -> PatchKMeans:
        """Learn from uint8 images [N, H, W, C], without labels. Raises ModuleNotFoundError without scikit-learn."""
        from sklearn.cluster import MiniBatchKMeans

        random = np.random.default_rng(seed)
        height, width = pixels.shape[1:3]
        shape = (_SAMPLES,)
        which, top = random.integers(len(pixels), size=shape), random.integers(height - side + 1, size=shape)
        left = random.integers(width - side + 1, size=shape)
        chosen = np.stack(
            [pixels[i, y : y + side, x : x + side] for i, y, x in zip(which, top, left, strict=True)], dtype=np.uint8
        )
        rows = _normalised(normalize_images(torch.from_numpy(chosen)).flatten(1))
        mean = rows.mean(0)
        # ZCA: decorrelates, and turns back to where the pixels were.
        values, vectors = torch.linalg.eigh(torch.cov(rows.T))
        whitening = vectors @ torch.diag((values.clamp_min(0) + _WHITENING).rsqrt()) @ vectors.T
        white = (rows - mean) @ whitening
        kmeans = MiniBatchKMeans(centres, batch_size=1024, n_init=1, random_state=seed).fit(white.numpy())
        made = cls(side, mean, whitening, torch.from_numpy(kmeans.cluster_centers_).float())
        some = normalize_images(torch.from_numpy(pixels[random.permutation(len(pixels))[:_IMAGES]]))
        features = torch.cat([made(part) for part in some.split(64)])
        made.shift, made.scale = features.mean(0), features.std(0) + 0.1 * features.std()
        return made

    def __call__(self, x: Tensor) -> Tensor:
        rows = F.unfold(x.contiguous().float(), self.side).transpose(1, 2)  # [N, patches, C*side*side]
        white = (_normalised(rows) - self.mean.to(x.device)) @ self.whitening.to(x.device)
        distance = torch.cdist(white, self.centres.to(x.device))
        closer = (distance.mean(2, keepdim=True) - distance).clamp_min_(0)
        height = x.shape[2] - self.side + 1
        maps = closer.transpose(1, 2).unflatten(2, (height, -1))
        features = F.adaptive_avg_pool2d(maps, _QUADRANTS).flatten(1)
        return (features - self.shift.to(x.device)) / self.scale.to(x.device)


def _normalised(rows: Tensor) -> Tensor:
    """Each patch to brightness 0 and contrast 1."""
    return (rows - rows.mean(-1, keepdim=True)) * (rows.var(-1, keepdim=True) + _CONTRAST).rsqrt()
