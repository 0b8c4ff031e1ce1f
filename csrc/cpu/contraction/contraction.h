// The three contractions over raw channels_last memory. Shapes and formulas: fastdcgan/backends/base.py.
//
// Whatever the dtype of the tensors, products are summed in float: operands are widened while they are gathered into
// blocks that stay in the cache. Sums have the same order for any number of threads.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/core/Storage.h>

#include <cstdint>

#include "cpu/contraction/taps.h"
#include "cpu/elementwise/passes.h"

namespace fastdcgan::cpu {

// `in` [batch, y.in, x.in, in_channels] -> `out` [batch, y.out, x.out, out_channels].
struct Contraction {
  int64_t batch, in_channels, out_channels;
  Axis y, x;
  bool contiguous = false;  // a weight's gradient is, and not channels_last: of an algorithm that can have it so

  int64_t taps() const { return y.kernel * x.kernel; }
};

// A weight as it lies: element (k, n, ky, kx) for input channel k and output channel n, by strides. Where `bytes` is
// given, it lies in so many from `data` on; where its storage is given as well, its packed form may be cached
// (packed_weights.h). A `wide` weight, whose bytes are given, has floats as elements, which count as rounded to the
// dtype of the tensors (round_weight.h).
struct Weight {
  const void* data;
  int64_t k, n, y, x;
  const c10::Storage* storage = nullptr;
  int64_t bytes = 0;
  bool wide = false;
};

// What happens to the sums before they are stored: act(scale*sum + shift) with the scale and the shift of each channel
// where they are given; and where `stats` is given, mean, biased and unbiased variance [3, groups, out_channels] of the
// sums.
struct Epilogue {
  const float *scale = nullptr, *shift = nullptr;
  Activation act{0, 0.f};
  float* stats = nullptr;
  int64_t stat_groups = 1;
};

}  // namespace fastdcgan::cpu
