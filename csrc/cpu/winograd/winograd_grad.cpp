// `weight_grad` by Winograd's algorithm: tiles are the depth of a dense product at each of the points; sums over all
// tiles are transformed to taps.
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/elementwise/pass_rows.h"
#include "cpu/winograd/winograd.h"
#include "cpu/winograd/winograd_tiles.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kCachedFloats = 1 << 19;                       // of sums
constexpr int64_t kRowTiles = 10;                               // whose sums stay in the cache until they are taps
constexpr int64_t kEnoughTasks = 16;
constexpr int64_t kSliceTiles = 1024;  // of one task, where tiles are divided among tasks

// Rows of the result, in groups of whole vectors of which whole tiles can be cut.
struct Rows {
  static constexpr int64_t kGroup = 4 * kKernelRows;
  static_assert(kGroup % kWidth == 0);

  int64_t whole, groups;  // groups: with the rest
  Tiles rest;
  int64_t count;  // of tiles

  explicit Rows(int64_t rows)
      : whole(rows / kGroup), groups((rows + kGroup - 1) / kGroup), rest(rows % kGroup),
        count(4 * whole + rest.count) {}
  int64_t begin(int64_t tile) const {
    return tile < 4 * whole ? tile * kKernelRows : whole * kGroup + (rest.count ? rest.begin(tile - 4 * whole) : 0);
  }
  int64_t height(int64_t tile) const { return begin(tile + 1) - begin(tile); }
};

// Some channels of a phase of the gathered side.
struct Part {
  Phase y, x;
  int64_t first, columns;
};

template <class T, class F>
class WinogradGrad {
  static constexpr int kSide = F::kSide, kPoints = kSide * kSide, kTaps = F::kTaps;
  static constexpr int64_t kOutputs = F::kOutputs, kDepth = F::kTileDepth;
  // Channels of a part: fewer for 3x3 kernels, of which there is one phase, so that there are parts enough for threads.
  static constexpr int64_t kColumns = (kTaps == 3 ? 1 : 2) * kPanel;

 public:
  WinogradGrad(const Contraction& c, const T* gathered, const T* linear, T* out)
      : c_(c), gathered_(gathered, c.batch, c.y.in, c.x.in, c.in_channels),
        linear_(linear, c.batch, c.y.out, c.x.out, c.out_channels), out_(out), rows_(c.out_channels) {
    for (const Phase& y : phases(c.y))
      for (const Phase& x : phases(c.x))
        for (int64_t first = 0; first < c.in_channels; first += kColumns)
          parts_.push_back({y, x, first, std::min(kColumns, c.in_channels - first)});
    width_ = Panels(std::min(kColumns, c.in_channels)).width;
  }

  void run() {
    if (tiles() <= kDepth && static_cast<int64_t>(parts_.size()) * part_size() > kCachedFloats) {
      run_by_part();
    } else {
      run_by_tile();
    }
  }

 private:
  int64_t tiles() const { return c_.batch * parts_[0].y.tiles(kOutputs) * parts_[0].x.tiles(kOutputs); }
  static int64_t a_place(int64_t row, int64_t tile) {
    return (row / Rows::kGroup * kDepth + tile) * Rows::kGroup + row % Rows::kGroup;
  }
  int64_t a_point() const { return rows_.groups * kDepth * Rows::kGroup + kPanel; }
  int64_t a_size() const { return kPoints * a_point(); }
  int64_t b_point() const { return kDepth * width_ + kPanel; }
  int64_t point_size() const { return c_.out_channels * width_; }
  int64_t part_size() const { return kPoints * point_size(); }

