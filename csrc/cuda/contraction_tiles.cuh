// Every tile that is compiled, by number: fastdcgan/backends/cuda_tiles.py has the same list, and chooses.
#pragma once

#include "contraction.cuh"

namespace fastdcgan::cuda {

// 16-bit numbers. Columns: kM, kN, kK, warps along each, stages, blocks of a multiprocessor.
using Tile0 = TileShape<128, 128, 32, 2, 4, 4, 2>;
using Tile1 = TileShape<128, 64, 32, 2, 2, 4, 3>;
using Tile2 = TileShape<64, 128, 32, 2, 2, 4, 3>;
using Tile3 = TileShape<64, 64, 64, 2, 2, 3, 4>;
using Tile4 = TileShape<128, 32, 32, 4, 1, 4, 4>;
// float
using Tile5 = TileShape<128, 64, 32, 4, 2, 3, 2>;
using Tile6 = TileShape<64, 64, 32, 2, 2, 3, 4>;

}  // namespace fastdcgan::cuda
