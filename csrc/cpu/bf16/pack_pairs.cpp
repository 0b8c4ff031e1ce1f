#include "cpu/bf16/pack_pairs.h"

#ifdef CPU_CAPABILITY_AVX512

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/bf16/vnni_pairs.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {
namespace {

using Element = c10::BFloat16;

constexpr int64_t kBlock = 64;  // input channels that are packed together: all taps of them pass through the cache once

// Channels [first, last) of one tap for some columns. `to`: of the panel; `row`: of `first` in the packed weight.
void pack_tap(
    const Element* from, const Weight& w, int64_t first, int64_t last, int64_t columns, int64_t width, Element* to,
    int64_t row) {
  int64_t k = first;
  if (row % 2 == 0 && w.n == 1) {
    for (; k + 2 <= last; k += 2) {
      const Element* pair = from + k * w.k;
      interleave(pair, columns, pair + w.k, columns, width, to + place_of_pair(row + k - first, 0, width));
    }
  } else if (row % 2 == 0 && w.k == 1) {
    for (; k + 2 <= last; k += 2 * kPairs) {
      const int64_t pairs = std::min(kPairs, (last - k) / 2);
      for (int64_t n = 0; n < columns; n += kWidth)
        transpose_vnni_pairs(
            from + n * w.n + k, w.n, to + place_of_pair(row + k - first, n, width), 2 * width,
            std::min(kWidth, columns - n), pairs);
    }
    k = std::min(k, last - (last - first) % 2);
  }
  for (; k < last; ++k)
    for (int64_t n = 0; n < columns; ++n)
      to[place_of_pair(row + k - first, n, width)] = from[k * w.k + n * w.n];
}

}  // namespace

void pack_pairs(const Contraction& c, const Weight& w, int64_t unit, Element* to, int64_t term, int64_t terms) {
  const Panels panels(c.out_channels);
  const DepthOrder order(c.y, c.x, c.in_channels, unit);
  const int64_t blocks = (c.in_channels + kBlock - 1) / kBlock, depth = order.rows();
  if (term == 0 && (c.in_channels % unit || c.out_channels % kWidth))
    std::fill_n(to, terms * panels.width * depth, Element(0.f));
  at::parallel_for(0, panels.count * blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / blocks * kPanel, width = panels.vectors(i / blocks) * kWidth;
      const int64_t first = i % blocks * kBlock, last = std::min(first + kBlock, c.in_channels);
      for (int64_t ky = 0; ky < c.y.kernel; ++ky)
        for (int64_t kx = 0; kx < c.x.kernel; ++kx)
          pack_tap(
              static_cast<const Element*>(w.data) + column * w.n + ky * w.y + kx * w.x, w, first, last,
              std::min(width, c.out_channels - column), width, to + (terms * column + term * width) * depth,
              order.row(ky, kx) + first);
    }
  });
}

}  // namespace fastdcgan::cpu

#endif
