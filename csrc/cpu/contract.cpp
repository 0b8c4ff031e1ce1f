// `conv` and `conv_transpose`: outputs that read through the same taps are the rows of a dense product, with nothing
// multiplied by padding or by zeros between pixels.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "block_stats.h"
#include "finish.h"
#include "gather.h"
#include "pack.h"
#include "scatter.h"
#include "sweep.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kBlockRows = 8 * kKernelRows;
constexpr int64_t kRowsPerVisit = 32;  // reading the weights once costs about as much as multiplying so many rows

// Columns of A that are gathered together, and where they meet B.
struct Chunk {
  std::vector<Segment> parts;
  std::vector<Piece> pieces;
};

struct Group {
  RowClass rows;
  std::vector<Chunk> chunks;
};

// Rows of one class, of samples that share statistics.
struct Block {
  const Group* group;
  int64_t first, rows, stat_group;
};

class Plan {
 public:
  explicit Plan(const Contraction& c) : y_order_(c.y), x_order_(c.x) {
    double best = 0;
    for (const bool padded_y : {false, true}) {
      for (const bool padded_x : {false, true}) {
        std::vector<AxisClass> y = axis_classes(c.y, padded_y), x = axis_classes(c.x, padded_x);
        const double found = cost(c, y, x);
        if (!y_.empty() && found >= best) continue;
        best = found;
        y_ = std::move(y);
        x_ = std::move(x);
      }
    }
    for (const AxisClass& y : y_)
      for (const AxisClass& x : x_) groups_.push_back(group(c, row_class(c, y, x)));
  }

  std::vector<Block> blocks(int64_t batch, int64_t stat_groups) const {
    std::vector<Block> found;
    for (const Group& group : groups_) {
      const int64_t rows = batch / stat_groups * group.rows.pixels();
      const int64_t count = (rows + kBlockRows - 1) / kBlockRows;
      for (int64_t s = 0; s < stat_groups; ++s)
        for (int64_t i = 0; i < count; ++i)
          found.push_back({&group, s * rows + rows * i / count, rows * (i + 1) / count - rows * i / count, s});
    }
    return found;
  }

 private:
  static double cost(const Contraction& c, const std::vector<AxisClass>& ys, const std::vector<AxisClass>& xs) {
    double sum = 0;
    for (const AxisClass& y : ys)
      for (const AxisClass& x : xs) {
        const RowClass rows = row_class(c, y, x);
        sum += static_cast<double>(rows.depth()) * static_cast<double>(c.batch * rows.pixels() + kRowsPerVisit);
      }
    return sum;
  }

  Group group(const Contraction& c, const RowClass& rows) const {
    // Stretches of columns whose rows of B are neighbours.
    std::vector<Piece> stretches;
    int64_t column = 0;
    for (const int64_t ky : rows.y->taps)
      for (const int64_t kx : rows.x->taps) {
        const int64_t b = tap_place(y_order_, x_order_, ky, kx) * c.in_channels;
        if (!stretches.empty() && stretches.back().b + stretches.back().depth == b) {
          stretches.back().depth += c.in_channels;
        } else {
          stretches.push_back({column, b, c.in_channels});
        }
        column += c.in_channels;
      }
    Group result{rows, {}};
    const int64_t depth = rows.depth(), chunks = (depth + kDepth - 1) / kDepth;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t begin = depth * i / chunks, end = depth * (i + 1) / chunks;
      Chunk chunk{segments(rows, begin, end), {}};
      for (const Piece& s : stretches) {
        const int64_t low = std::max(begin, s.a), high = std::min(end, s.a + s.depth);
        if (low < high) chunk.pieces.push_back({low - begin, s.b + low - s.a, high - low});
      }
      result.chunks.push_back(std::move(chunk));
    }
    return result;
  }

  TapOrder y_order_, x_order_;
  std::vector<AxisClass> y_, x_;
  std::vector<Group> groups_;
};

