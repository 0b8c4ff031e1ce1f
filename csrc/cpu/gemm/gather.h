// Rows of A: for each output, the inputs that it reads, side by side.
#pragma once

#include <vector>

#include "cpu/contraction/contraction.h"
#include "cpu/elementwise/widen.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

// Outputs that read through the same taps; their rows have `depth` columns: by tap along y, tap along x, channel.
struct RowClass {
  const AxisClass* y;
  const AxisClass* x;
  int64_t channels;
  bool whole;  // no row reads padding, and taps along x read neighbours

  int64_t run() const { return static_cast<int64_t>(x->taps.size()) * channels; }  // columns of one tap along y
  int64_t depth() const { return static_cast<int64_t>(y->taps.size()) * run(); }
  int64_t pixels() const { return static_cast<int64_t>(y->outputs.size() * x->outputs.size()); }  // of one sample
};

// Whether no output of a class reads outside an input of `size`.
inline bool inside(const AxisClass& c, int64_t size) {
  const int64_t reach = (static_cast<int64_t>(c.taps.size()) - 1) * c.step;
  return std::all_of(c.first.begin(), c.first.end(), [&](int64_t i) { return i >= 0 && i + reach < size; });
}

inline RowClass row_class(const Contraction& c, const AxisClass& y, const AxisClass& x) {
  return {&y, &x, c.in_channels, x.step == 1 && inside(y, c.y.in) && inside(x, c.x.in)};
}

// Where a row stands: sample, and indices into the class's outputs.
struct Place {
  int64_t n, y, x;

  Place(const RowClass& c, int64_t row)
      : n(row / c.pixels()), y(row % c.pixels() / static_cast<int64_t>(c.x->outputs.size())),
        x(row % static_cast<int64_t>(c.x->outputs.size())) {}
  void next(const RowClass& c) {
    if (++x < static_cast<int64_t>(c.x->outputs.size())) return;
    x = 0;
    if (++y < static_cast<int64_t>(c.y->outputs.size())) return;
    y = 0;
    ++n;
  }
};

// An input [batch, height, width, channels], and the end of its memory.
template <class T>
struct Image {
  const T* data;
  int64_t height, width, channels;
  const T* end;
};

// The part of a run that belongs to some columns: of tap `y` along y, columns [low, low + columns) of its run, which
// are of the taps `first` to `last` along x.
struct Segment {
  int64_t y, low, columns, first, last;
};

inline std::vector<Segment> segments(const RowClass& c, int64_t begin, int64_t end) {
  std::vector<Segment> found;
  const int64_t run = c.run();
  for (int64_t at = begin; at < end;) {
    const int64_t y = at / run, low = at - y * run, high = std::min(run, end - y * run);
    found.push_back({y, low, high - low, low / c.channels, (high - 1) / c.channels});
    at = y * run + high;
  }
  return found;
}

// A segment some of whose taps read padding, or pixels that are not neighbours. `row`: of inputs; null: all padding.
template <class To, class T>
void gather_taps(To* to, const Image<T>& in, const T* row, int64_t ix, int64_t step, const Segment& s) {
  for (int64_t t = s.first; t <= s.last; ++t) {
    const int64_t low = std::max(s.low - t * in.channels, int64_t{0});
    const int64_t high = std::min(s.low + s.columns - t * in.channels, in.channels), i = ix + t * step;
    if (row && i >= 0 && i < in.width) {
      widen(to, row + i * in.channels + low, high - low, in.end);
    } else {
      std::fill_n(to, high - low, To(0.f));
    }
    to += high - low;
  }
}

// The columns of `parts` of the row at `p`, as floats or as they are. May write kSpill elements beyond them.
template <class To, class T>
inline void gather_row(
    To* to, const Image<T>& in, const RowClass& c, const Place& p, const std::vector<Segment>& parts) {
  const int64_t y = c.y->first[p.y], y_step = c.y->step, ix = c.x->first[p.x], step = c.x->step;
  const T* sample = in.data + p.n * in.height * in.width * in.channels;
  if (c.whole) {
    const T* from = sample + (y * in.width + ix) * in.channels;
    for (const Segment& s : parts) {
      widen(to, from + s.y * y_step * in.width * in.channels + s.low, s.columns, in.end);
      to += s.columns;
    }
    return;
  }
  for (const Segment& s : parts) {
    const int64_t iy = y + s.y * y_step;
    const T* row = iy >= 0 && iy < in.height ? sample + iy * in.width * in.channels : nullptr;
    if (row && step == 1 && ix + s.first >= 0 && ix + s.last < in.width) {
      widen(to, row + ix * in.channels + s.low, s.columns, in.end);
    } else {
      gather_taps(to, in, row, ix, step, s);
    }
    to += s.columns;
  }
}

}  // namespace fastdcgan::cpu
