// The sums that the gradient of a normalisation needs, with or without the tensor that is summed.
#include "cpu/elementwise/pass_rows.h"
#include "cpu/elementwise/passes.h"

namespace fastdcgan::cpu {
namespace {

// g = da*act'(s*y + t); sums of g and of g*(y - mean)*rstd
template <class Act, bool kNormalised>
struct GradSums {
  static constexpr int rows = kNormalised ? 4 : 2, sums = kNormalised ? 2 : 1;
  static constexpr bool stores = true, reads_grad = true, streams = false;
  struct Coef {
    V s, t, mean, rstd;
  };
  Act act;

  Coef load(const float* const* row, int64_t column) const {
    Coef k{V::loadu(row[0] + column), V::loadu(row[1] + column), V(0.f), V(0.f)};
    if constexpr (kNormalised) {
      k.mean = V::loadu(row[2] + column);
      k.rstd = V::loadu(row[3] + column);
    }
    return k;
  }
  V operator()(const Coef& k, V y, V da, V* total) const {
    const V g = da * act.derivative(at::vec::fmadd(y, k.s, k.t));
    total[0] = total[0] + g;
    if constexpr (kNormalised) total[1] = at::vec::fmadd(g, (y - k.mean) * k.rstd, total[1]);
    return g;
  }
};

struct SumSink final : Sink {
  const float* coef_;
  int64_t stride_;
  int sums;
  std::vector<double> totals;  // [sums, channels]

  SumSink(const float* coef, int64_t stride, int sums, int64_t channels)
      : coef_(coef), stride_(stride), sums(sums), totals(sums * channels) {}
  const float* coef() const override { return coef_; }
  int64_t stride() const override { return stride_; }
  void add(int64_t first, int64_t channels, const double* x, double) override {
    const int64_t all = static_cast<int64_t>(totals.size()) / sums;
    for (int i = 0; i < sums; ++i)
      for (int64_t c = 0; c < channels; ++c) totals[i * all + first + c] += x[i * channels + c];
  }
};

void run(const Sweep& sweep, const Shape& s, Memory m, const float* coef, float* out) {
  const int64_t stride = s.groups * s.channels, chunks = chunk_count(sweep, s);
  std::vector<SumSink> sinks;
  std::vector<Sink*> pointers;
  for (int64_t i = 0; i < s.groups * chunks; ++i)
    sinks.emplace_back(coef + (i / chunks) * s.channels, stride, sweep.sums, s.channels);
  for (SumSink& sink : sinks) pointers.push_back(&sink);
  reduce(sweep, s, m, pointers);
  std::vector<double> total(sweep.sums * s.channels);
  for (int64_t g = 0; g < s.groups; ++g) {
    std::fill(total.begin(), total.end(), 0.);
    for (int64_t i = 0; i < chunks; ++i)
      for (size_t k = 0; k < total.size(); ++k) total[k] += sinks[g * chunks + i].totals[k];
    for (int k = 0; k < sweep.sums; ++k)
      for (int64_t c = 0; c < s.channels; ++c)
        out[k * stride + g * s.channels + c] = static_cast<float>(total[k * s.channels + c]);
  }
}

}  // namespace

bool grad_sums_pass(
    const Shape& s, Memory m, c10::ScalarType dtype, const float* coef, int64_t rows, Activation a, float* sums) {
  const auto run_sweep = [&](const Sweep& sweep) { run(sweep, s, m, coef, sums); };
  return with_activation<V>(a.id, a.slope, [&](auto act) {
    if (rows == 4) {
      with_sweep(GradSums<decltype(act), true>{act}, dtype, run_sweep);
    } else {
      with_sweep(GradSums<decltype(act), false>{act}, dtype, run_sweep);
    }
  });
}

}  // namespace fastdcgan::cpu
