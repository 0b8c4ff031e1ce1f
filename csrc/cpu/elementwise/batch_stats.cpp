// Mean and variance per channel, exact also where the mean is large against the deviation: values are shifted by the
// mean of those seen before, and blocks are combined by Chan's formula in double.
#include "common/moments.h"
#include "cpu/elementwise/pass_rows.h"
#include "cpu/elementwise/passes.h"

namespace fastdcgan::cpu {
namespace {

// Sums of d = y - shift and of d^2.
struct Deviations {
  static constexpr int rows = 1, sums = 2;
  static constexpr bool stores = false, reads_grad = false, streams = false;
  struct Coef {
    V shift;
  };

  Coef load(const float* const* row, int64_t column) const { return {V::loadu(row[0] + column)}; }
  V operator()(const Coef& k, V y, V, V* total) const {
    const V d = y - k.shift;
    total[0] = total[0] + d;
    total[1] = at::vec::fmadd(d, d, total[1]);
    return d;
  }
};

struct MomentsSink final : Sink {
  std::vector<float> shift;
  std::vector<double> count, mean, m2;

  explicit MomentsSink(int64_t channels) : shift(channels), count(channels), mean(channels), m2(channels) {}
  const float* coef() const override { return shift.data(); }
  int64_t stride() const override { return 0; }
  bool starts() const override { return true; }
  void start(int64_t first, int64_t channels, const double* sums, double n) override {
    for (int64_t c = 0; c < channels; ++c) shift[first + c] = static_cast<float>(sums[c] / n);
  }
  void add(int64_t first, int64_t channels, const double* sums, double n) override {
    float* s = shift.data() + first;
    double *k = count.data() + first, *mu = mean.data() + first, *sq = m2.data() + first;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      Moments<double> all{k[c], mu[c], sq[c]};
      all.merge(Moments<double>::from_sums(n, s[c], sums[c], sums[channels + c]));
      k[c] = all.count;
      mu[c] = all.mean;
      sq[c] = all.m2;
      s[c] = static_cast<float>(all.mean);
    }
  }
};

// Writes the statistics of the values of all sinks of a group.
void combine(const MomentsSink* sinks, int64_t many, int64_t channels, float* out, int64_t row) {
  std::vector<Moments<double>> all(channels);
  for (int64_t i = 0; i < many; ++i) {
    const double *k = sinks[i].count.data(), *mu = sinks[i].mean.data(), *sq = sinks[i].m2.data();
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) all[c].merge({k[c], mu[c], sq[c]});
  }
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<float>(all[c].mean);
    out[row + c] = static_cast<float>(all[c].m2 / all[c].count);
    out[2 * row + c] = static_cast<float>(all[c].m2 / (all[c].count - 1));
  }
}

}  // namespace

void batch_stats_pass(const Shape& s, Memory m, c10::ScalarType dtype, float* stats) {
  with_sweep(Deviations{}, dtype, [&](const Sweep& sweep) {
    const int64_t chunks = chunk_count(sweep, s);
    std::vector<MomentsSink> sinks(s.groups * chunks, MomentsSink(s.channels));
    std::vector<Sink*> pointers;
    for (MomentsSink& sink : sinks) pointers.push_back(&sink);
    reduce(sweep, s, m, pointers);
    for (int64_t g = 0; g < s.groups; ++g)
      combine(sinks.data() + g * chunks, chunks, s.channels, stats + g * s.channels, s.groups * s.channels);
  });
}

}  // namespace fastdcgan::cpu
