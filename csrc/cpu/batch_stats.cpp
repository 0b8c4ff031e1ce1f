// Mean and variance per channel, exact also where the mean is large against the deviation: values are shifted by the
// mean of those seen before, and blocks are combined by Chan's formula in double.
#include "../common/moments.h"
#include "passes.h"
#include "sweep.h"

namespace fastdcgan::cpu {
namespace {

// Sums of d = y - shift and of d^2.
struct Deviations {
  static constexpr int rows = 1, sums = 2;
  static constexpr bool stores = false, reads_grad = false;
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
  std::vector<Moments<double>> moments;

  explicit MomentsSink(int64_t channels) : shift(channels, 0.f), moments(channels) {}
  const float* coef() const override { return shift.data(); }
  int64_t stride() const override { return 0; }
  bool starts() const override { return true; }
  void start(int64_t c, const double* x, double count) override { shift[c] = static_cast<float>(x[0] / count); }
  void add(int64_t c, const double* x, double count) override {
    moments[c].merge(Moments<double>::from_sums(count, shift[c], x[0], x[1]));
    shift[c] = static_cast<float>(moments[c].mean);
  }
};

}  // namespace

void batch_stats_pass(const Shape& s, Memory m, c10::ScalarType dtype, float* stats) {
  with_sweep(Deviations{}, dtype, [&](const Sweep& sweep) {
    const int64_t chunks = chunk_count(sweep, s), row = s.groups * s.channels;
    std::vector<MomentsSink> sinks(s.groups * chunks, MomentsSink(s.channels));
    std::vector<Sink*> pointers;
    for (MomentsSink& sink : sinks) pointers.push_back(&sink);
    reduce(sweep, s, m, pointers);
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t c = 0; c < s.channels; ++c) {
        Moments<double> all;
        for (int64_t i = 0; i < chunks; ++i) all.merge(sinks[g * chunks + i].moments[c]);
        float* out = stats + g * s.channels + c;
        out[0] = static_cast<float>(all.mean);
        out[row] = static_cast<float>(all.m2 / all.count);
        out[2 * row] = static_cast<float>(all.m2 / (all.count - 1));
      }
    }
  });
}

}  // namespace fastdcgan::cpu
