// Statistics of outputs that are computed in blocks of rows.
#pragma once

#include <vector>

#include "common/moments.h"
#include "cpu/contraction/contraction.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

// Rounds rows `row(0)` to `row(rows - 1)` of `width` floats to what T stores of them, and gives their mean and sum of
// squared deviations by column, exactly so where they are all equal: in a constant channel whatever is left of
// y - mean is multiplied by 1/sqrt(eps). Hence of rounded floats, and by their distance to the first.
template <class T, class Row>
void round_and_sum(const Row& row, int64_t rows, int64_t width, float* mean, float* m2) {
  for (int64_t n = 0; n < width; n += kWidth) {
    V first(0.f), sum(0.f), squares(0.f);
    for (int64_t r = 0; r < rows; ++r) {
      const V x = rounded<T>(V::loadu(row(r) + n));
      if constexpr (!std::is_same_v<T, float>) x.store(row(r) + n);
      if (r == 0) first = x;
      sum = sum + (x - first);
    }
    const V mu = first + sum / V(static_cast<float>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      const V d = V::loadu(row(r) + n) - mu;
      squares = at::vec::fmadd(d, d, squares);
    }
    mu.store(mean + n);
    squares.store(m2 + n);
  }
}

// [3, groups, channels] from those of the blocks: [blocks, 2, width]. A block has `rows` rows, of samples that share
// the statistics `stat_group`.
template <class Block>
void combine(
    const std::vector<Block>& blocks, const float* partial, int64_t width, int64_t channels, const Epilogue& f) {
  std::vector<Moments<double>> all(f.stat_groups * channels);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const float *mean = partial + i * 2 * width, *m2 = mean + width;
    Moments<double>* group = all.data() + blocks[i].stat_group * channels;
    const auto count = static_cast<double>(blocks[i].rows);
    for (int64_t n = 0; n < channels; ++n) group[n].merge({count, mean[n], m2[n]});
  }
  const int64_t row = f.stat_groups * channels;
  for (int64_t i = 0; i < row; ++i) {
    f.stats[i] = static_cast<float>(all[i].mean);
    f.stats[row + i] = static_cast<float>(all[i].m2 / all[i].count);
    f.stats[2 * row + i] = static_cast<float>(all[i].m2 / (all[i].count - 1));
  }
}

}  // namespace fastdcgan::cpu
