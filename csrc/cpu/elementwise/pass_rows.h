// The inner loop of every pass: rows of elements, each with the same per-channel coefficients by column.
//
// An `Op` brings
//   rows                                   how many rows of coefficients it reads
//   sums                                   how many sums it accumulates
//   stores                                 whether it has a result for each element
//   reads_grad                             whether it reads a second tensor, `da`
//   non_temporal                           whether it can store past the caches (`Memory::non_temporal`)
//   Coef, load(row, column)                its coefficients for one vector of columns
//   operator()(Coef, y, da, V* sums)       the result for one vector of elements; adds to the sums
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "cpu/elementwise/passes.h"
#include "cpu/elementwise/vectors.h"

namespace fastdcgan::cpu {

template <class T>
struct Tensors {
  const T* y;
  const T* da;  // null where the op reads no gradient
  T* out;       // null where nothing is stored

  Tensors at(int64_t offset) const { return {y + offset, da ? da + offset : nullptr, out ? out + offset : nullptr}; }
};

// The first `columns` (whole steps) of `kRows` rows that are `stride` elements apart.
template <int kRows, bool kNonTemporal = false, class Op, class T>
inline void pass_rows(
    const Op& op, Tensors<T> t, const float* const* coef, float* const* sums, int64_t columns, int64_t stride) {
  constexpr int kSums = Op::sums;
  // Unrolled, so that what is indexed by row, half and sum stays in registers.
  for (int64_t column = 0; column < columns; column += kStep) {
    const typename Op::Coef k[2] = {op.load(coef, column), op.load(coef, column + kWidth)};
    V total[2][kSums ? kSums : 1];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 3
      for (int i = 0; i < kSums; ++i) total[h][i] = V(0.f);
    // All rows are read before any is written: rows 4 KiB apart would wait for each other.
    Lanes y[kRows], da[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      y[r] = read(t.y + r * stride + column);
      if constexpr (Op::reads_grad) da[r] = read(t.da + r * stride + column);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Lanes result;
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) result.half[h] = op(k[h], y[r].half[h], da[r].half[h], total[h]);
      if constexpr (Op::stores) {
        if constexpr (kNonTemporal) {
          write_non_temporal(t.out + r * stride + column, result);
        } else if (t.out) {
          write(t.out + r * stride + column, result);
        }
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < kSums; ++i) {
      const Lanes before = read(sums[i] + column);
      write(sums[i] + column, Lanes{{before.half[0] + total[0][i], before.half[1] + total[1][i]}});
    }
  }
}

// The last `n` < kStep columns of a row, in a copy that is a whole step long.
template <class Op, class T>
void pass_tail(const Op& op, Tensors<T> t, const float* const* coef, float* const* sums, int64_t n) {
  alignas(64) T y[kStep] = {}, da[kStep] = {}, out[kStep];
  alignas(64) float sum[Op::sums + 1][kStep] = {};
  float* rows[Op::sums + 1];
  for (int i = 0; i < Op::sums; ++i) rows[i] = sum[i];
  std::copy_n(t.y, n, y);
  if constexpr (Op::reads_grad) std::copy_n(t.da, n, da);
  pass_rows<1>(op, Tensors<T>{y, da, t.out ? out : nullptr}, coef, rows, kStep, kStep);
  if (t.out) std::copy_n(out, n, t.out);
  for (int i = 0; i < Op::sums; ++i)
    for (int64_t j = 0; j < n; ++j) sums[i][j] += sum[i][j];
}

template <class Op, class T>
void pass(
    const Op& op, Tensors<T> t, const float* const* coef, float* const* sums, int64_t rows, int64_t columns,
    int64_t stride) {
  const int64_t whole = columns - columns % kStep;
  int64_t r = 0;
  if constexpr (Op::sums > 0) {
    // Several rows at a time, for which the sums and the coefficients are then read once.
    for (; r + 4 <= rows; r += 4) pass_rows<4>(op, t.at(r * stride), coef, sums, whole, stride);
  }
  for (; r < rows; ++r) pass_rows<1>(op, t.at(r * stride), coef, sums, whole, stride);
  if (whole == columns) return;
  const float* tail_coef[kMaxRows] = {};
  float* tail_sums[kMaxSums] = {};
  for (int k = 0; k < Op::rows; ++k) tail_coef[k] = coef[k] + whole;
  for (int k = 0; k < Op::sums; ++k) tail_sums[k] = sums[k] + whole;
  for (r = 0; r < rows; ++r) pass_tail(op, t.at(r * stride + whole), tail_coef, tail_sums, columns - whole);
}

// `pass` of whole steps that stores past the caches.
template <class Op, class T>
void pass_non_temporal(
    const Op& op, Tensors<T> t, const float* const* coef, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) pass_rows<1, true>(op, t.at(r * stride), coef, nullptr, columns, stride);
  end_non_temporal();
}

