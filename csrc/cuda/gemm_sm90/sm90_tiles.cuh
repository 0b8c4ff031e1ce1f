// The tiles of contractions on warpgroups, by number: fastdcgan/backends/cuda_tiles.py has them after those of
// contraction_tiles.cuh.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/gemm_sm90/sm90_contraction.cuh"

namespace fastdcgan::cuda {

// Columns: kN, blocks of a multiprocessor, bytes of a block's ring.
using Tile7 = WarpgroupShape<256, 1, 192 * 1024>;
using Tile8 = WarpgroupShape<128, 2, 96 * 1024>;
using Tile9 = WarpgroupShape<64, 2, 96 * 1024>;
using HostWarpgroupTile = WarpgroupShape<64, 2, 96 * 1024>;  // as HostTile

inline bool of_warpgroups(int number) { return number >= 7 && number <= 9; }

// run_warpgroups with a tile by its number. Throws std::invalid_argument for a problem that has no boxes, and
// std::runtime_error on a device that is not of compute capability 9.0.
template <Op op, class T>
void run_warpgroup_tile(const Problem<T>& p, int number, float* workspace, gpu::Stream stream) {
  if (gpu::compute_capability() != 90)
    throw std::runtime_error("tile " + std::to_string(number) + " is for GPUs of compute capability 9.0");
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    if (p.gathered.prologue != Prologue::none || p.other.prologue != Prologue::none)
      return run_warpgroups<WarpgroupContraction<op, T, Shape, true>>(p, workspace, stream);
    run_warpgroups<WarpgroupContraction<op, T, Shape, false>>(p, workspace, stream);
  };
#ifndef FASTDCGAN_CUDA_ON_CPU
  switch (number) {
    case 7: return run(Tile7{});
    case 8: return run(Tile8{});
    case 9: return run(Tile9{});
  }
#else
  if (of_warpgroups(number)) return run(HostWarpgroupTile{});
#endif
  throw std::invalid_argument("no tile " + std::to_string(number));
}

#define FASTDCGAN_RUN_WARPGROUP_TILE(op, T) \
  void run_warpgroup_tile<Op::op, T>(const Problem<T>&, int, float*, gpu::Stream)
#define FASTDCGAN_RUN_WARPGROUP_TILES(prefix, T)          \
  prefix FASTDCGAN_RUN_WARPGROUP_TILE(conv, T);           \
  prefix FASTDCGAN_RUN_WARPGROUP_TILE(conv_transpose, T); \
  prefix FASTDCGAN_RUN_WARPGROUP_TILE(weight_grad, T)
FASTDCGAN_RUN_WARPGROUP_TILES(extern template, gpu::bf16);
FASTDCGAN_RUN_WARPGROUP_TILES(extern template, gpu::fp16);

}  // namespace fastdcgan::cuda
