// The transforms of tiles: vectors along channels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/elementwise/widen.h"
#include "cpu/gemm/gemm.h"
#include "cpu/winograd/winograd_filters.h"

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

// A square of pixels: those of the first row and column, and how far the next ones are.
struct Square {
  int64_t y, x, y_step, x_step;
};

// Channels [low, high) of kIn x kIn pixels, at most kDepth of them, transformed by a filter's kLine to kOut x kOut
// vectors `step` apart: those of channels from low + c on go to `to(c)`. Zeros fill the last vector.
template <auto kLine, int kIn, int kOut, class T, class To>
inline void transform_pixels(
    const TileImage<T>& in, int64_t n, const Square& at, int64_t low, int64_t high, const To& to, int64_t step) {
  const T* from[kIn * kIn];
  const int64_t y_end = at.y + (kIn - 1) * at.y_step, x_end = at.x + (kIn - 1) * at.x_step;
  if (at.y >= 0 && y_end < in.height && at.x >= 0 && x_end < in.width) {
    const T* first = in.data + ((n * in.height + at.y) * in.width + at.x) * in.channels + low;
    const int64_t row = at.y_step * in.width * in.channels, column = at.x_step * in.channels;
    for (int i = 0; i < kIn * kIn; ++i) from[i] = first + i / kIn * row + i % kIn * column;
  } else {
    for (int i = 0; i < kIn * kIn; ++i)
      from[i] = in.pixel(n, at.y + i / kIn * at.y_step, at.x + i % kIn * at.x_step) + low;
  }
  const int64_t channels = high - low;
  const auto transform_all = [&](const float* const* rows) {
    for (int64_t c = 0; c < channels; c += kWidth) {
      float* first = to(c);
      transform<kLine, kIn, kOut>(
          [&](int i, int j) { return load(rows[i * kIn + j] + c); },
          [&](int i, int j, Floats v) { store(first + (i * kOut + j) * step, v); });
    }
  };
  if constexpr (std::is_same_v<T, float>) {
    if (channels % kWidth == 0) return transform_all(from);
  }
  alignas(64) float wide[kIn * kIn][kDepth + kSpill];
  const float* rows[kIn * kIn];
  for (int i = 0; i < kIn * kIn; ++i) {
    in.widen_pixel(wide[i], from[i], channels);
    rows[i] = wide[i];
  }
  transform_all(rows);
}

// The inputs of a tile.
template <class F, class T, class To>
inline void transform_input(
    const TileImage<T>& in, const Phase& y, const Phase& x, const TilePlace& place, int64_t low, int64_t high,
    const To& to, int64_t step) {
  const Square square{
      y.input + place.y * F::kOutputs * y.in_step, x.input + place.x * F::kOutputs * x.in_step, y.in_step, x.in_step};
  transform_pixels<F::input, F::kSide, F::kSide>(in, place.n, square, low, high, to, step);
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

// A panel [depth, width] of B at each of the points, which are `step` apart, from the taps at `from`. Elements as
// above.
template <class F, class T>
inline void transform_weights(
    const T* const* from, int64_t k_step, int64_t depth, int64_t n_step, int64_t columns, int64_t width, float* to,
    int64_t step) {
  constexpr int kTaps = F::kTaps, kSide = F::kSide;
  alignas(64) float taps[kTaps * kTaps][kWidth * kPanel];
  for (int64_t k = 0; k < depth; k += kWidth) {
    const int64_t rows = std::min<int64_t>(kWidth, depth - k);
    for (int i = 0; i < kTaps * kTaps; ++i)
      widen_tap(taps[i], from[i] + k * k_step, k_step, rows, n_step, columns, width);
    for (int64_t n = 0; n < rows * width; n += kWidth)
      transform<F::weight, kTaps, kSide>(
          [&](int i, int j) { return load(taps[i * kTaps + j] + n); },
          [&](int i, int j, Floats v) { store(to + k * width + n + (i * kSide + j) * step, v); });
  }
}

// Vectors at `step` of kIn x kIn places, transformed in place of the first kOut x kOut.
template <auto kLine, int kIn, int kOut>
inline void transform_in_place(float* at, int64_t step) {
  transform<kLine, kIn, kOut>(
      [&](int i, int j) { return load(at + (i * kIn + j) * step); },
      [&](int i, int j, Floats v) { store(at + (i * kOut + j) * step, v); });
}

}  // namespace fastdcgan::cpu