// The loop of an op over tensors of T, for `map` and `reduce`. Keeps a pointer to `op`.
template <class Op, class T>
InnerLoop make_loop(const Op& op) {
  static_assert(Op::rows <= kMaxRows && Op::sums <= kMaxSums && kStep <= kMaxStep);
  const auto run = [](const void* self, Memory m, const float* const* coef, float* const* sums, int64_t rows,
                      int64_t columns, int64_t stride) {
    const Tensors<T> t{static_cast<const T*>(m.y), static_cast<const T*>(m.da), static_cast<T*>(m.out)};
    if constexpr (Op::non_temporal) {
      if (m.non_temporal) return pass_non_temporal(*static_cast<const Op*>(self), t, coef, rows, columns, stride);
    }
    pass(*static_cast<const Op*>(self), t, coef, sums, rows, columns, stride);
  };
  return {&op, run, Op::rows, Op::sums, kStep, sizeof(T)};
}

// Calls `f` with a zero of a dtype that the caller has checked.
template <class F>
void with_type(c10::ScalarType dtype, F&& f) {
  switch (dtype) {
    case c10::ScalarType::Float: return f(0.f);
    case c10::ScalarType::BFloat16: return f(c10::BFloat16(0.f));
    case c10::ScalarType::Half: return f(c10::Half(0.f));
    default: TORCH_INTERNAL_ASSERT(false, "dtype ", dtype);
  }
}

// Calls `f` with the inner loop of `op`.
template <class Op, class F>
void with_loop(const Op& op, c10::ScalarType dtype, F&& f) {
  with_type(dtype, [&](auto zero) { f(make_loop<Op, decltype(zero)>(op)); });
}

// Calls `f` with the functor of `a` and with `rows` as a constant. False if there is no such activation.
template <class F>
bool with_functor(Activation a, int64_t rows, F&& f) {
  const auto with = [&](const auto& act, auto two, auto four) { rows < 4 ? f(act, two) : f(act, four); };
  using std::integral_constant;
  if (rows % 2 == 0)
    return with_activation<V>(
        a.id, a.slope, [&](const auto& act) { with(act, integral_constant<int, 2>(), integral_constant<int, 4>()); });
  if (static_cast<ActId>(a.id) != ActId::leaky_relu) return false;
  with(LeakyReLU<V>(0.f), integral_constant<int, 3>(), integral_constant<int, 5>());
  return true;
}

// The functor for one vector of columns, of which an odd number of rows has the `slope`.
template <int kRows, class Act>
Act at_columns(Act act, V slope) {
  if constexpr (kRows % 2) act.slope = slope;
  return act;
}

// The last row of coefficients where that is a slope.
template <int kRows>
V slope_row(const float* const* row, int64_t column) {
  if constexpr (kRows % 2) return V::loadu(row[kRows - 1] + column);
  return V(0.f);
}

}  // namespace fastdcgan::cpu
