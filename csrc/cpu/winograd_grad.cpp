// `weight_grad` by minimal filtering: tiles are the depth of a dense product at each of the nine points; sums over all
// tiles are transformed to taps.
//
//   dg0 = d0*y0 + d1*y1 = (d0 - d1)*y0 + d1*(y0 + y1)
//   dg1 = d1*y0 + d2*y1 = d1*(y0 + y1) + (d2 - d1)*y1
#include <ATen/Parallel.h>

#include <algorithm>

#include "sweep.h"
#include "winograd.h"
#include "winograd_tiles.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kTileStride = kDepth * kKernelRows + kWidth;  // between tiles of A; its stores are whole vectors
constexpr int64_t kColumns = 2 * kPanel;                        // channels of a part
constexpr int64_t kEnoughTasks = 16;
constexpr int64_t kSliceTiles = 1024;  // of one task, where tiles are divided among tasks

// Some channels of a phase of the gathered side.
struct Part {
  TwoTaps y, x;
  int64_t first, columns;
};

template <class T>
class FilterGrad {
 public:
  FilterGrad(const Contraction& c, const T* gathered, const T* linear, T* out)
      : c_(c), gathered_(gathered, c.batch, c.y.in, c.x.in, c.in_channels),
        linear_(linear, c.batch, c.y.out, c.x.out, c.out_channels), out_(out), rows_(c.out_channels) {
    for (const TwoTaps& y : two_taps(c.y))
      for (const TwoTaps& x : two_taps(c.x))
        for (int64_t first = 0; first < c.in_channels; first += kColumns)
          parts_.push_back({y, x, first, std::min(kColumns, c.in_channels - first)});
    width_ = Panels(std::min(kColumns, c.in_channels)).width;
  }

  void run() {
    const auto parts = static_cast<int64_t>(parts_.size());
    const int64_t tiles = c_.batch * parts_[0].y.tiles() * parts_[0].x.tiles();
    const int64_t slices = parts >= kEnoughTasks ? 1 : std::clamp<int64_t>(tiles / kSliceTiles, 1, kEnoughTasks / parts);
    const int64_t cuts = balanced_cuts(slices, parts);  // as few as may be: each transforms the linear side
    static thread_local Scratch scratch;
    float* sums = scratch.floats(slices * parts * part_size());  // [slice, part, point, output channel, column]
    at::parallel_for(0, slices * cuts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slice = i / cuts, cut = i % cuts, first = parts * cut / cuts, last = parts * (cut + 1) / cuts;
        add(tiles * slice / slices, tiles * (slice + 1) / slices, first, last, sums + slice * parts * part_size());
      }
    });
    at::parallel_for(0, parts * c_.out_channels, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i / c_.out_channels, channel = i % c_.out_channels;
        store_taps(parts_[part], channel, sums + part * part_size() + channel * width_, slices, parts * part_size());
      }
    });
  }

 private:
  int64_t point_size() const { return c_.out_channels * width_; }
  int64_t part_size() const { return kPoints * point_size(); }

  // The sums of parts [first, last) over tiles [begin, end).
  void add(int64_t begin, int64_t end, int64_t first, int64_t last, float* sums) const {
    const int64_t a_point = rows_.count * kTileStride, b_point = kDepth * width_ + kPanel;
    const int64_t row_size = c_.out_channels + kSpill + kKernelRows;
    static thread_local Scratch scratch;
    float* a = scratch.floats(kPoints * (a_point + b_point) + 4 * row_size);
    float *b = a + kPoints * a_point, *rows = b + kPoints * b_point;
    const int64_t chunks = (end - begin + kDepth - 1) / kDepth;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t low = begin + (end - begin) * i / chunks, high = begin + (end - begin) * (i + 1) / chunks;
      pack_linear(low, high, a, a_point, rows, row_size);
      const Piece piece{0, 0, high - low};
      for (int64_t part = first; part < last; ++part) {
        const Panels panels(parts_[part].columns);
        pack_gathered(parts_[part], panels, low, high, b, b_point);
        for (int64_t point = 0; point < kPoints; ++point)
          for (int64_t p = 0; p < panels.count; ++p) {
            float* c = sums + part * part_size() + point * point_size() + p * kPanel;
            for (int64_t t = 0; t < rows_.count; ++t)
              multiply<1>(
                  rows_.height(t), panels.vectors(p),
                  {a + point * a_point + t * kTileStride, kKernelRows, b + point * b_point + p * kPanel * piece.depth,
                   c + rows_.begin(t) * width_, width_, &piece, 1, i > 0});
          }
      }
    }
  }

  // A: [point][rows of the result][tile][output channel]
  void pack_linear(int64_t low, int64_t high, float* a, int64_t a_point, float* rows, int64_t row_size) const {
    TilePlace place(parts_[0].y.tiles(), parts_[0].x.tiles(), low);
    for (int64_t k = 0; k < high - low; ++k, place.next()) {
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t y = place.y * kOutputs + i / kOutputs, x = place.x * kOutputs + i % kOutputs;
        linear_.widen_pixel(rows + i * row_size, linear_.pixel(place.n, y, x), c_.out_channels);
      }
      for (int64_t t = 0; t < rows_.count; ++t) {
        const float* row = rows + rows_.begin(t);
        transform_weight(
            load(row), load(row + row_size), load(row + 2 * row_size), load(row + 3 * row_size),
            a + t * kTileStride + k * kKernelRows, a_point);
      }
    }
  }

  // B: [point][panel][tile][column]
  void pack_gathered(
      const Part& part, const Panels& panels, int64_t low, int64_t high, float* b, int64_t b_point) const {
    const int64_t depth = high - low;
    TilePlace place(part.y.tiles(), part.x.tiles(), low);
    for (int64_t k = 0; k < depth; ++k, place.next()) {
      const auto to = [&](int64_t column) {
        const int64_t p = column / kPanel;
        return b + p * kPanel * depth + k * panels.vectors(p) * kWidth + column % kPanel;
      };
      transform_input(gathered_, part.y, part.x, place, part.first, part.first + part.columns, to, b_point);
    }
  }

  // The taps of one output channel; `row` [slices][point], kPoints sums of all columns each.
  void store_taps(const Part& part, int64_t channel, float* row, int64_t slices, int64_t slice_size) const {
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t s = 1; s < slices; ++s)
        for (int64_t n = 0; n < width_; n += kWidth) {
          float* sum = row + point * point_size() + n;
          store(sum, load(sum) + load(sum + s * slice_size));
        }
    for (int64_t n = 0; n < width_; n += kWidth) transform_output(row + n, point_size());
    for (int64_t i = 0; i < kOutputs * kOutputs; ++i) {
      const int64_t ky = part.y.taps[i / kOutputs], kx = part.x.taps[i % kOutputs];
      const int64_t tap = (channel * c_.y.kernel + ky) * c_.x.kernel + kx;
      narrow(out_ + tap * c_.in_channels + part.first, row + i * point_size(), part.columns);
    }
  }

  const Contraction& c_;
  TileImage<T> gathered_, linear_;
  T* out_;
  Tiles rows_;
  std::vector<Part> parts_;
  int64_t width_;  // of a part's sums
};

}  // namespace

void winograd_weight_grad(
    const Contraction& c, c10::ScalarType dtype, const void* gathered, const void* linear, void* out) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FilterGrad<T>(c, static_cast<const T*>(gathered), static_cast<const T*>(linear), static_cast<T*>(out)).run();
  });
}

}  // namespace fastdcgan::cpu
