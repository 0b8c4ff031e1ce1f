// Every tile that is compiled, by number: fastdcgan/backends/cuda_tiles.py has the same list, and chooses.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/gemm/contraction.cuh"

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
// The shim has this tile in the place of all of them when it runs the operators, because its threads are slow.
using HostTile = TileShape<32, 32, 32, 1, 2, 3, 2>;

// Calls f with the tile of that number, which has to be one for T.
template <class T, class F>
auto with_tile(int number, F&& f) {
#ifndef FASTDCGAN_CUDA_ON_CPU
  if constexpr (sizeof(T) == 2) {
    switch (number) {
      case 0: return f(Tile0{});
      case 1: return f(Tile1{});
      case 2: return f(Tile2{});
      case 3: return f(Tile3{});
      case 4: return f(Tile4{});
    }
  } else {
    switch (number) {
      case 5: return f(Tile5{});
      case 6: return f(Tile6{});
    }
  }
#else
  if ((sizeof(T) == 2) == (number <= 4)) return f(HostTile{});
#endif
  throw std::invalid_argument("no tile " + std::to_string(number) + " for this dtype");
}

// run_contraction with a tile by its number. `exact`: float as float, else as TF32.
template <Op op, class T>
void run_tile(const Problem<T>& p, int number, [[maybe_unused]] bool exact, float* workspace, gpu::Stream stream) {
  with_tile<T>(number, [&](auto shape) {
    using Shape = decltype(shape);
    if constexpr (sizeof(T) == 4)
      if (exact) return run_contraction<Contraction<op, Multiplied<T, true>, Shape>>(p, workspace, stream);
    run_contraction<Contraction<op, Multiplied<T>, Shape>>(p, workspace, stream);
  });
}

// Each in a file of its own: they take long to compile.
#define FASTDCGAN_RUN_TILE(op, T) void run_tile<Op::op, T>(const Problem<T>&, int, bool, float*, gpu::Stream)
#define FASTDCGAN_RUN_TILES(op)                    \
  extern template FASTDCGAN_RUN_TILE(op, gpu::bf16); \
  extern template FASTDCGAN_RUN_TILE(op, gpu::fp16); \
  extern template FASTDCGAN_RUN_TILE(op, float)
FASTDCGAN_RUN_TILES(conv);
FASTDCGAN_RUN_TILES(conv_transpose);
FASTDCGAN_RUN_TILES(weight_grad);
#undef FASTDCGAN_RUN_TILES

}  // namespace fastdcgan::cuda
