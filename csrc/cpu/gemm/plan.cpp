#include "cpu/gemm/plan.h"

#include <algorithm>

#include "cpu/gemm/split_bf16.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kRowsPerVisit = 32;  // reading the weights once costs about as much as multiplying so many rows

double cost(const Contraction& c, const std::vector<AxisClass>& ys, const std::vector<AxisClass>& xs) {
  double sum = 0;
  for (const AxisClass& y : ys)
    for (const AxisClass& x : xs) {
      const RowClass rows = row_class(c, y, x);
      sum += static_cast<double>(rows.depth()) * static_cast<double>(c.batch * rows.pixels() + kRowsPerVisit);
    }
  return sum;
}

}  // namespace

Plan::Plan(const Contraction& c, int64_t unit, int64_t terms)
    : unit_(unit), terms_(terms), order_(c.y, c.x, c.in_channels, unit) {
  // Where a tap's rows are no whole units, all taps of a phase stay together: B has them filled up as one.
  const bool apart = c.in_channels % unit == 0;
  double best = 0;
  for (const bool padded_y : {false, true}) {
    for (const bool padded_x : {false, true}) {
      if (!apart && !(padded_y && padded_x)) continue;
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

std::vector<Block> Plan::blocks(int64_t batch, int64_t stat_groups, int64_t most_rows) const {
  std::vector<Block> found;
  for (const Group& group : groups_) {
    const int64_t rows = batch / stat_groups * group.rows.pixels();
    const int64_t count = (rows + most_rows - 1) / most_rows;
    for (int64_t s = 0; s < stat_groups; ++s)
      for (int64_t i = 0; i < count; ++i)
        found.push_back({&group, s * rows + rows * i / count, rows * (i + 1) / count - rows * i / count, s});
  }
  return found;
}

Group Plan::group(const Contraction& c, const RowClass& rows) const {
  // Stretches of columns whose rows of B are neighbours.
  std::vector<Piece> stretches;
  int64_t column = 0;
  for (const int64_t ky : rows.y->taps)
    for (const int64_t kx : rows.x->taps) {
      const int64_t b = order_.row(ky, kx);
      if (!stretches.empty() && stretches.back().b + stretches.back().depth == b) {
        stretches.back().depth += c.in_channels;
      } else {
        stretches.push_back({column, b, c.in_channels});
      }
      column += c.in_channels;
    }
  Group result{rows, {}};
  const int64_t depth = rows.depth(), units = (depth + unit_ - 1) / unit_;
  const int64_t chunks = (units * unit_ + kDepth - 1) / kDepth;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = units * i / chunks * unit_, whole = units * (i + 1) / chunks * unit_;
    const int64_t end = std::min(whole, depth);
    Chunk chunk{segments(rows, begin, end), {}, end - begin, whole - end};
    for (const Piece& s : stretches) {
      const int64_t low = std::max(begin, s.a), high = std::min(end, s.a + s.depth);
      if (low < high) chunk.pieces.push_back({low - begin, s.b + low - s.a, high - low});
    }
    chunk.pieces.back().depth += chunk.filling;
    if (terms_ == 2) chunk.pieces = three_products(chunk.pieces, kDepth, order_.rows());
    result.chunks.push_back(std::move(chunk));
  }
  return result;
}

}  // namespace fastdcgan::cpu
