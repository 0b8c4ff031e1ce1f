// The tiles of the contractions for sm_90a, by number: fastdcgan/backends/cuda_tiles.py has them after those of
// contraction_tiles.cuh.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/gemm_sm90/sm90_contraction.cuh"

namespace fastdcgan::cuda {

// Columns: kN, blocks of a multiprocessor, bytes of a block's ring.
using Tile7 = Sm90Shape<256, 1, 192 * 1024>;
using Tile8 = Sm90Shape<128, 2, 96 * 1024>;
using Tile9 = Sm90Shape<64, 2, 96 * 1024>;
using HostSm90Tile = Sm90Shape<64, 2, 96 * 1024>;  // as HostTile

inline bool is_sm90_tile(int number) { return number >= 7 && number <= 9; }

// run_sm90 with a tile by its number. Throws std::invalid_argument for a problem that has no TMA tiles, and
// std::runtime_error on a device that is not of compute capability 9.0.
template <Op op, class T>
void run_sm90_tile(const Problem<T>& p, int number, float* workspace, gpu::Stream stream) {
  if (gpu::compute_capability() != 90)
    throw std::runtime_error("tile " + std::to_string(number) + " is for GPUs of compute capability 9.0");
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    if (p.gathered.prologue != Prologue::none || p.other.prologue != Prologue::none)
      return run_sm90<Sm90Contraction<op, T, Shape, true>>(p, workspace, stream);
    run_sm90<Sm90Contraction<op, T, Shape, false>>(p, workspace, stream);
  };
#ifndef FASTDCGAN_CUDA_ON_CPU
  switch (number) {
    case 7: return run(Tile7{});
    case 8: return run(Tile8{});
    case 9: return run(Tile9{});
  }
#else
  if (is_sm90_tile(number)) return run(HostSm90Tile{});
#endif
  throw std::invalid_argument("no tile " + std::to_string(number));
}

#define FASTDCGAN_RUN_SM90_TILE(op, T) \
  void run_sm90_tile<Op::op, T>(const Problem<T>&, int, float*, gpu::Stream)
#define FASTDCGAN_RUN_SM90_TILES(prefix, T)          \
  prefix FASTDCGAN_RUN_SM90_TILE(conv, T);           \
  prefix FASTDCGAN_RUN_SM90_TILE(conv_transpose, T); \
  prefix FASTDCGAN_RUN_SM90_TILE(weight_grad, T)
FASTDCGAN_RUN_SM90_TILES(extern template, gpu::bf16);
FASTDCGAN_RUN_SM90_TILES(extern template, gpu::fp16);

}  // namespace fastdcgan::cuda
