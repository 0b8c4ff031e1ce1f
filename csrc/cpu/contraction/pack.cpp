#include "cpu/contraction/pack.h"

#include <ATen/Parallel.h>

#include "cpu/elementwise/pass_rows.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kBlock = 16;  // input channels that are packed together: all taps of them pass through the cache once

template <class T>
void pack(const Contraction& c, const Weight& w, float* to) {
  const Panels panels(c.out_channels);
  const DepthOrder order(c.y, c.x, c.in_channels, FloatProducts::kDepthUnit);
  const int64_t blocks = (c.in_channels + kBlock - 1) / kBlock, depth = order.rows();
  at::parallel_for(0, panels.count * blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / blocks, first = i % blocks * kBlock, last = std::min(first + kBlock, c.in_channels);
      const int64_t width = panels.vectors(panel) * kWidth, column = panel * kPanel;
      const int64_t columns = std::min(width, c.out_channels - column);
      const T* from = static_cast<const T*>(w.data) + column * w.n;
      float* panel_to = to + column * depth;
      for (int64_t ky = 0; ky < c.y.kernel; ++ky) {
        for (int64_t kx = 0; kx < c.x.kernel; ++kx) {
          const T* tap = from + ky * w.y + kx * w.x;
          float* row = panel_to + (order.row(ky, kx) + first) * width;
          for (int64_t k = first; k < last; ++k, row += width) {
            const T* element = tap + k * w.k;
            if (w.n == 1) {
              for (int64_t n = 0; n < columns; ++n) row[n] = static_cast<float>(element[n]);
            } else {
              for (int64_t n = 0; n < columns; ++n) row[n] = static_cast<float>(element[n * w.n]);
            }
            for (int64_t n = columns; n < width; ++n) row[n] = 0.f;
          }
        }
      }
    }
  });
}

}  // namespace

void pack_weight(const Contraction& c, c10::ScalarType dtype, const Weight& w, float* to) {
  with_type(dtype, [&](auto zero) { pack<decltype(zero)>(c, w, to); });
}

}  // namespace fastdcgan::cpu