template <class T>
class Gather {
 public:
  Gather(const Contraction& c, const T* in, const float* weight, T* out, const Finish& finish, const Finisher& finisher)
      : c_(c), in_{in, c.y.in, c.x.in, c.in_channels, in + c.batch * c.y.in * c.x.in * c.in_channels}, weight_(weight),
        out_(out), finish_(finish), finisher_(finisher), panels_(c.out_channels) {}

  void run() {
    const Plan plan(c_);
    const std::vector<Block> blocks = plan.blocks(c_.batch, finish_.groups);
    std::vector<float> partial(finish_.stats ? blocks.size() * 2 * panels_.width : 0);
    // Where there are fewer blocks than threads, each is cut into ranges of panels.
    const int64_t many = static_cast<int64_t>(blocks.size()), threads = at::get_num_threads();
    const int64_t cuts = std::clamp<int64_t>((threads + many - 1) / std::max<int64_t>(many, 1), 1, panels_.count);
    at::parallel_for(0, many * cuts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t cut = i % cuts;
        float* moments = finish_.stats ? partial.data() + i / cuts * 2 * panels_.width : nullptr;
        block(blocks[i / cuts], panels_.count * cut / cuts, panels_.count * (cut + 1) / cuts, moments);
      }
    });
    if (finish_.stats) combine(blocks, partial.data(), panels_.width, c_.out_channels, finish_);
  }

 private:
  // Columns of panels [first, last) of a block.
  void block(const Block& b, int64_t first, int64_t last, float* partial) const {
    static thread_local Scratch scratch;
    const int64_t begin = first * kPanel, width = std::min(panels_.width, last * kPanel) - begin;
    float *a = scratch.floats(kBlockRows * (kDepthStride + panels_.width)), *c = a + kBlockRows * kDepthStride;
    const RowClass& rows = b.group->rows;
    const Tiles tiles(b.rows);
    bool add = false;
    for (const Chunk& chunk : b.group->chunks) {
      Place place(rows, b.first);
      for (int64_t r = 0; r < b.rows; ++r, place.next(rows))
        gather_row(a + r * kDepthStride, in_, rows, place, chunk.parts);
      for (int64_t p = first; p < last; ++p) {
        const float* panel = weight_ + p * kPanel * c_.taps() * c_.in_channels;
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t row = tiles.begin(t);
          multiply<kDepthStride>(
              tiles.height(t), panels_.vectors(p),
              {a + row * kDepthStride, 1, panel, c + row * width + p * kPanel - begin, width, chunk.pieces.data(),
               static_cast<int64_t>(chunk.pieces.size()), add});
        }
      }
      add = true;
    }
    if (!add) std::fill_n(c, b.rows * width, 0.f);
    if (partial) {
      const auto sums = [&](int64_t r) { return c + r * width; };
      moments(sums, b.rows, width, partial + begin, partial + panels_.width + begin);
    }
    const int64_t columns = std::min(width, c_.out_channels - begin);
    Place place(rows, b.first);
    for (int64_t r = 0; r < b.rows; ++r, place.next(rows)) {
      float* sums = c + r * width;
      finisher_.run(sums, begin, width);
      const int64_t oy = rows.y->outputs[place.y], ox = rows.x->outputs[place.x];
      narrow(out_ + ((place.n * c_.y.out + oy) * c_.x.out + ox) * c_.out_channels + begin, sums, columns);
    }
  }

  const Contraction& c_;
  Image<T> in_;
  const float* weight_;
  T* out_;
  const Finish& finish_;
  const Finisher& finisher_;
  Panels panels_;
};

}  // namespace

bool contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out, const Finish& finish) {
  static thread_local Scratch scratch;
  const Finisher finisher(finish, c.out_channels);
  if (!finisher.known()) return false;
  if (!finish.stats && scatters(c)) {
    scatter(c, dtype, in, weight, out, finish);
    return true;
  }
  float* packed = scratch.floats(packed_size(c));
  pack_weight(c, dtype, weight, packed);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Gather<T>(c, static_cast<const T*>(in), packed, static_cast<T*>(out), finish, finisher).run();
  });
  return true;
}

}  // namespace fastdcgan::cpu
