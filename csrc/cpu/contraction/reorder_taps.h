// The gradient of a weight from channels_last to contiguous: as many transposed matrices as it has rows.
#pragma once

#include <ATen/Parallel.h>

#include "cpu/elementwise/vectors.h"

namespace fastdcgan::cpu {

// Of so many taps: whole vectors of them. Of others PyTorch's copy is as fast.
inline bool can_reorder_taps(int64_t taps) { return taps % kWidth == 0; }

// [rows][taps][channels] to [rows][channels][taps].
inline void reorder_taps(const float* from, int64_t rows, int64_t taps, int64_t channels, float* to) {
  const int64_t whole = channels / kWidth * kWidth;
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* in = from + row * taps * channels;
      float* out = to + row * taps * channels;
      for (int64_t n = 0; n < whole; n += kWidth)
        for (int64_t i = 0; i < taps; i += kWidth)
          at::vec::transpose_mxn<float, kWidth, kWidth>(in + i * channels + n, channels, out + n * taps + i, taps);
      for (int64_t n = whole; n < channels; ++n)
        for (int64_t i = 0; i < taps; ++i) out[n * taps + i] = in[i * channels + n];
    }
  });
}

}  // namespace fastdcgan::cpu
