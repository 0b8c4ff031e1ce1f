"""Features of patches, by k-means."""

from __future__ import annotations

import numpy as np
import torch

from fastdcgan.dcgan.patches import PatchKMeans


def test_patches() -> None:
    """Whitened patches, triangle activations and quadrants, computed one patch at a time."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    features = PatchKMeans.fit(pixels, centres=7, side=5, seed=0)
    x = torch.from_numpy(pixels[:1]).permute(0, 3, 1, 2).float() / 127.5 - 1
    sums = torch.zeros(2, 2, 7)
    for top in range(8):
        for left in range(8):
            patch = x[0, :, top : top + 5, left : left + 5].flatten()
            patch = (patch - patch.mean()) / (patch.var() + 10 / 127.5**2).sqrt()
            distance = ((patch - features.mean) @ features.whitening - features.centres).norm(dim=1)
            sums[top // 4, left // 4] += (distance.mean() - distance).clamp_min(0) / 16
    expected = (sums.permute(2, 0, 1).flatten() - features.shift) / features.scale
    torch.testing.assert_close(features(x)[0], expected, rtol=1e-3, atol=1e-3)
    again = PatchKMeans.fit(pixels, centres=7, side=5, seed=0)
    assert torch.equal(again(x), features(x))
