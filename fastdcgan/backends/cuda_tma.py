"""What the contractions for sm_90a (csrc/cuda/gemm_sm90) take: tensors of which the copy engine of a GPU of compute
capability 9.0 (TMA) can copy tiles of pixels. The same rules as `why_not_tma` there."""

from __future__ import annotations

from torch import Tensor

from fastdcgan.geometry import Geometry
from fastdcgan.spec import Operand

ROWS, DEPTH = 128, 64  # pixels of a tile, and of a step of weight_grad's depth
_VECTOR = 8  # 16-bit numbers in 16 bytes
IN_REGISTERS = ("identity", "relu", "leaky_relu")  # activations of a prologue


def pixel_tile(pixels: int, rows: int, columns: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a TMA tile of `pixels`, a power of two, for images of rows x columns."""

    def side(needed: int, most: int) -> int:
        return min(1 << (needed - 1).bit_length(), most)

    width = side(columns, pixels)
    height = side(rows, pixels // width)
    return pixels // width // height, height, width


def pixel_tiles(images: int, rows: int, columns: int) -> int:
    """TMA tiles of ROWS pixels that cover so many images of rows x columns."""
    tiles = 1
    for size, side in zip((images, rows, columns), pixel_tile(ROWS, rows, columns), strict=True):
        tiles *= -(-size // side)
    return tiles


def conv_fits(a: Operand, weight: Tensor, geometry: Geometry) -> bool:
    """Whether TMA can copy the operands of a `conv` of one group, in channels_last."""
    tiles = _in_tma_tiles(a, weight, a.x.shape[1]) and _strided(a.x, geometry) and _whole(a.x, geometry)
    return tiles and _in_registers(a)


def conv_transpose_fits(a: Operand, weight: Tensor) -> bool:
    """The same of `conv_transpose`."""
    return _in_tma_tiles(a, weight, weight.shape[1]) and _in_registers(a)


def weight_grad_fits(gathered: Operand, linear: Operand, geometry: Geometry) -> bool:
    """The same of `weight_grad`."""
    sizes = tuple(linear.x.shape[2:])
    _, *sides = pixel_tile(DEPTH, *sizes)
    whole = all(size % side == 0 for size, side in zip(sizes, sides, strict=True))
    others = all(t is None or t.data_ptr() % 16 == 0 for t in (linear.y, linear.coef))
    return whole and others and _strided(gathered.x, geometry) and _in_tma_tiles(gathered, linear.x, linear.x.shape[1])


def _in_tma_tiles(a: Operand, other: Tensor, length: int) -> bool:
    """Whether 16-bit rows, of `length` numbers in `other`, begin at multiples of 16 bytes."""
    tensors = [t for t in (a.x, a.y, a.coef, other) if t is not None]
    rows = a.x.element_size() == 2 and a.x.shape[1] % _VECTOR == 0 and length % _VECTOR == 0
    return rows and all(t.data_ptr() % 16 == 0 for t in tensors)


def _strided(x: Tensor, geometry: Geometry) -> bool:
    return all(size % step == 0 for size, step in zip(x.shape[2:], geometry.stride, strict=True))


def _whole(x: Tensor, geometry: Geometry) -> bool:
    """Whether no TMA tile reaches from one pixel's channels into those of the next."""
    return geometry.stride[1] == 1 or x.shape[1] % DEPTH == 0


def _in_registers(a: Operand) -> bool:
    return a.coef is None or a.act in IN_REGISTERS
