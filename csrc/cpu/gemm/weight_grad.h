// `weight_grad`: pixels are the depth of a dense product. Taps with whole panels of channels leave out the pixels at
// which they read padding; else all taps of a row or more are columns side by side. `Pixels` says how they are packed
// and multiplied: FloatPixels, or PairPixels (pair_pixels.h).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/gemm/gather.h"
#include "cpu/gemm/split_bf16.h"

namespace fastdcgan::cpu {

// The two tensors, `gathered` and `linear`. `exact`: a tap's columns are whole panels, and classes are not padded.
template <class T>
struct Sides {
  const Contraction& c;
  Image<T> gathered;
  const T *linear, *linear_end;
  bool exact;

  Sides(const Contraction& c, const T* gathered, const T* linear)
      : c(c), gathered{gathered, c.y.in, c.x.in, c.in_channels, gathered + c.batch * c.y.in * c.x.in * c.in_channels},
        linear(linear), linear_end(linear + c.batch * c.y.out * c.x.out * c.out_channels),
        exact(c.in_channels % kPanel == 0) {}

  const T* linear_pixel(const RowClass& rows, const Place& p) const {
    const int64_t oy = rows.y->outputs[p.y], ox = rows.x->outputs[p.x];
    return linear + ((p.n * c.y.out + oy) * c.x.out + ox) * c.out_channels;
  }
  // What the first tap of a segment reads, if that is inside.
  const T* gathered_pixel(const RowClass& rows, const Place& p, const Segment& s) const {
    const int64_t iy = rows.y->first[p.y] + s.y * rows.y->step, ix = rows.x->first[p.x] + s.first * rows.x->step;
    return gathered.data + ((p.n * c.y.in + iy) * c.x.in + ix) * c.in_channels;
  }
};

// Columns of the result: by tap along y, tap along x, channel.
struct Columns {
  int64_t begin, count;
};

// Pixels widened to float: A [tile][pixel][output channel], B [panel][pixel][column].
template <class T>
class FloatPixels {
 public:
  struct Session {};
  static constexpr int64_t kTerms = 1;

  static int64_t sum_rows(int64_t out_channels) { return out_channels; }
  // Floats of memory for up to kDepth pixels and `width` columns.
  static int64_t size(const Contraction& c, int64_t width) {
    return Tiles(c.out_channels).count * kTileStride + kDepth * width + std::max(c.out_channels, width) + kSpill +
           kWidth;
  }

  FloatPixels(const Sides<T>& sides, int64_t width, float* memory)
      : s_(sides), tiles_(sides.c.out_channels), width_(width), a_(memory), b_(a_ + tiles_.count * kTileStride),
        row_(b_ + kDepth * width) {}

  void pack_linear(const RowClass& rows, int64_t low, int64_t high) {
    Place place(rows, low);
    for (int64_t k = 0; k < high - low; ++k, place.next(rows)) {
      widen(row_, s_.linear_pixel(rows, place), s_.c.out_channels, s_.linear_end);
      for (int64_t t = 0; t < tiles_.count; ++t)
        store(a_ + t * kTileStride + k * kKernelRows, load(row_ + tiles_.begin(t)));
    }
  }

  void pack_gathered(
      const RowClass& rows, int64_t low, int64_t high, const std::vector<Segment>& parts, const Panels& panels) {
    const int64_t depth = high - low;
    Place place(rows, low);
    for (int64_t k = 0; k < depth; ++k, place.next(rows)) {
      if (s_.exact) {
        const T* from = s_.gathered_pixel(rows, place, parts.front());
        for (int64_t p = 0; p < panels.count; ++p)
          widen(b_ + (p * depth + k) * kPanel, from + p * kPanel, kPanel, s_.gathered.end);
      } else {
        gather_row(row_, s_.gathered, rows, place, parts);
        std::fill(row_ + panels.columns, row_ + panels.width, 0.f);
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t vectors = panels.vectors(p);
          float* to = b_ + p * kPanel * depth + k * vectors * kWidth;
          for (int64_t v = 0; v < vectors; ++v) store(to + v * kWidth, load(row_ + p * kPanel + v * kWidth));
        }
      }
    }
  }

  // Adds the products of `depth` packed pixels to sums [output channel][column].
  void multiply(int64_t depth, const Panels& panels, float* c) const {
    const Piece piece{0, 0, depth};
    for (int64_t p = 0; p < panels.count; ++p)
      for (int64_t t = 0; t < tiles_.count; ++t)
        cpu::multiply<1>(
            tiles_.height(t), panels.vectors(p),
            {a_ + t * kTileStride, kKernelRows, b_ + p * kPanel * depth, c + tiles_.begin(t) * width_ + p * kPanel,
             width_, &piece, 1, true});
  }

 private:
  static constexpr int64_t kTileStride =
      kDepth * kKernelRows + kWidth;  // between tiles of A; its stores are whole vectors

  const Sides<T>& s_;
  Tiles tiles_;
  int64_t width_;
  float *a_, *b_, *row_;
};

