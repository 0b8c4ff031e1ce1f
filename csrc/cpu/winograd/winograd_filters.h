// Minimal filters F(outputs, taps) along an axis: outputs = A^T [(G taps) * (B^T inputs)], and the gradient of the
// taps, G^T [(A outputs) * (B^T inputs)].
#pragma once

#include "cpu/gemm/gemm.h"
#include "cpu/winograd/winograd.h"

namespace fastdcgan::cpu {

// At two points of one distance to 0, from the powers of x that are even and those that are odd (or the reverse).
[[gnu::always_inline]] inline void pair(Floats even, Floats odd, Floats* to) {
  to[0] = even + odd;
  to[1] = even - odd;
}

// F(2, 2): three products for four,
//
//   y0 = d0*g0 + d1*g1 = (d0 - d1)*g0 + d1*(g0 + g1)
//   y1 = d1*g0 + d2*g1 = d1*(g0 + g1) + (d2 - d1)*g1
//
// all with factors of 1: the rounding is about that of plain sums.
struct F22 {
  static constexpr int kTaps = 2, kOutputs = 2, kSide = 3;  // kSide: inputs of a tile, and products
  static constexpr int64_t kDepth = cpu::kDepth;            // channels of a sum, before it is added to others
  static constexpr int64_t kTileDepth = cpu::kDepth;        // tiles of a sum of a weight's gradient, likewise

  [[gnu::always_inline]] static void input(const Floats* d, Floats* to) {
    to[0] = d[0] - d[1];
    to[1] = d[1];
    to[2] = d[2] - d[1];
  }
  [[gnu::always_inline]] static void weight(const Floats* g, Floats* to) {
    to[0] = g[0];
    to[1] = g[0] + g[1];
    to[2] = g[1];
  }
  [[gnu::always_inline]] static void output(const Floats* m, Floats* to) {
    to[0] = m[0] + m[1];
    to[1] = m[1] + m[2];
  }
  [[gnu::always_inline]] static void output_adjoint(const Floats* y, Floats* to) { weight(y, to); }
  [[gnu::always_inline]] static void weight_adjoint(const Floats* m, Floats* to) { output(m, to); }
};

// F(4, 2): five products for eight, at the points a, -a, b, -b and infinity. Of those tried these
// round least: 0, 1, -1, 1/2 and infinity err twice as much.
struct F42 {
  static constexpr int kTaps = 2, kOutputs = 4, kSide = 5;
  static constexpr int64_t kDepth = cpu::kDepth, kTileDepth = cpu::kDepth / 2;
  static constexpr float a = 1.375f, b = 0.375f, aa = a * a, bb = b * b;
  static constexpr float ga = 1 / (2 * a * (aa - bb)), gb = 1 / (2 * b * (bb - aa));

  [[gnu::always_inline]] static void input(const Floats* d, Floats* to) {
    const Floats even = d[2] - bb * d[0];
    pair(d[3] - bb * d[1], a * even, to);
    pair(d[3] - aa * d[1], b * (d[2] - aa * d[0]), to + 2);
    to[4] = d[4] - bb * d[2] - aa * even;
  }
  [[gnu::always_inline]] static void weight(const Floats* g, Floats* to) {
    pair((ga * a) * g[1], ga * g[0], to);
    pair((gb * b) * g[1], gb * g[0], to + 2);
    to[4] = g[1];
  }
  [[gnu::always_inline]] static void output(const Floats* m, Floats* to) {
    const Floats a_even = m[0] + m[1], a_odd = m[0] - m[1], b_even = m[2] + m[3], b_odd = m[2] - m[3];
    to[0] = a_even + b_even;
    to[1] = a * a_odd + b * b_odd;
    to[2] = aa * a_even + bb * b_even;
    to[3] = (aa * a) * a_odd + (bb * b) * b_odd + m[4];
  }
  [[gnu::always_inline]] static void output_adjoint(const Floats* y, Floats* to) {
    pair(y[0] + aa * y[2], a * (y[1] + aa * y[3]), to);
    pair(y[0] + bb * y[2], b * (y[1] + bb * y[3]), to + 2);
    to[4] = y[3];
  }
  [[gnu::always_inline]] static void weight_adjoint(const Floats* m, Floats* to) {
    to[0] = ga * (m[0] - m[1]) + gb * (m[2] - m[3]);
    to[1] = (ga * a) * (m[0] + m[1]) + (gb * b) * (m[2] + m[3]) + m[4];
  }
};

// F(4, 3): six products for twelve, at the points 0, a, -a, b, -b and infinity. Points of equal distances to 0 that
// differ by a factor of two round least (Barabasz et al., Error Analysis and Improving the Accuracy of Winograd
// Convolution for Deep Neural Networks, 2020): with 1 and 2 the error is twice as large. Sums are cut short for their
// rounding's sake too.
struct F43 {
  static constexpr int kTaps = 3, kOutputs = 4, kSide = 6;
  static constexpr int64_t kDepth = cpu::kDepth / 2, kTileDepth = cpu::kDepth / 4;
  static constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b;
  static constexpr float ga = 1 / (2 * aa * (aa - bb)), gb = 1 / (2 * bb * (bb - aa)), g0 = 1 / (aa * bb);

