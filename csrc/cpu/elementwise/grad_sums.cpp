// The sums that the gradient of a normalisation needs, with or without the tensor that is summed.
#include "cpu/elementwise/pass_rows.h"
#include "cpu/elementwise/passes.h"

namespace fastdcgan::cpu {
namespace {

// g = da*act'(s*y + t); sums of g and of g*(y - mean)*rstd: of g as T stores it where it is stored, since a difference
// to its own mean is taken of it. An odd number of rows also has the sum of da*min(z, 0), the gradient of the slope.
template <class T, class Act, int kRows>
struct GradSums {
  static constexpr int rows = kRows, sums = (kRows + 1) / 2;
  static constexpr bool kNormalised = kRows >= 4;
  static constexpr bool stores = true, reads_grad = true, non_temporal = false;
  struct Coef {
    V s, t, mean, rstd, slope;
  };
  Act act;
  bool stored;

  Coef load(const float* const* row, int64_t column) const {
    Coef k{V::loadu(row[0] + column), V::loadu(row[1] + column), V(0.f), V(0.f), slope_row<kRows>(row, column)};
    if constexpr (kNormalised) {
      k.mean = V::loadu(row[2] + column);
      k.rstd = V::loadu(row[3] + column);
    }
    return k;
  }
  V operator()(const Coef& k, V y, V da, V* total) const {
    const V z = at::vec::fmadd(y, k.s, k.t);
    V g = da * at_columns<kRows>(act, k.slope).derivative(z);
    if (stored) g = rounded<T>(g);
    total[0] = total[0] + g;
    if constexpr (kNormalised) total[1] = at::vec::fmadd(g, (y - k.mean) * k.rstd, total[1]);
    if constexpr (kRows % 2) total[sums - 1] = total[sums - 1] + Math<V>::if_positive(z, V(0.f), da * z);
    return g;
  }
};

struct SumAccumulator final : Accumulator {
  const float* coef_;
  int64_t stride_;
  int sums;
  std::vector<double> totals;  // [sums, channels]

  SumAccumulator(const float* coef, int64_t stride, int sums, int64_t channels)
      : coef_(coef), stride_(stride), sums(sums), totals(sums * channels) {}
  const float* coef() const override { return coef_; }
  int64_t stride() const override { return stride_; }
  void add(int64_t first, int64_t channels, const double* x, double) override {
    const int64_t all = static_cast<int64_t>(totals.size()) / sums;
    for (int i = 0; i < sums; ++i)
      for (int64_t c = 0; c < channels; ++c) totals[i * all + first + c] += x[i * channels + c];
  }
};

void run(const InnerLoop& loop, const Shape& s, Memory m, const float* coef, float* out) {
  const int64_t stride = s.groups * s.channels, chunks = chunk_count(loop, s);
  std::vector<SumAccumulator> accumulators;
  std::vector<Accumulator*> pointers;
  for (int64_t i = 0; i < s.groups * chunks; ++i)
    accumulators.emplace_back(coef + (i / chunks) * s.channels, stride, loop.sums, s.channels);
  for (SumAccumulator& accumulator : accumulators) pointers.push_back(&accumulator);
  reduce(loop, s, m, pointers);
  std::vector<double> total(loop.sums * s.channels);
  for (int64_t g = 0; g < s.groups; ++g) {
    std::fill(total.begin(), total.end(), 0.);
    for (int64_t i = 0; i < chunks; ++i)
      for (size_t k = 0; k < total.size(); ++k) total[k] += accumulators[g * chunks + i].totals[k];
    for (int k = 0; k < loop.sums; ++k)
      for (int64_t c = 0; c < s.channels; ++c)
        out[k * stride + g * s.channels + c] = static_cast<float>(total[k * s.channels + c]);
  }
}

}  // namespace

bool grad_sums_pass(
    const Shape& s, Memory m, c10::ScalarType dtype, const float* coef, int64_t rows, Activation a, float* sums) {
  return with_functor(a, rows, [&](auto act, auto constant) {
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      const GradSums<T, decltype(act), decltype(constant)::value> op{act, m.out != nullptr};
      run(make_loop<std::decay_t<decltype(op)>, T>(op), s, m, coef, sums);
    });
  });
}

}  // namespace fastdcgan::cpu
