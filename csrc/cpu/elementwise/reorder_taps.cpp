#include "cpu/elementwise/reorder_taps.h"

#include <ATen/Parallel.h>

#include "cpu/elementwise/vectors.h"

namespace fastdcgan::cpu {

bool can_reorder_taps(int64_t taps) { return taps % kWidth == 0; }

void reorder_taps(const float* from, int64_t rows, int64_t taps, int64_t channels, float* to) {
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
