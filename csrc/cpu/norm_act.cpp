// Activation of a normalised tensor, its gradient, and the sums that the gradient of the normalisation needs.
#include "dispatch.h"
#include "passes.h"
#include "sweep.h"

namespace fastdcgan::cpu {
namespace {

// act(s*y + t)
template <class Act>
struct Forward {
  static constexpr int rows = 2, sums = 0;
  static constexpr bool stores = true, reads_grad = false;
  struct Coef {
    V s, t;
  };
  Act act;

  Coef load(const float* const* row, int64_t column) const {
    return {V::loadu(row[0] + column), V::loadu(row[1] + column)};
  }
  V operator()(const Coef& k, V y, V, V*) const { return act.forward(at::vec::fmadd(y, k.s, k.t)); }
};

// s*act'(s*y + t)*da, and + p*y + q where the statistics depend on y
template <class Act, bool kNormalised>
struct Backward {
  static constexpr int rows = kNormalised ? 4 : 2, sums = 0;
  static constexpr bool stores = true, reads_grad = true;
  struct Coef {
    V s, t, p, q;
  };
  Act act;

  Coef load(const float* const* row, int64_t column) const {
    Coef k{V::loadu(row[0] + column), V::loadu(row[1] + column), V(0.f), V(0.f)};
    if constexpr (kNormalised) {
      k.p = V::loadu(row[2] + column);
      k.q = V::loadu(row[3] + column);
    }
    return k;
  }
  V operator()(const Coef& k, V y, V da, V*) const {
    const V dz = act.derivative(at::vec::fmadd(y, k.s, k.t)) * da;
    if constexpr (kNormalised) {
      return at::vec::fmadd(k.s, dz, at::vec::fmadd(k.p, y, k.q));
    } else {
      return k.s * dz;
    }
  }
};

// g = da*act'(s*y + t); sums of g and of g*(y - mean)*rstd
template <class Act, bool kNormalised>
struct GradSums {
  static constexpr int rows = kNormalised ? 4 : 2, sums = kNormalised ? 2 : 1;
  static constexpr bool stores = true, reads_grad = true;
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

template <int kSums>
struct SumSink {
  static constexpr bool starts = false;
  const float* coef_;
  int64_t stride_;
  std::vector<double> totals;  // [channels, kSums]

  SumSink(const float* coef, int64_t stride, int64_t channels)
      : coef_(coef), stride_(stride), totals(channels * kSums) {}
  const float* coef() const { return coef_; }
  int64_t stride() const { return stride_; }
  void add(int64_t c, const double* x, double) {
    for (int i = 0; i < kSums; ++i) totals[c * kSums + i] += x[i];
  }
};

template <class Op, class T>
void run_sums(const Op& op, const Shape& s, Tensors<T> t, const float* coef, float* out) {
  const int64_t stride = s.groups * s.channels, chunks = chunk_count(s);
  using Sink = SumSink<Op::sums>;
  std::vector<Sink> sinks;
  for (int64_t i = 0; i < s.groups * chunks; ++i)
    sinks.emplace_back(coef + (i / chunks) * s.channels, stride, s.channels);
  reduce(op, s, t, sinks);
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int k = 0; k < Op::sums; ++k) {
        double total = 0;
        for (int64_t i = 0; i < chunks; ++i) total += sinks[g * chunks + i].totals[c * Op::sums + k];
        out[k * stride + g * s.channels + c] = static_cast<float>(total);
      }
    }
  }
}

}  // namespace

bool norm_act_pass(const Shape& s, Memory m, const float* coef, Activation a) {
  return with_activation<V>(a.id, a.slope, [&](auto act) {
    with_tensors(m, [&](auto t) { map(Forward<decltype(act)>{act}, s, t, coef); });
  });
}

bool norm_act_backward_pass(const Shape& s, Memory m, const float* coef, int64_t rows, Activation a) {
  return with_activation<V>(a.id, a.slope, [&](auto act) {
    with_tensors(m, [&](auto t) {
      if (rows == 4) {
        map(Backward<decltype(act), true>{act}, s, t, coef);
      } else {
        map(Backward<decltype(act), false>{act}, s, t, coef);
      }
    });
  });
}

bool grad_sums_pass(const Shape& s, Memory m, const float* coef, int64_t rows, Activation a, float* sums) {
  return with_activation<V>(a.id, a.slope, [&](auto act) {
    with_tensors(m, [&](auto t) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(t.y)>>;
      if (rows == 4) {
        run_sums<GradSums<decltype(act), true>, T>({act}, s, t, coef, sums);
      } else {
        run_sums<GradSums<decltype(act), false>, T>({act}, s, t, coef, sums);
      }
    });
  });
}

}  // namespace fastdcgan::cpu
