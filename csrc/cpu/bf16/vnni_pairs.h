// Rows of bfloat16 two by two, as instructions that add products of pairs want the rows of B; transposed, those of A.
// Needs AVX-512.
#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace fastdcgan::cpu {

constexpr int64_t kPairs = 16;  // of a vector

// to[2i] = first[i] for i < n_first, to[2i + 1] = second[i] for i < n_second, else 0, for `width` pairs: a multiple
// of 16.
inline void interleave(
    const c10::BFloat16* first, int64_t n_first, const c10::BFloat16* second, int64_t n_second, int64_t width,
    c10::BFloat16* to) {
  const auto some = [](const c10::BFloat16* from, int64_t i, int64_t n) {
    const auto mask = static_cast<__mmask16>((1u << std::clamp<int64_t>(n - i, 0, 16)) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + i));
  };
  for (int64_t i = 0; i < width; i += 16)
    _mm512_storeu_si512(
        to + 2 * i, _mm512_or_si512(some(first, i, n_first), _mm512_slli_epi32(some(second, i, n_second), 16)));
}

// to[column][row] = from[row][column], for pairs, of which there are at most 16 in a row and in a column. Strides are
// in single elements.
inline void transpose_vnni_pairs(
    const c10::BFloat16* from, int64_t from_stride, c10::BFloat16* to, int64_t to_stride, int64_t rows,
    int64_t columns) {
  const auto row_mask = static_cast<__mmask16>((1u << rows) - 1),
             column_mask = static_cast<__mmask16>((1u << columns) - 1);
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    a[i] = i < rows ? _mm512_maskz_loadu_epi32(column_mask, from + i * from_stride) : _mm512_setzero_si512();
  // Within each quarter of a vector: blocks of 2x2, then of 4x4.
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Then the quarters.
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const __m512i left = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), right = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
    const __m512i left2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i right2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
    b[j] = _mm512_shuffle_i32x4(left, left2, 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(left, left2, 0xdd);
    b[8 + j] = _mm512_shuffle_i32x4(right, right2, 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(right, right2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (i < columns) _mm512_mask_storeu_epi32(to + i * to_stride, row_mask, b[i]);
}

}  // namespace fastdcgan::cpu
