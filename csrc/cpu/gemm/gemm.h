// C[m][n] (+)= sum over k of A[m][k]*B[k][n] in float: the inner loop of every contraction.
//
// B lies in panels of kPanel columns, row after row; a last panel of at most kWidth columns has rows of kWidth. A is
// read one lane at a time, from rows that are a fixed `kRowStride` apart: rows of pixels that were gathered
// (kDepthStride), or columns of a panel (1). A lane is a float, or a pair of bfloat16 that lies in one (`Product`).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/elementwise/vectors.h"

namespace fastdcgan::cpu {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kKernelRows = 12;  // two vectors each: 24 accumulators in 32 registers
#else
constexpr int kKernelRows = 6;  // 12 of 16
#endif
constexpr int64_t kPanel = kStep;
constexpr int64_t kDepth = 256;  // between two visits of C: a panel of B stays in the first-level cache
constexpr int64_t kDepthStride = kDepth + kPanel;  // no power of two: the rows of a tile would share cache sets

// kWidth floats; ATen's class of them does not stay in registers when it is kept in an array.
typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
typedef float UnalignedFloats __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
inline void store(float* p, Floats x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }

typedef float Lane __attribute__((may_alias));

// What is added to every sum of a row: a lane of A times those of a row of B. DotProduct (dot_products.h) is the other.
struct FloatProduct {
  static constexpr int64_t kElements = 1;  // of a lane
  static Floats add(Floats sum, float x, Floats row) { return sum + x * row; }
};

// A stretch along k that is contiguous in both operands: where it starts in A and in B, in steps along k.
struct Piece {
  int64_t a, b, depth;
};

struct Tile {
  const Lane* a;
  int64_t a_step;  // along k
  const Lane* b;   // a panel
  float* c;
  int64_t c_stride;
  const Piece* pieces;  // in elements
  int64_t count;
  bool add;
  const float* ahead =
      nullptr;  // where given, what is multiplied later, to be fetched: one address at every step along k
  int64_t ahead_step = 0;
};

template <class Product, int kRows, int kVectors, int64_t kRowStride, bool kAhead>
void multiply_tile(const Tile& t) {
  Floats sum[kRows][kVectors];
  const float* ahead = t.ahead;
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Floats{};
  for (const Piece* p = t.pieces; p != t.pieces + t.count; ++p) {
    const Lane* a = t.a + p->a / Product::kElements * t.a_step;
    const Lane* b = t.b + p->b / Product::kElements * (kVectors * kWidth);
    for (int64_t k = p->depth / Product::kElements; k > 0; --k) {
      if constexpr (kAhead) {
        __builtin_prefetch(ahead, /*for writing=*/0, /*second-level cache=*/2);
        ahead += t.ahead_step;
      }
      Floats row[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const float x = a[r * kRowStride];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Product::add(sum[r][v], x, row[v]);
      }
      a += t.a_step;
      b += kVectors * kWidth;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* c = t.c + r * t.c_stride + v * kWidth;
      store(c, t.add ? sum[r][v] + load(c) : sum[r][v]);  // added up last: sums of short sums round less
    }
}

// multiply_tile for 1 <= `rows` <= kKernelRows and a panel of `vectors` vectors.
template <int64_t kRowStride, class Product = FloatProduct>
void multiply(int64_t rows, int64_t vectors, const Tile& t) {
  using Kernel = void (*)(const Tile&);
  static constexpr auto kernels = []<int... r>(std::integer_sequence<int, r...>) {
    return std::array<std::array<Kernel, 4>, kKernelRows>{
        {{multiply_tile<Product, r + 1, 1, kRowStride, false>, multiply_tile<Product, r + 1, 2, kRowStride, false>,
          multiply_tile<Product, r + 1, 1, kRowStride, true>, multiply_tile<Product, r + 1, 2, kRowStride, true>}...}};
  }(std::make_integer_sequence<int, kKernelRows>{});
  kernels[rows - 1][vectors - 1 + (t.ahead ? 2 : 0)](t);
}

// `rows` cut into as few tiles as there can be, of about the same height.
struct Tiles {
  int64_t rows, count;

  explicit Tiles(int64_t rows) : rows(rows), count((rows + kKernelRows - 1) / kKernelRows) {}
  int64_t begin(int64_t i) const { return rows * i / count; }
  int64_t height(int64_t i) const { return begin(i + 1) - begin(i); }
};

// `columns` in panels: all but the last have kPanel columns.
struct Panels {
  int64_t columns, count, width;  // width: with the padding of the last

  explicit Panels(int64_t columns) : columns(columns), count((columns + kPanel - 1) / kPanel) {
    width = count * kPanel - (vectors(count - 1) == 1 ? kWidth : 0);
  }
  int64_t vectors(int64_t i) const { return i + 1 == count && columns - i * kPanel <= kWidth ? 1 : 2; }
};

// Rows of A by one panel of B.
template <int64_t kRowStride, class Product>
void multiply_rows(
    const Lane* a, int64_t rows, const Lane* panel, int64_t vectors, float* c, int64_t c_stride,
    const std::vector<Piece>& pieces, bool add) {
  const Tiles tiles(rows);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t row = tiles.begin(t);
    multiply<kRowStride, Product>(
        tiles.height(t), vectors,
        {a + row * kRowStride, 1, panel, c + row * c_stride, c_stride, pieces.data(),
         static_cast<int64_t>(pieces.size()), add});
  }
}

// How contractions multiply rows that were gathered: in float. DotProducts (dot_products.h) and TileProducts (tiles.h)
// are the other ways.
struct FloatProducts {
  using Element = float;
  static constexpr int64_t kBlockRows = 8 * kKernelRows;  // that are gathered together
  static constexpr int64_t kRowStride = kDepthStride;
  static constexpr int64_t kDepthUnit = 1;  // pieces begin and end at multiples of it
  static constexpr int64_t kTerms = 1;     // 2: operands lie as sums of two bfloat16 (split_bf16.h)

  // What a thread needs while it multiplies.
  struct Session {};

  // Rows that are written for `rows`, and how far apart those of `width` columns should lie.
  static int64_t whole_rows(int64_t rows) { return rows; }
  static int64_t sum_stride(int64_t width) { return width; }

  // Where element (k, n) of B lies in a panel of `width` columns.
  static int64_t place(int64_t k, int64_t n, int64_t width) { return k * width + n; }

  static void multiply(
      const float* a, int64_t rows, const float* panel, int64_t vectors, float* c, int64_t c_stride,
      const std::vector<Piece>& pieces, bool add) {
    multiply_rows<kRowStride, FloatProduct>(a, rows, panel, vectors, c, c_stride, pieces, add);
  }
};

template <class Products>
int64_t whole_units(int64_t depth) {
  return (depth + Products::kDepthUnit - 1) / Products::kDepthUnit * Products::kDepthUnit;
}

// Floats that gathered rows take.
template <class Products>
constexpr int64_t rows_size() {
  return Products::kBlockRows * Products::kRowStride * int64_t{sizeof(typename Products::Element)} /
         int64_t{sizeof(float)};
}

// Sets those to zero that are multiplied beside the first `rows`.
template <class Products>
void clear_rows(typename Products::Element* a, int64_t rows) {
  std::fill(
      a + rows * Products::kRowStride, a + Products::whole_rows(rows) * Products::kRowStride,
      typename Products::Element(0.f));
}

}  // namespace fastdcgan::cpu