  // The sums of some parts stay in the cache: those of all tiles, and then the taps.
  void run_by_tile() {
    const int64_t parts = static_cast<int64_t>(parts_.size()), all = tiles();
    const int64_t slices = std::clamp<int64_t>(all / kSliceTiles, 1, std::max<int64_t>(kEnoughTasks / parts, 1));
    const int64_t units = parts * rows_.count, cuts = balanced_cuts(slices, units);  // few: each transforms its inputs
    static thread_local Scratch scratch;
    float* sums = scratch.floats(slices * parts * part_size());  // [slice, part, point, output channel, column]
    at::parallel_for(0, slices * cuts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slice = i / cuts, cut = i % cuts, first = units * cut / cuts, last = units * (cut + 1) / cuts;
        add(all * slice / slices, all * (slice + 1) / slices, first, last, sums + slice * parts * part_size());
      }
    });
    at::parallel_for(0, parts * c_.out_channels, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i / c_.out_channels, channel = i % c_.out_channels;
        float* row = sums + part * part_size() + channel * width_;
        store_taps(parts_[part], channel, row, point_size(), slices, parts * part_size());
      }
    });
  }

  // The sums of [first, last) of the tiles of rows of all parts, over tiles [begin, end).
  void add(int64_t begin, int64_t end, int64_t first, int64_t last, float* sums) const {
    static thread_local Scratch scratch;
    float *a = scratch.floats(a_size() + kPoints * b_point()), *b = a + a_size();
    const Chunks chunks(end - begin, kDepth);
    const int64_t all = rows_.count, first_part = first / all, last_part = (last - 1) / all;
    const bool one = first_part == last_part;
    const int64_t from = one ? rows_.begin(first % all) / kWidth * kWidth : 0;
    const int64_t to = one ? rows_.begin(last - last_part * all) : c_.out_channels;
    for (int64_t i = 0; i < chunks.count; ++i) {
      const int64_t low = begin + chunks.begin(i), size = chunks.size(i);
      pack_linear(low, 0, size, from, to, a);
      for (int64_t part = first_part; part <= last_part; ++part) {
        const int64_t r = std::max<int64_t>(first - part * all, 0), end_r = std::min(last - part * all, all);
        pack_gathered(parts_[part], low, size, b);
        multiply_rows(
            part, a, b, size, r, end_r, sums + part * part_size() + rows_.begin(r) * width_, point_size(), i > 0);
      }
    }
  }

  // The sums of all parts would leave the cache: those of one part after the other, or of some rows of it, and their
  // taps.
  void run_by_part() {
    const int64_t parts = static_cast<int64_t>(parts_.size()), cuts = balanced_cuts(parts, rows_.count);
    const Chunks chunks(tiles(), kDepth);
    static thread_local Scratch scratch;
    float* a = scratch.floats(chunks.count * a_size());
    constexpr int64_t kRanges = 8;  // of each chunk
    at::parallel_for(0, chunks.count * kRanges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t chunk = i / kRanges, range = i % kRanges, size = chunks.size(chunk);
        pack_linear(
            chunks.begin(chunk), size * range / kRanges, size * (range + 1) / kRanges, 0, c_.out_channels,
            a + chunk * a_size());
      }
    });
    at::parallel_for(0, parts * cuts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        add_part(i / cuts, chunks, a, rows_.count * (i % cuts) / cuts, rows_.count * (i % cuts + 1) / cuts);
    });
  }

  // Tiles of rows [first, last) of a part.
  void add_part(int64_t part, const Chunks& chunks, const float* a, int64_t first, int64_t last) const {
    const int64_t step = chunks.count == 1 ? kRowTiles : last - first;  // what is gathered is transformed once
    const int64_t point = step * kKernelRows * width_ + kPanel;
    static thread_local Scratch scratch;
    float *b = scratch.floats(kPoints * (b_point() + point)), *sums = b + kPoints * b_point();
    for (int64_t t = first; t < last; t += step) {
      const int64_t end = std::min(t + step, last);
      for (int64_t i = 0; i < chunks.count; ++i) {
        if (t == first) pack_gathered(parts_[part], chunks.begin(i), chunks.size(i), b);
        multiply_rows(part, a + i * a_size(), b, chunks.size(i), t, end, sums, point, i > 0);
      }
      for (int64_t row = rows_.begin(t); row < rows_.begin(end); ++row)
        store_taps(parts_[part], row, sums + (row - rows_.begin(t)) * width_, point, 1, 0);
    }
  }

  // Tiles of rows [first, last) of a part: from `sums` on, whose points are `step` apart.
  void multiply_rows(
      int64_t part, const float* a, const float* b, int64_t depth, int64_t first, int64_t last, float* sums,
      int64_t step, bool add) const {
    const Panels panels(parts_[part].columns);
    const Piece piece{0, 0, depth};
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t p = 0; p < panels.count; ++p) {
        float* c = sums + point * step + p * kPanel - rows_.begin(first) * width_;
        for (int64_t t = first; t < last; ++t) {
          const float* rows = a + point * a_point() + a_place(rows_.begin(t), 0);
          // Of the lines of the next tile the last, which the tile before it did not read.
          const float* ahead = a + point * a_point() + a_place(rows_.begin(t + 1) + kKernelRows - 1, 0);
          multiply<1>(
              rows_.height(t), panels.vectors(p),
              {rows, Rows::kGroup, b + point * b_point() + p * kPanel * depth, c + rows_.begin(t) * width_, width_,
               &piece, 1, add, ahead, Rows::kGroup});
        }
      }
  }

  // A: [point][group][tile][output channel], of tiles first + [low, high) and channels [from, to).
  void pack_linear(int64_t first, int64_t low, int64_t high, int64_t from, int64_t to, float* a) const {
    TilePlace place(parts_[0].y.tiles(kOutputs), parts_[0].x.tiles(kOutputs), first + low);
    for (int64_t k = low; k < high; ++k, place.next())
      for (int64_t c = from; c < to; c += cpu::kDepth)
        transform_pixels<F::output_adjoint, F::kOutputs, kSide>(
            linear_, place.n, {place.y * kOutputs, place.x * kOutputs, 1, 1}, c,
            std::min(c + cpu::kDepth, to), [&](int64_t n) { return a + a_place(c + n, k); }, a_point());
  }

  // B: [point][panel][tile][column], of tiles first + [0, depth).
  void pack_gathered(const Part& part, int64_t first, int64_t depth, float* b) const {
    const Panels panels(part.columns);
    TilePlace place(part.y.tiles(kOutputs), part.x.tiles(kOutputs), first);
    for (int64_t k = 0; k < depth; ++k, place.next()) {
      const auto to = [&](int64_t column) {
        const int64_t p = column / kPanel;
        return b + p * kPanel * depth + k * panels.vectors(p) * kWidth + column % kPanel;
      };
      transform_input<F>(gathered_, part.y, part.x, place, part.first, part.first + part.columns, to, b_point());
    }
  }

  // The taps of one output channel; `row`: kPoints sums of all columns, `step` apart, in each of `slices`.
  void store_taps(
      const Part& part, int64_t channel, float* row, int64_t step, int64_t slices, int64_t slice_size) const {
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t s = 1; s < slices; ++s)
        for (int64_t n = 0; n < width_; n += kWidth) {
          float* sum = row + point * step + n;
          store(sum, load(sum) + load(sum + s * slice_size));
        }
    for (int64_t n = 0; n < width_; n += kWidth) transform_in_place<F::weight_adjoint, kSide, kTaps>(row + n, step);
    if constexpr (std::is_same_v<T, float> && kTaps == 3) {
      if (c_.contiguous) {
        store_contiguous(row, step, part.columns, out_ + (channel * c_.in_channels + part.first) * kTaps * kTaps);
        return;
      }
    }
    for (int64_t i = 0; i < kTaps * kTaps; ++i) {
      const int64_t ky = part.y.taps[i / kTaps], kx = part.x.taps[i % kTaps];
      const int64_t tap = (channel * c_.y.kernel + ky) * c_.x.kernel + kx;
      narrow(out_ + tap * c_.in_channels + part.first, row + i * step, part.columns);
    }
  }

  // The taps of one column after the other: squares of them are transposed.
  static void store_contiguous(const float* row, int64_t step, int64_t columns, float* out) {
    constexpr int kAll = kTaps * kTaps;
    alignas(64) float square[kWidth * kWidth], transposed[kWidth * kWidth];
    for (int64_t n = 0; n < columns; n += kWidth)
      for (int first = 0; first < kAll; first += kWidth) {
        const int some = std::min<int>(kAll - first, kWidth);
        for (int i = 0; i < some; ++i) store(square + i * kWidth, load(row + (first + i) * step + n));
        at::vec::transpose_mxn<float, kWidth, kWidth>(square, kWidth, transposed, kWidth);
        for (int64_t c = 0; c < kWidth && n + c < columns; ++c)
          V::loadu(transposed + c * kWidth).store(out + (n + c) * kAll + first, some);
      }
  }

  const Contraction& c_;
  TileImage<T> gathered_, linear_;
  T* out_;
  Rows rows_;
  std::vector<Part> parts_;
  int64_t width_;  // of a part's sums
};

}  // namespace

bool can_contiguous_winograd_grad(const Contraction& c, c10::ScalarType dtype) {
  return dtype == at::kFloat && c.y.kernel == 3 && c.x.kernel == 3;
}

template <int kOutputs>
void winograd_weight_grad(
    const Contraction& c, c10::ScalarType dtype, const void* gathered, const void* linear, void* out) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_filter<kOutputs>(c, [&](auto filter) {
      WinogradGrad<T, decltype(filter)>(
          c, static_cast<const T*>(gathered), static_cast<const T*>(linear), static_cast<T*>(out))
          .run();
    });
  });
}

template void winograd_weight_grad<2>(const Contraction&, c10::ScalarType, const void*, const void*, void*);
template void winograd_weight_grad<4>(const Contraction&, c10::ScalarType, const void*, const void*, void*);

}  // namespace fastdcgan::cpu
