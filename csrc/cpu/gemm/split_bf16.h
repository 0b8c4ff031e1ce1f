// float as the sum of two bfloat16: x = high + low + rest, where |low| <= 2^-8 |x| and |rest| <= 2^-17 |x| unless the low term
// is a denormal number. A product is then high*high + high*low + low*high, and what is left out is at most 2^-15 of it
// (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations",
// 2019).
//
// An infinite x, or one that rounds to an infinite high term, makes sums that are infinite or NaN. So does NaN. Whoever
// multiplies such terms looks for such sums, and then takes floats as they are.
#pragma once

#include <c10/util/BFloat16.h>

#include <vector>

#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

inline void split(float x, c10::BFloat16& high, c10::BFloat16& low) {
  high = c10::BFloat16(x);
  low = c10::BFloat16(x - static_cast<float>(high));
}

// Exactly `n` of them.
inline void split(const float* from, int64_t n, c10::BFloat16* high, c10::BFloat16* low) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const Lanes x = read(from + i);
    write(high + i, x);
    const Lanes rounded = read(high + i);
    write(low + i, {{x.half[0] - rounded.half[0], x.half[1] - rounded.half[1]}});
  }
  for (; i < n; ++i) split(from[i], high[i], low[i]);
}

// The pieces of the three products, from those of one: the low terms of A lie `a_low` columns after the high ones, the low
// terms of B `b_low` rows after the high ones.
inline std::vector<Piece> three_products(const std::vector<Piece>& pieces, int64_t a_low, int64_t b_low) {
  std::vector<Piece> found;
  found.reserve(3 * pieces.size());
  for (const Piece& p : pieces) {
    found.push_back({p.a, p.b + b_low, p.depth});
    found.push_back({p.a + a_low, p.b, p.depth});
    found.push_back(p);
  }
  return found;
}

// Whether none of `n` is infinite or NaN.
inline bool all_finite(const float* x, int64_t n) {
  V zero(0.f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const V some = V::loadu(x + i);
    zero = zero + (some - some);
  }
  float rest = 0.f;
  for (; i < n; ++i) rest += x[i] - x[i];
  alignas(64) float lanes[kWidth];
  zero.store(lanes);
  for (const float lane : lanes) rest += lane;
  return rest == 0.f;
}

}  // namespace fastdcgan::cpu
