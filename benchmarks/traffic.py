"""Bytes from the second-level cache to the multiprocessors of an H100 in one training step, by counting.

    python -m fastdcgan.benchmarks.traffic [--batch 128]

A block of a contraction's tile [m, n] reads (m + n)*k values for 2*m*n*k FLOP, whatever the caches above don't hold. Of
two blocks that a cluster would put side by side, each would read its half of the factor that they share (multicast).
Contractions of an image's 3 channels, and with one logit, are left out: kernels of their own run them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdcgan.backends import cuda_contractions, cuda_tiles
from fastdcgan.benchmarks.shapes import Block, NetShape
from fastdcgan.geometry import Geometry
from fastdcgan.spec import Call, Operand

IMAGE_CHANNELS = 4


class Traffic(NamedTuple):
    what: str
    tile: str
    flops: int
    bytes: int
    bytes_in_pairs: int


def contractions(block: Block, batch: int, device: str = "meta") -> dict[str, Call]:
    """The three of a block, on tensors whose values are left open."""

    def tensor(*shape: int) -> Tensor:
        x = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return x.contiguous(memory_format=torch.channels_last)

    linear, gathered = (block.in_channels, block.in_size), (block.out_channels, block.out_size)
    if not block.transposed:
        linear, gathered = gathered, linear
    g = Geometry((block.kernel,) * 2, (block.stride,) * 2, (block.padding,) * 2)
    weight = tensor(linear[0], gathered[0], block.kernel, block.kernel)
    x, y = (Operand(tensor(batch, channels, size, size)) for channels, size in (gathered, linear))
    return {
        "conv": Call("conv", x, weight, g, (linear[1],) * 2),
        "conv_transpose": Call("conv_transpose", y, weight, g, (gathered[1],) * 2),
        "weight_grad": Call("weight_grad", x, y, g, g.kernel),
    }


def of_step(batch: int) -> Iterator[Traffic]:
    """Those of a 64x64 DCGAN: G's three, D's three on [real; fake], and D's without weight gradients in G's part."""
    net = NetShape()
    generator, discriminator = net.generator(), net.discriminator()
    parts = [(b, batch, 3) for b in generator] + [(b, 2 * batch, 3) for b in discriminator]
    for block, images, count in parts + [(b, batch, 2) for b in discriminator]:
        if min(block.in_channels, block.out_channels) <= IMAGE_CHANNELS:
            continue
        for op, call in list(contractions(block, images).items())[:count]:
            problem = cuda_contractions.problem(call)
            tile = cuda_tiles.choose(problem, cuda_tiles.H100).tile
            values = tile.m + tile.n
            in_pairs = min(
                tile.m + (tile.n / 2 if problem.m > tile.m else tile.n),
                tile.n + (tile.m / 2 if problem.n > tile.n else tile.m),
            )
            each = cuda_tiles.blocks(problem, tile) * problem.k * problem.itemsize
            name = f"{block.title} {op} of {images}"
            yield Traffic(name, f"{tile.m}x{tile.n}", block.flops(images), each * values, round(each * in_pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    found = list(of_step(parser.parse_args().batch))
    found.append(Traffic("all", "", *map(sum, zip(*(row[2:] for row in found), strict=True))))
    for row in found:
        rates = (1000 * many / row.flops for many in (row.bytes, row.bytes_in_pairs))
        each = ", in pairs ".join(f"{rate:.1f}" for rate in rates)
        print(f"{row.what:45} {row.tile:8} {row.flops / 1e9:6.1f} GFLOP  {each} bytes per 1000 FLOP")
    print(f"{found[-1].bytes / 1e9:.2f} GB a step, in pairs {found[-1].bytes_in_pairs / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
