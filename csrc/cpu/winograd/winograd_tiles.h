// The transforms of tiles: vectors along channels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/elementwise/widen.h"
#include "cpu/gemm/gemm.h"
#include "cpu/winograd/winograd.h"

namespace fastdcgan::cpu {

// Into how many parts, at most `most`, each of `tasks` is cut so that no thread waits for more than a tenth of the
// time.
inline int64_t balanced_cuts(int64_t tasks, int64_t most) {
  const int64_t threads = at::get_num_threads();
  const auto idle = [&](int64_t cuts) { return (threads - tasks * cuts % threads) % threads; };
  int64_t cuts = 1;
  while (cuts < most && 10 * idle(cuts) > tasks * cuts + idle(cuts)) ++cuts;
  return cuts;
}

// `all` of something in ranges of at most `most`, of about the same size.
struct Chunks {
  int64_t all, count;

  Chunks(int64_t all, int64_t most) : all(all), count((all + most - 1) / most) {}
  int64_t begin(int64_t i) const { return all * i / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

// Sample, and tile along each axis.
struct TilePlace {
  int64_t n, y, x, y_tiles, x_tiles;

  TilePlace(int64_t y_tiles, int64_t x_tiles, int64_t tile)
      : n(tile / (y_tiles * x_tiles)), y(tile / x_tiles % y_tiles), x(tile % x_tiles), y_tiles(y_tiles),
        x_tiles(x_tiles) {}
  void next() {
    if (++x < x_tiles) return;
    x = 0;
    if (++y < y_tiles) return;
    y = 0;
    ++n;
  }
};

// A tensor [batch, height, width, channels], and what is read outside of it.
template <class T>
struct TileImage {
  const T* data;
  int64_t height, width, channels;
  const T* end;
  std::vector<T> zeros;

  TileImage(const T* data, int64_t batch, int64_t height, int64_t width, int64_t channels)
      : data(data), height(height), width(width), channels(channels), end(data + batch * height * width * channels),
        zeros(channels + kStep, static_cast<T>(0.f)) {}
  // Pixel (y, x) of sample n.
  const T* pixel(int64_t n, int64_t y, int64_t x) const {
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    return inside ? data + ((n * height + y) * width + x) * channels : zeros.data();
  }
  // `n` of the channels of a pixel, from `from` on, and zeros up to a whole vector.
  void widen_pixel(float* to, const T* from, int64_t n) const {
    const bool zero = from >= zeros.data() && from < zeros.data() + zeros.size();
    widen(to, from, n, zero ? zeros.data() + zeros.size() : end);
    std::fill(to + n, to + (n + kWidth - 1) / kWidth * kWidth, 0.f);
  }
};

// The transform of three inputs along an axis.
inline void transform_three(Floats d[kSide]) {
  d[0] -= d[1];
  d[2] -= d[1];
}

// Nine vectors at `to`, `step` apart, from those at `from[i] + at`.
inline void transform_nine(const float* const* from, int64_t at, float* to, int64_t step) {
  Floats d[kSide][kSide];
#pragma GCC unroll 3
  for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kSide; ++j) d[i][j] = load(from[i * kSide + j] + at);
    transform_three(d[i]);
  }
#pragma GCC unroll 3
  for (int j = 0; j < kSide; ++j) {
    Floats column[kSide] = {d[0][j], d[1][j], d[2][j]};
    transform_three(column);
#pragma GCC unroll 3
    for (int i = 0; i < kSide; ++i) store(to + (i * kSide + j) * step, column[i]);
  }
}

// Channels [low, high) of a tile's inputs, at most kDepth of them, at nine points `step` apart: a vector of channels
// from low + c on goes to `to(c)`. Zeros fill the last vector.
template <class T, class To>
inline void transform_input(
    const TileImage<T>& in, const TwoTaps& y, const TwoTaps& x, const TilePlace& place, int64_t low, int64_t high,
    const To& to, int64_t step) {
  const T* from[kPoints];
  const int64_t iy = y.input + place.y * kOutputs * y.in_step, ix = x.input + place.x * kOutputs * x.in_step;
  const int64_t y_end = iy + (kSide - 1) * y.in_step, x_end = ix + (kSide - 1) * x.in_step;
  if (iy >= 0 && y_end < in.height && ix >= 0 && x_end < in.width) {
    const T* first = in.data + ((place.n * in.height + iy) * in.width + ix) * in.channels + low;
    const int64_t row = y.in_step * in.width * in.channels, column = x.in_step * in.channels;
    for (int i = 0; i < kPoints; ++i) from[i] = first + i / kSide * row + i % kSide * column;
  } else {
    for (int i = 0; i < kPoints; ++i)
      from[i] = in.pixel(place.n, iy + i / kSide * y.in_step, ix + i % kSide * x.in_step) + low;
  }
  const int64_t channels = high - low;
  if constexpr (std::is_same_v<T, float>) {
    if (channels % kWidth == 0) {
      for (int64_t c = 0; c < channels; c += kWidth) transform_nine(from, c, to(c), step);
      return;
    }
  }
  alignas(64) float wide[kPoints][kDepth + kSpill];
  const float* rows[kPoints];
  for (int i = 0; i < kPoints; ++i) {
    in.widen_pixel(wide[i], from[i], channels);
    rows[i] = wide[i];
  }
  for (int64_t c = 0; c < channels; c += kWidth) transform_nine(rows, c, to(c), step);
}

// Nine points from the vectors of four taps.
inline void transform_weight(Floats g00, Floats g01, Floats g10, Floats g11, float* to, int64_t step) {
  const Floats rows[kSide][2] = {{g00, g01}, {g00 + g10, g01 + g11}, {g10, g11}};
#pragma GCC unroll 3
  for (int i = 0; i < kSide; ++i) {
    store(to + i * kSide * step, rows[i][0]);
    store(to + (i * kSide + 1) * step, rows[i][0] + rows[i][1]);
    store(to + (i * kSide + 2) * step, rows[i][1]);
  }
}

// Rows of `width` columns for `depth` input channels, of which `columns` are there: element (k, n) of a tap, at
// k*k_step + n*n_step, as a float.
template <class T>
inline void widen_tap(
    float* to, const T* from, int64_t k_step, int64_t depth, int64_t n_step, int64_t columns, int64_t width) {
  if (depth == kWidth && k_step == 1 && columns == width) {
    alignas(64) float wide[kWidth * kWidth];
    for (int64_t n = 0; n < width; n += kWidth, from += kWidth * n_step) {
      if constexpr (std::is_same_v<T, float>) {
        at::vec::transpose_mxn<float, kWidth, kWidth>(from, n_step, to + n, width);
      } else {
        for (int64_t i = 0; i < kWidth; ++i)
          for (int64_t k = 0; k < kWidth; ++k) wide[i * kWidth + k] = static_cast<float>(from[i * n_step + k]);
        at::vec::transpose_mxn<float, kWidth, kWidth>(wide, kWidth, to + n, width);
      }
    }
  } else if (n_step == 1) {
    for (int64_t k = 0; k < depth; ++k, from += k_step, to += width) {
      for (int64_t n = 0; n < columns; ++n) to[n] = static_cast<float>(from[n]);
      std::fill(to + columns, to + width, 0.f);
    }
  } else {
    for (int64_t k = 0; k < depth; ++k, from += k_step, to += width) {
      for (int64_t n = 0; n < columns; ++n) to[n] = static_cast<float>(from[n * n_step]);
      std::fill(to + columns, to + width, 0.f);
    }
  }
}

// A panel [depth, width] of B at each of nine points `step` apart, from the four taps at `from`. Elements as above.
template <class T>
inline void transform_weights(
    const T* const* from, int64_t k_step, int64_t depth, int64_t n_step, int64_t columns, int64_t width, float* to,
    int64_t step) {
  alignas(64) float taps[4][kWidth * kPanel];
  for (int64_t k = 0; k < depth; k += kWidth) {
    const int64_t rows = std::min<int64_t>(kWidth, depth - k);
    for (int i = 0; i < 4; ++i) widen_tap(taps[i], from[i] + k * k_step, k_step, rows, n_step, columns, width);
    for (int64_t i = 0; i < rows * width; i += kWidth)
      transform_weight(
          load(taps[0] + i), load(taps[1] + i), load(taps[2] + i), load(taps[3] + i), to + k * width + i, step);
  }
}

// 2x2 sums from nine points, in place of the first four.
inline void transform_output(float* at, int64_t step) {
  Floats rows[kOutputs][kSide];
#pragma GCC unroll 3
  for (int j = 0; j < kSide; ++j) {
    const Floats middle = load(at + (kSide + j) * step);
    rows[0][j] = load(at + j * step) + middle;
    rows[1][j] = middle + load(at + (2 * kSide + j) * step);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kOutputs; ++i) {
    store(at + i * kOutputs * step, rows[i][0] + rows[i][1]);
    store(at + (i * kOutputs + 1) * step, rows[i][1] + rows[i][2]);
  }
}

}  // namespace fastdcgan::cpu
