// Tiles of matrices in shared memory, and the product of two of them on tensor cores.
//
// A tile is rows of chunks of 16 bytes. Along its rows lies the depth of the product (the index that is summed over) or
// across them (`kDepthRows`): tensors are read as they lie in memory, and ldmatrix transposes what has to be transposed. Chunks
// are permuted within a row so that what a warp touches at a time fills all banks once.
#pragma once

#include "cuda/device/tensor_core.h"

namespace fastdcgan::cuda {

using gpu::kVec;
using gpu::Vec;

// How numbers of type T are multiplied: bf16 and fp16 as they are; float as TF32, or exactly (to rounding) as three
// products of TF32 numbers, of which two make a float (Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations", 2019).
template <class T_, bool kExact_ = false>
struct Multiplied {
  using T = T_;
  static constexpr bool kExact = kExact_;
  static constexpr int kDepth = 32 / static_cast<int>(sizeof(T));  // of one instruction
};

// kRows x kColumns numbers. kDepthRows: a row is one step of the depth.
template <class T, int kRows_, int kColumns_, bool kDepthRows_>
struct alignas(128) MatrixTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr bool kDepthRows = kDepthRows_;
  static constexpr int kChunk = kVec<T>, kChunks = kColumns / kChunk;
  static_assert(kChunks >= 4 && (kChunks & (kChunks - 1)) == 0, "rows of a power of two of chunks");

  T numbers[kRows * kColumns];

  static GPU_INLINE int place(int row, int chunk) {
    if constexpr (sizeof(T) == 4 && kDepthRows)  // 4 rows of 2 chunks are read at a time
      return row * kColumns + (chunk ^ (row % 4 * 2 & (kChunks - 1))) * kChunk;
    else if constexpr (kChunks >= 8)  // 8 rows of 1 chunk
      return row * kColumns + (chunk ^ row % 8) * kChunk;
    else
      return row * kColumns + (chunk ^ (row / 2 % 4)) * kChunk;
  }
  GPU_INLINE T* chunk(int row, int chunk) { return numbers + place(row, chunk); }
  GPU_INLINE const T* chunk(int row, int chunk) const { return numbers + place(row, chunk); }
  // Number `depth` of the row or column `side` of the matrix.
  GPU_INLINE float at(int side, int depth) const {
    const int row = kDepthRows ? depth : side, column = kDepthRows ? side : depth;
    return gpu::to_float(numbers[place(row, column / kChunk) + column % kChunk]);
  }
};

// Registers of the left factor's 16 x kDepth numbers from row m and depth k on. Here and below m, n and k are multiples
// of 16, which leave the permutation of a row as it is: so most of an address is the same for all rows of a thread, and
// computed once.
template <class Tile>
GPU_INLINE void left_fragment(const Tile& tile, int m, int k, unsigned (&a)[4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (Tile::kDepthRows)
    gpu::load_matrix_transposed(a, tile.chunk(k + lane / 16 * 8 + lane % 8, m / 8 + lane / 8 % 2));
  else
    gpu::load_matrix(a, tile.chunk(lane % 16, k / 8 + lane / 16) + m * Tile::kColumns);
}

// Registers of the right factor's kDepth x 16 numbers from column n and depth k on, 8 columns after 8.
template <class Tile>
GPU_INLINE void right_fragments(const Tile& tile, int n, int k, unsigned (&b)[2][2]) {
  const int lane = threadIdx.x % 32;
  unsigned both[4];
  if constexpr (Tile::kDepthRows)
    gpu::load_matrix_transposed(both, tile.chunk(k + lane / 8 % 2 * 8 + lane % 8, n / 8 + lane / 16));
  else
    gpu::load_matrix(both, tile.chunk(lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2) + n * Tile::kColumns);
  b[0][0] = both[0], b[0][1] = both[1], b[1][0] = both[2], b[1][1] = both[3];
}

// A float as one TF32 number, or as the sum of two.
template <bool kExact>
struct Split {
  unsigned high, low = 0;
  GPU_INLINE Split() {}
  GPU_INLINE explicit Split(float x) : high(gpu::round_to_tf32(x)) {
    if constexpr (kExact) low = gpu::round_to_tf32(x - gpu::float_of_tf32(high));
  }
};

// sum[m][n] += 16 x 8 blocks of left x right of one warp, over one step of the depth from k on.
template <class Math, int kBlocksM, int kBlocksN, class Left, class Right>
GPU_INLINE void multiply_step(
    float (&sum)[kBlocksM][kBlocksN][4], const Left& left, const Right& right, int first_m, int first_n, int k) {
  using T = typename Math::T;
  if constexpr (sizeof(T) == 2) {
    unsigned a[kBlocksM][4], b[kBlocksN][2];
#pragma unroll
    for (int m = 0; m < kBlocksM; ++m) left_fragment(left, first_m + m * 16, k, a[m]);
#pragma unroll
    for (int n = 0; n < kBlocksN; n += 2)
      right_fragments(right, first_n + n * 8, k, reinterpret_cast<unsigned(&)[2][2]>(b[n]));
#pragma unroll
    for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
      for (int n = 0; n < kBlocksN; ++n) gpu::multiply_add(T{}, sum[m][n], a[m], b[n]);
  } else {
    const int line = threadIdx.x % 32 / 4, step = threadIdx.x % 4;
    Split<Math::kExact> b[kBlocksN][2];
#pragma unroll
    for (int n = 0; n < kBlocksN; ++n)
#pragma unroll
      for (int q = 0; q < 2; ++q)
        b[n][q] = Split<Math::kExact>(right.at(first_n + n * 8 + line, k + step + q * 4));
#pragma unroll
    for (int m = 0; m < kBlocksM; ++m) {
      unsigned high[4], low[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const Split<Math::kExact> a(left.at(first_m + m * 16 + line + q % 2 * 8, k + step + q / 2 * 4));
        high[q] = a.high, low[q] = a.low;
      }
#pragma unroll
      for (int n = 0; n < kBlocksN; ++n) {
        const unsigned b_high[2] = {b[n][0].high, b[n][1].high}, b_low[2] = {b[n][0].low, b[n][1].low};
        if constexpr (Math::kExact) {
          float small[4] = {};
          gpu::multiply_add(T{}, small, low, b_high);
          gpu::multiply_add(T{}, small, high, b_low);
          // What is infinite has no lower part: infinite - infinite.
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][n][i] += small[i] == small[i] ? small[i] : 0.f;
        }
        gpu::multiply_add(T{}, sum[m][n], high, b_high);
      }
    }
  }
}

}  // namespace fastdcgan::cuda
