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
  static constexpr bool stores = false, reads_grad = false, non_temporal = false;
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

struct MomentsAccumulator final : Accumulator {
  std::vector<float> shift;
  std::vector<double> count, mean, m2;

  explicit MomentsAccumulator(int64_t channels) : shift(channels), count(channels), mean(channels), m2(channels) {}
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

// Writes the statistics of the values of all accumulators of a group.
void combine(const MomentsAccumulator* accumulators, int64_t many, int64_t channels, float* out, int64_t row) {
  std::vector<Moments<double>> all(channels);
  for (int64_t i = 0; i < many; ++i) {
    const double *k = accumulators[i].count.data(), *mu = accumulators[i].mean.data(), *sq = accumulators[i].m2.data();
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
  with_loop(Deviations{}, dtype, [&](const InnerLoop& loop) {
    const int64_t chunks = chunk_count(loop, s);
    std::vector<MomentsAccumulator> accumulators(s.groups * chunks, MomentsAccumulator(s.channels));
    std::vector<Accumulator*> pointers;
    for (MomentsAccumulator& accumulator : accumulators) pointers.push_back(&accumulator);
    reduce(loop, s, m, pointers);
    for (int64_t g = 0; g < s.groups; ++g)
      combine(accumulators.data() + g * chunks, chunks, s.channels, stats + g * s.channels, s.groups * s.channels);
  });
}

}  // namespace fastdcgan::cpu
