// `weight_grad`: pixels are the depth of a dense product. Taps with whole panels of channels leave out the pixels at which
// they read padding; else all taps of a row or more are columns side by side.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "gather.h"
#include "sweep.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kTileStride = kDepth * kKernelRows + kWidth;  // between tiles of A; its stores are whole vectors
constexpr int64_t kMaxColumns = 256;                            // that taps are put together to
constexpr int64_t kEnoughTasks = 16;
constexpr int64_t kSlicePixels = 4096;  // of one task, where pixels are divided among tasks

// Columns of the result: by tap along y, tap along x, channel.
struct Columns {
  int64_t begin, count;
};

template <class T>
class WeightGrad {
 public:
  WeightGrad(const Contraction& c, const T* gathered, const T* linear, T* out)
      : c_(c), gathered_{gathered, c.y.in, c.x.in, c.in_channels, gathered + c.batch * c.y.in * c.x.in * c.in_channels},
        linear_(linear), linear_end_(linear + c.batch * c.y.out * c.x.out * c.out_channels), out_(out),
        tiles_(c.out_channels), exact_(c.in_channels % kPanel == 0), y_(axis_classes(c.y, !exact_)),
        x_(axis_classes(c.x, !exact_)) {
    const int64_t row = c.x.kernel * c.in_channels, all = c.y.kernel * row;
    const int64_t step = exact_ ? c.in_channels : row * std::clamp<int64_t>(kMaxColumns / row, 1, c.y.kernel);
    for (int64_t begin = 0; begin < all; begin += step) groups_.push_back({begin, std::min(step, all - begin)});
    width_ = Panels(step).width;
  }

  void run() {
    const auto groups = static_cast<int64_t>(groups_.size());
    const int64_t pixels = c_.batch * c_.y.out * c_.x.out, size = c_.out_channels * width_;
    const int64_t slices =
        groups >= kEnoughTasks ? 1 : std::clamp<int64_t>(pixels / kSlicePixels, 1, kEnoughTasks / groups);
    const int64_t threads = at::get_num_threads();
    const int64_t parts = threads == 1 ? 1 : std::min(groups, 2 * threads);
    static thread_local Scratch scratch;
    float* sums = scratch.floats(slices * groups * size);  // [slice, group, output channel, column]
    at::parallel_for(0, slices * parts, 1, [&](int64_t begin, int64_t end) {
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
        float* row = sums + i * width_;
        for (int64_t s = 1; s < slices; ++s)
          for (int64_t n = 0; n < width_; ++n) row[n] += row[s * groups * size + n];
        const Columns& columns = groups_[i / c_.out_channels];
        narrow(out_ + i % c_.out_channels * c_.taps() * c_.in_channels + columns.begin, row, columns.count);
      }
    });
  }

 private:
  // Adds the products of pixels [begin, end) of a class to the sums of some groups of columns.
  void add(const RowClass& rows, int64_t begin, int64_t end, int64_t first, int64_t last, float* to) const {
    static thread_local Scratch scratch;
    const int64_t row_size = std::max(c_.out_channels, width_) + kSpill + kWidth;
    float* a = scratch.floats(tiles_.count * kTileStride + kDepth * width_ + row_size);
    float *b = a + tiles_.count * kTileStride, *row = b + kDepth * width_;
    const int64_t chunks = (end - begin + kDepth - 1) / kDepth;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t low = begin + (end - begin) * i / chunks, high = begin + (end - begin) * (i + 1) / chunks;
      pack_linear(rows, low, high, a, row);
      for (int64_t g = first; g < last; ++g) {
        const std::vector<Segment> parts = columns_in(rows, groups_[g]);
        if (parts.empty()) continue;
        const Panels panels(groups_[g].count);
        pack_gathered(rows, low, high, parts, panels, b, row);
        const Piece piece{0, 0, high - low};
        float* c = to + (g - first) * c_.out_channels * width_;
        for (int64_t p = 0; p < panels.count; ++p)
          for (int64_t t = 0; t < tiles_.count; ++t)
            multiply<1>(
                tiles_.height(t), panels.vectors(p),
                {a + t * kTileStride, kKernelRows, b + p * kPanel * piece.depth, c + tiles_.begin(t) * width_ + p * kPanel,
                 width_, &piece, 1, true});
      }
    }
  }

  // Where columns lie in the rows of a class; nothing if their tap is not among its taps.
  std::vector<Segment> columns_in(const RowClass& rows, const Columns& columns) const {
    if (!exact_) return segments(rows, columns.begin, columns.begin + columns.count);
    const int64_t tap = columns.begin / c_.in_channels;
    const auto y = std::find(rows.y->taps.begin(), rows.y->taps.end(), tap / c_.x.kernel);
    const auto x = std::find(rows.x->taps.begin(), rows.x->taps.end(), tap % c_.x.kernel);
    if (y == rows.y->taps.end() || x == rows.x->taps.end()) return {};
    const int64_t place = x - rows.x->taps.begin();
    return {{y - rows.y->taps.begin(), place * c_.in_channels, c_.in_channels, place, place}};
  }

  // A: [tile][pixel][output channel]
  void pack_linear(const RowClass& rows, int64_t low, int64_t high, float* a, float* row) const {
    Place place(rows, low);
    for (int64_t k = 0; k < high - low; ++k, place.next(rows)) {
      const int64_t oy = rows.y->outputs[place.y], ox = rows.x->outputs[place.x];
      widen(row, linear_ + ((place.n * c_.y.out + oy) * c_.x.out + ox) * c_.out_channels, c_.out_channels, linear_end_);
      for (int64_t t = 0; t < tiles_.count; ++t)
        store(a + t * kTileStride + k * kKernelRows, load(row + tiles_.begin(t)));
    }
  }

  // B: [panel][pixel][column]
  void pack_gathered(
      const RowClass& rows, int64_t low, int64_t high, const std::vector<Segment>& parts, const Panels& panels, float* b,
      float* row) const {
    const int64_t depth = high - low;
    Place place(rows, low);
    for (int64_t k = 0; k < depth; ++k, place.next(rows)) {
      if (exact_) {
        const Segment& s = parts.front();
        const int64_t iy = rows.y->first[place.y] + s.y * rows.y->step;
        const int64_t ix = rows.x->first[place.x] + s.first * rows.x->step;
        const T* from = gathered_.data + ((place.n * c_.y.in + iy) * c_.x.in + ix) * c_.in_channels;
        for (int64_t p = 0; p < panels.count; ++p)
          widen(b + (p * depth + k) * kPanel, from + p * kPanel, kPanel, gathered_.end);
      } else {
        gather_row(row, gathered_, rows, place, parts);
        std::fill(row + panels.columns, row + panels.width, 0.f);
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t vectors = panels.vectors(p);
          float* to = b + p * kPanel * depth + k * vectors * kWidth;
          for (int64_t v = 0; v < vectors; ++v) store(to + v * kWidth, load(row + p * kPanel + v * kWidth));
        }
      }
    }
  }

  const Contraction& c_;
  Image<T> gathered_;
  const T *linear_, *linear_end_;
  T* out_;
  Tiles tiles_;
  bool exact_;
  std::vector<AxisClass> y_, x_;
  std::vector<Columns> groups_;
  int64_t width_ = 0;  // of a group's sums
};

}  // namespace

void weight_grad(const Contraction& c, c10::ScalarType dtype, const void* gathered, const void* linear, void* out) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    WeightGrad<T>(c, static_cast<const T*>(gathered), static_cast<const T*>(linear), static_cast<T*>(out)).run();
  });
}

}  // namespace fastdcgan::cpu
