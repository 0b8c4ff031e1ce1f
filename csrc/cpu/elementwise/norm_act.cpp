// Activation of a normalised tensor, and the gradient of its input.
#include "cpu/elementwise/pass_rows.h"
#include "cpu/elementwise/passes.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kNonTemporalBytes = int64_t{1} << 22;

// act(s*y + t)
template <class Act, int kRows>
struct Forward {
  static constexpr int rows = kRows, sums = 0;
  static constexpr bool stores = true, reads_grad = false, non_temporal = true;
  struct Coef {
    V s, t, slope;
  };
  Act act;

  Coef load(const float* const* row, int64_t column) const {
    return {V::loadu(row[0] + column), V::loadu(row[1] + column), slope_row<kRows>(row, column)};
  }
  V operator()(const Coef& k, V y, V, V*) const {
    return at_columns<kRows>(act, k.slope).forward(at::vec::fmadd(y, k.s, k.t));
  }
};

// s*act'(s*y + t)*da, and + p*y + q where the statistics depend on y
template <class Act, int kRows>
struct Backward {
  static constexpr int rows = kRows, sums = 0;
  static constexpr bool kNormalised = kRows >= 4;
  static constexpr bool stores = true, reads_grad = true, non_temporal = false;
  struct Coef {
    V s, t, p, q, slope;
  };
  Act act;

  Coef load(const float* const* row, int64_t column) const {
    Coef k{V::loadu(row[0] + column), V::loadu(row[1] + column), V(0.f), V(0.f), slope_row<kRows>(row, column)};
    if constexpr (kNormalised) {
      k.p = V::loadu(row[2] + column);
      k.q = V::loadu(row[3] + column);
    }
    return k;
  }
  V operator()(const Coef& k, V y, V da, V*) const {
    const V dz = at_columns<kRows>(act, k.slope).derivative(at::vec::fmadd(y, k.s, k.t)) * da;
    if constexpr (kNormalised) {
      return at::vec::fmadd(k.s, dz, at::vec::fmadd(k.p, y, k.q));
    } else {
      return k.s * dz;
    }
  }
};

// A result that is larger than the caches of a core will be read from beyond them anyway: stored past them, its lines
// are not read first. Where it lies in whole aligned vectors, and not in the place of `y`.
bool past_caches(const Shape& s, const Memory& m, int64_t item_size) {
  const int64_t row = s.channels * item_size, vectors = kStep * item_size;
  return s.channels_last && m.out != m.y && s.groups * s.group_size() * item_size >= kNonTemporalBytes &&
         row % vectors == 0 && reinterpret_cast<uintptr_t>(m.out) % vectors == 0;
}

}  // namespace

bool norm_act_pass(const Shape& s, Memory m, c10::ScalarType dtype, const float* coef, int64_t rows, Activation a) {
  m.non_temporal = past_caches(s, m, static_cast<int64_t>(c10::elementSize(dtype)));
  return with_functor(a, rows, [&](auto act, auto constant) {
    constexpr int kRows = decltype(constant)::value % 2 ? decltype(constant)::value : 2;
    with_loop(Forward<decltype(act), kRows>{act}, dtype, [&](const InnerLoop& loop) { map(loop, s, m, coef); });
  });
}

bool norm_act_backward_pass(
    const Shape& s, Memory m, c10::ScalarType dtype, const float* coef, int64_t rows, Activation a) {
  return with_functor(a, rows, [&](auto act, auto constant) {
    const Backward<decltype(act), decltype(constant)::value> op{act};
    with_loop(op, dtype, [&](const InnerLoop& loop) { map(loop, s, m, coef); });
  });
}

}  // namespace fastdcgan::cpu
