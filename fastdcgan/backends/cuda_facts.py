"""What the CUDA backend knows of the kernels in csrc/cuda, to choose and to plan also where no library is: each is
compared with what the library says of itself when it is loaded."""

from __future__ import annotations

import json
from typing import Any

from fastdcgan.activations import ACTIVATIONS
from fastdcgan.backends import cuda_tiles, cuda_tma
from fastdcgan.spec import Unavailable

EPILOGUES = {"none": 0, "bias": 1, "activate": 2, "stats": 3, "grad_stats": 4}
MOST_PIXELS = 2**30  # of a tensor, and its channels
MOST_GEOMETRY = 2**20  # of a kernel with its dilation, a stride, a padding
IMAGE_CHANNELS, IMAGE_KERNEL, IMAGE_STRIDE = 4, 5, 2  # at most, of the image-side kernels
ADAM_CHUNK = 4096  # elements for which Adam keeps a step counter of their own


def known() -> dict[str, Any]:
    """What `facts_op` in csrc/cuda/ops/facts.cu says, as it is known here."""
    tiles, sm90 = [], []
    for itemsize, numbers in cuda_tiles.OF_SIZE.items():
        for tile in (cuda_tiles.TILES[number] for number in numbers):
            sizes = [tile.shared_memory(itemsize, *second) for second in ((), (True,), (False, True))]
            row = [tile.m, tile.n, tile.k, tile.warps, tile.stages, tile.blocks]
            tiles.append([*row, sizes[0], sizes[1] - sizes[0], sizes[2] - sizes[0]])
    for tile in (cuda_tiles.TILES[number] for number in cuda_tiles.OF_SM90):
        assert isinstance(tile, cuda_tiles.Sm90Tile)
        both = [value for prologue in (False, True) for value in (tile.blocks_with(prologue), tile.ring_with(prologue))]
        sm90.append([tile.m, tile.n, tile.k, *both])
    return {
        "tiles": tiles,
        "sm90_tiles": sm90,
        "prologues_in_registers": sorted(ACTIVATIONS[name].id for name in cuda_tma.IN_REGISTERS),
        "epilogues": list(EPILOGUES.values()),
        "activations": [activation.id for activation in ACTIVATIONS.values()],
        "limits": [MOST_PIXELS, cuda_tiles.MAX_PARTS, MOST_GEOMETRY],
        "image_side_limits": [IMAGE_CHANNELS, IMAGE_KERNEL, IMAGE_STRIDE],
        "adam_chunk": ADAM_CHUNK,
    }


def require_agreement(ops: Any) -> None:
    """Raise Unavailable if the library with the operators `ops` has other kernels than this package knows."""
    said = {**json.loads(ops.facts()), "image_side_limits": ops.image_side_limits()}
    for name, value in known().items():
        if said.get(name) != value:
            raise Unavailable(
                f"backend 'cuda': the library was built from other sources than this package: its {name} are "
                f"{said.get(name)}, not {value}; build it again"
            )
