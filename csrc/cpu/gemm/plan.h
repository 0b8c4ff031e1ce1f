// How `conv` and `conv_transpose` are dense products: which outputs are rows together, and where their columns meet the
// packed weight.
#pragma once

#include <vector>

#include "cpu/gemm/gather.h"

namespace fastdcgan::cpu {

// Columns of A that are gathered together, and where they meet B.
struct Chunk {
  std::vector<Segment> parts;
  std::vector<Piece> pieces;
  int64_t columns, filling;  // of the parts; zeros after them, up to a whole unit
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
  // Pieces begin and end at multiples of `unit`: 1, or what a tile takes along k at once. With two `terms` (split_bf16.h)
  // the low terms of A lie kDepth columns after the high ones, and the low terms of B after all rows of the high ones.
  Plan(const Contraction&, int64_t unit, int64_t terms);

  // Of at most `most_rows` rows.
  std::vector<Block> blocks(int64_t batch, int64_t stat_groups, int64_t most_rows) const;

 private:
  Group group(const Contraction&, const RowClass&) const;

  int64_t unit_, terms_;
  DepthOrder order_;
  std::vector<AxisClass> y_, x_;
  std::vector<Group> groups_;
};

}  // namespace fastdcgan::cpu
