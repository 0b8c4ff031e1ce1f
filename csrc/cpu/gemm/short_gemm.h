// C[m][n] (+)= sum over k of A[m][k]*B[k][n] in float where k is short or m are few: tiles are as wide as registers
// allow, up to 4 vectors, and both strides of A are free, so that it is read where it lies.
#pragma once

#include <array>
#include <utility>

#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kMaxVectors = 4;
constexpr int max_rows(int64_t vectors) { return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6; }  // 24 sums of 32 registers
#else
constexpr int kMaxVectors = 2;
constexpr int max_rows(int64_t vectors) { return vectors == 1 ? 12 : 6; }  // 12 of 16
#endif

struct ShortTile {
  const float* a;
  int64_t a_row, a_step;  // from one row to the next; along k
  const float* b;
  int64_t b_step;
  float* c;
  int64_t c_stride;
  const Piece* pieces;  // where they start: in A in floats, in B in steps
  int64_t count;
  bool add;
};

// kDeep: small tiles sum even and odd k apart, since one chain of sums would wait for itself; so bits depend on the
// tile.
template <int kRows, int kVectors, bool kDeep>
void multiply_short_tile(const ShortTile& t) {
  constexpr int kGroups = (kRows + 2) / 3;  // of rows with one pointer: an address may have one stride, once or twice
  constexpr int kChains = kDeep && kRows * kVectors < 8 ? 2 : 1;
  float* const c = t.c;
  const int64_t c_stride = t.c_stride, a_row = t.a_row, a_step = t.a_step, b_step = t.b_step;
  Floats sum[kChains][kRows][kVectors];
#pragma GCC unroll 2
  for (int i = 0; i < kChains; ++i)
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[i][r][v] = i == 0 && t.add ? load(c + r * c_stride + v * kWidth) : Floats{};
  for (const Piece* p = t.pieces; p != t.pieces + t.count; ++p) {
    const float* a[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) a[g] = t.a + p->a + 3 * g * a_row;
    const float* b = t.b + p->b * b_step;
    const auto step = [&](Floats(&to)[kRows][kVectors]) {
      Floats row[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const float x = a[r / 3][r % 3 * a_row];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) to[r][v] += x * row[v];
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) a[g] += a_step;
      b += b_step;
    };
    int64_t k = p->depth;
    for (; k >= kChains; k -= kChains)
#pragma GCC unroll 2
      for (int i = 0; i < kChains; ++i) step(sum[i]);
    if (kChains == 2 && k > 0) step(sum[0]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store(c + r * c_stride + v * kWidth, kChains == 2 ? sum[0][r][v] + sum[kChains - 1][r][v] : sum[0][r][v]);
}

// multiply_short_tile for 1 <= `vectors` <= kMaxVectors and 1 <= `rows` <= max_rows(vectors).
template <bool kDeep = false>
void multiply_short(int64_t rows, int64_t vectors, const ShortTile& t) {
  using Kernel = void (*)(const ShortTile&);
  using Kernels = std::array<Kernel, max_rows(1)>;
  constexpr auto of_width = []<int kVectors, int... r>(std::integer_sequence<int, r...>) {
    return Kernels{multiply_short_tile<r + 1, kVectors, kDeep>...};
  };
  static constexpr auto kernels = [of_width]<int... v>(std::integer_sequence<int, v...>) {
    return std::array<Kernels, kMaxVectors>{
        of_width.template operator()<v + 1>(std::make_integer_sequence<int, max_rows(v + 1)>{})...};
  }(std::make_integer_sequence<int, kMaxVectors>{});
  kernels[vectors - 1][rows - 1](t);
}

// `n` cut into as few parts of at most `most` as there can be, of about the same size.
struct Parts {
  int64_t n, count;

  Parts(int64_t n, int64_t most) : n(n), count((n + most - 1) / most) {}
  int64_t begin(int64_t i) const { return n * i / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

// Columns in whole vectors, and these in parts for tiles.
struct WideColumns {
  int64_t width;
  Parts vectors;

  explicit WideColumns(int64_t columns)
      : width((columns + kWidth - 1) / kWidth * kWidth), vectors(width / kWidth, kMaxVectors) {}
  int64_t begin(int64_t i) const { return vectors.begin(i) * kWidth; }
};

}  // namespace fastdcgan::cpu