  [[gnu::always_inline]] static void input(const Floats* d, Floats* to) {
    to[0] = d[4] - (aa + bb) * d[2] + (aa * bb) * d[0];
    pair(d[4] - bb * d[2], a * (d[3] - bb * d[1]), to + 1);
    pair(d[4] - aa * d[2], b * (d[3] - aa * d[1]), to + 3);
    to[5] = d[5] - (aa + bb) * d[3] + (aa * bb) * d[1];
  }
  [[gnu::always_inline]] static void weight(const Floats* g, Floats* to) {
    to[0] = g0 * g[0];
    pair(ga * (g[0] + aa * g[2]), (ga * a) * g[1], to + 1);
    pair(gb * (g[0] + bb * g[2]), (gb * b) * g[1], to + 3);
    to[5] = g[2];
  }
  [[gnu::always_inline]] static void output(const Floats* m, Floats* to) {
    const Floats a_even = m[1] + m[2], a_odd = m[1] - m[2], b_even = m[3] + m[4], b_odd = m[3] - m[4];
    to[0] = m[0] + a_even + b_even;
    to[1] = a * a_odd + b * b_odd;
    to[2] = aa * a_even + bb * b_even;
    to[3] = (aa * a) * a_odd + (bb * b) * b_odd + m[5];
  }
  [[gnu::always_inline]] static void output_adjoint(const Floats* y, Floats* to) {
    to[0] = y[0];
    pair(y[0] + aa * y[2], a * (y[1] + aa * y[3]), to + 1);
    pair(y[0] + bb * y[2], b * (y[1] + bb * y[3]), to + 3);
    to[5] = y[3];
  }
  [[gnu::always_inline]] static void weight_adjoint(const Floats* m, Floats* to) {
    const Floats a_even = ga * (m[1] + m[2]), b_even = gb * (m[3] + m[4]);
    to[0] = g0 * m[0] + a_even + b_even;
    to[1] = (ga * a) * (m[1] - m[2]) + (gb * b) * (m[3] - m[4]);
    to[2] = aa * a_even + bb * b_even + m[5];
  }
};

// `run(filter)` with the filter of so many outputs along an axis for a contraction that can run.
template <int kOutputs, class Run>
void with_filter(const Contraction& c, const Run& run) {
  if constexpr (kOutputs == 2) {
    run(F22{});
  } else if (c.y.kernel == 2 * c.y.stride) {
    run(F42{});
  } else {
    run(F43{});
  }
}

// A filter's transform kLine of kIn x kIn vectors to kOut x kOut, along both axes.
template <auto kLine, int kIn, int kOut, class Load, class Store>
[[gnu::always_inline]] inline void transform(const Load& load, const Store& store) {
  Floats half[kOut][kIn];
#pragma GCC unroll 6
  for (int j = 0; j < kIn; ++j) {
    Floats from[kIn], to[kOut];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) from[i] = load(i, j);
    kLine(from, to);
#pragma GCC unroll 6
    for (int i = 0; i < kOut; ++i) half[i][j] = to[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kOut; ++i) {
    Floats to[kOut];
    kLine(half[i], to);
#pragma GCC unroll 6
    for (int j = 0; j < kOut; ++j) store(i, j, to[j]);
  }
}

}  // namespace fastdcgan::cpu
