// Rows of an image with their padding, widened to float: what some rows of outputs read.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/contraction/contraction.h"
#include "cpu/elementwise/widen.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

template <class T>
class Strips {
 public:
  Strips(const Contraction& c, const T* in)
      : c_(c), in_(in), end_(in + c.batch * c.y.in * c.x.in * c.in_channels),
        row_(((c.x.out - 1) * c.x.stride + (c.x.kernel - 1) * c.x.dilation + 1) * c.in_channels),
        left_(std::min(row_, c.x.padding * c.in_channels)),
        inside_(std::min(row_ - left_, c.x.in * c.in_channels)) {}

  int64_t row() const { return row_; }  // floats
  // Floats of memory for what `rows` rows of outputs read: whole vectors.
  int64_t size(int64_t rows) const { return (height(rows) * row_ + kSpill + kWidth - 1) / kWidth * kWidth; }
  // From the first of an output's values to the first of the next one's.
  int64_t x_step() const { return c_.x.stride * c_.in_channels; }
  int64_t y_step() const { return c_.y.stride * row_; }

  // Stretches of an output's values that are neighbours in a strip, in the order of the taps: where in the strip, and
  // in all of them.
  std::vector<Piece> stretches() const {
    std::vector<Piece> found;
    const int64_t together = c_.x.dilation == 1 ? c_.x.kernel : 1, depth = together * c_.in_channels;
    for (int64_t ky = 0; ky < c_.y.kernel; ++ky)
      for (int64_t kx = 0; kx < c_.x.kernel; kx += together)
        found.push_back(
            {ky * c_.y.dilation * row_ + kx * c_.x.dilation * c_.in_channels,
             (ky * c_.x.kernel + kx) * c_.in_channels, depth});
    return found;
  }

  // What rows [first, first + rows) of the outputs of sample `n` read.
  void fill(int64_t n, int64_t first, int64_t rows, float* to) const {
    const int64_t top = first * c_.y.stride - c_.y.padding;
    for (int64_t i = 0; i < height(rows); ++i, to += row_) {
      const int64_t y = top + i;
      if (y < 0 || y >= c_.y.in) {
        std::fill_n(to, row_, 0.f);
        continue;
      }
      std::fill_n(to, left_, 0.f);
      widen(to + left_, in_ + (n * c_.y.in + y) * c_.x.in * c_.in_channels, inside_, end_);
      std::fill(to + left_ + inside_, to + row_, 0.f);
    }
  }

 private:
  int64_t height(int64_t rows) const { return (rows - 1) * c_.y.stride + (c_.y.kernel - 1) * c_.y.dilation + 1; }

  const Contraction& c_;
  const T *in_, *end_;
  int64_t row_, left_, inside_;
};

// Rows of outputs of one sample.
struct OutputRows {
  int64_t n, first, count;
};

// All rows of outputs, in the order of memory, in bands of at most `pixels` pixels or of one row.
class Bands {
 public:
  Bands(const Contraction& c, int64_t pixels)
      : height_(c.y.out),
        rows_(std::clamp<int64_t>(pixels / c.x.out, 1, c.y.out)),
        in_one_((height_ + rows_ - 1) / rows_),
        count_(c.batch * in_one_) {}
  int64_t count() const { return count_; }
  int64_t most_rows() const { return (height_ + in_one_ - 1) / in_one_; }
  OutputRows operator[](int64_t i) const {
    const int64_t b = i % in_one_, first = height_ * b / in_one_;
    return {i / in_one_, first, height_ * (b + 1) / in_one_ - first};
  }

 private:
  int64_t height_, rows_, in_one_, count_;
};

}  // namespace fastdcgan::cpu