template <class T, class Pixels>
class WeightGrad {
 public:
  WeightGrad(const Contraction& c, const T* gathered, const T* linear, T* out)
      : c_(c), s_(c, gathered, linear), out_(out), y_(axis_classes(c.y, !s_.exact)), x_(axis_classes(c.x, !s_.exact)) {
    const int64_t row = c.x.kernel * c.in_channels, all = c.y.kernel * row;
    const int64_t step = s_.exact ? c.in_channels : row * std::clamp<int64_t>(kMaxColumns / row, 1, c.y.kernel);
    for (int64_t begin = 0; begin < all; begin += step) groups_.push_back({begin, std::min(step, all - begin)});
    width_ = Panels(step).width;
  }

  // False if a sum of split floats is not finite: then `out` is not the result.
  bool run() {
    const auto groups = static_cast<int64_t>(groups_.size());
    const int64_t pixels = c_.batch * c_.y.out * c_.x.out, size = sum_rows() * width_;
    const int64_t slices =
        groups >= kEnoughTasks ? 1 : std::clamp<int64_t>(pixels / kSlicePixels, 1, kEnoughTasks / groups);
    const int64_t threads = at::get_num_threads();
    const int64_t parts = threads == 1 ? 1 : std::min(groups, 2 * threads);
    static thread_local Scratch scratch;
    float* sums = scratch.floats(slices * groups * size);  // [slice, group, output channel, column]
    at::parallel_for(0, slices * parts, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Pixels::Session session;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slice = i / parts, part = i % parts;
        const int64_t first = groups * part / parts, last = groups * (part + 1) / parts;
        float* to = sums + (slice * groups + first) * size;
        std::fill_n(to, (last - first) * size, 0.f);
        for (const AxisClass& y : y_)
          for (const AxisClass& x : x_) {
            const RowClass rows = row_class(c_, y, x);
            const int64_t all = c_.batch * rows.pixels();
            add(rows, all * slice / slices, all * (slice + 1) / slices, first, last, to);
          }
      }
    });
    at::parallel_for(0, groups * c_.out_channels, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* row = sums + (i / c_.out_channels * sum_rows() + i % c_.out_channels) * width_;
        for (int64_t s = 1; s < slices; ++s)
          for (int64_t n = 0; n < width_; ++n) row[n] += row[s * groups * size + n];
        const Columns& columns = groups_[i / c_.out_channels];
        if constexpr (Pixels::kTerms == 2)
          if (!all_finite(row, columns.count)) finite_ = false;
        narrow(out_ + i % c_.out_channels * c_.taps() * c_.in_channels + columns.begin, row, columns.count);
      }
    });
    return finite_;
  }

 private:
  // Adds the products of pixels [begin, end) of a class to the sums of some groups of columns.
  void add(const RowClass& rows, int64_t begin, int64_t end, int64_t first, int64_t last, float* to) const {
    static thread_local Scratch scratch;
    Pixels pixels(s_, width_, scratch.floats(Pixels::size(c_, width_)));
    const int64_t chunks = (end - begin + kDepth - 1) / kDepth;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t low = begin + (end - begin) * i / chunks, high = begin + (end - begin) * (i + 1) / chunks;
      pixels.pack_linear(rows, low, high);
      for (int64_t g = first; g < last; ++g) {
        const std::vector<Segment> parts = columns_in(rows, groups_[g]);
        if (parts.empty()) continue;
        const Panels panels(groups_[g].count);
        pixels.pack_gathered(rows, low, high, parts, panels);
        pixels.multiply(high - low, panels, to + (g - first) * sum_rows() * width_);
      }
    }
  }

  int64_t sum_rows() const { return Pixels::sum_rows(c_.out_channels); }

  // Where columns lie in the rows of a class; nothing if their tap is not among its taps.
  std::vector<Segment> columns_in(const RowClass& rows, const Columns& columns) const {
    if (!s_.exact) return segments(rows, columns.begin, columns.begin + columns.count);
    const int64_t tap = columns.begin / c_.in_channels;
    const auto y = std::find(rows.y->taps.begin(), rows.y->taps.end(), tap / c_.x.kernel);
    const auto x = std::find(rows.x->taps.begin(), rows.x->taps.end(), tap % c_.x.kernel);
    if (y == rows.y->taps.end() || x == rows.x->taps.end()) return {};
    const int64_t place = x - rows.x->taps.begin();
    return {{y - rows.y->taps.begin(), place * c_.in_channels, c_.in_channels, place, place}};
  }

  static constexpr int64_t kMaxColumns = 256;  // that taps are put together to
  static constexpr int64_t kEnoughTasks = 16;
  static constexpr int64_t kSlicePixels = 512;  // of one task, where pixels are divided among tasks

  const Contraction& c_;
  Sides<T> s_;
  T* out_;
  std::vector<AxisClass> y_, x_;
  std::vector<Columns> groups_;
  int64_t width_ = 0;  // of a group's sums
  std::atomic<bool> finite_{true};
};

}  // namespace fastdcgan::cpu
