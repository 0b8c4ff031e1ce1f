// Products of bfloat16 rows two by two in vectors, summed in float. For libraries of AVX-512 vectors: every processor
// with AVX512_BF16 has them.
#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include "cpu/bf16/avx512_bf16.h"
#include "cpu/bf16/pack_pairs.h"

namespace fastdcgan::cpu {

struct DotProduct {
  static constexpr int64_t kElements = 2;
  static Floats add(Floats sum, float x, Floats row) { return avx512_bf16::dot(sum, Floats(_mm512_set1_ps(x)), row); }
};

struct DotProducts {
  using Element = c10::BFloat16;
  static constexpr int64_t kTerms = 1;
  static constexpr int64_t kDepthUnit = DotProduct::kElements;
  static constexpr int64_t kBlockRows = 16 * kKernelRows;  // as many bytes as those of floats
  static constexpr int64_t kRowStride = kDepth + kPanel;   // no power of two

  struct Session {};

  static int64_t whole_rows(int64_t rows) { return rows; }
  static int64_t sum_stride(int64_t width) { return width; }
  static int64_t place(int64_t k, int64_t n, int64_t width) { return place_of_pair(k, n, width); }

  static void multiply(
      const Element* a, int64_t rows, const Element* panel, int64_t vectors, float* c, int64_t c_stride,
      const std::vector<Piece>& pieces, bool add) {
    multiply_rows<kRowStride / kDepthUnit, DotProduct>(
        reinterpret_cast<const Lane*>(a), rows, reinterpret_cast<const Lane*>(panel), vectors, c, c_stride, pieces,
        add);
  }
};

}  // namespace fastdcgan::cpu
