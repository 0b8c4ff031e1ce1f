// Statistics of outputs that are computed in blocks of rows.
#pragma once

#include <vector>

#include "common/moments.h"
#include "cpu/contraction/contraction.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

// Per channel, mean and sum of squared deviations of rows `row(0)` to `row(rows - 1)` of `width` floats.
template <class Row>
void moments(const Row& row, int64_t rows, int64_t width, float* mean, float* m2) {
  for (int64_t n = 0; n < width; n += kWidth) {
    Floats sum{}, squares{};
    for (int64_t r = 0; r < rows; ++r) sum += load(row(r) + n);
    const Floats mu = sum / static_cast<float>(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const Floats d = load(row(r) + n) - mu;
      squares += d * d;
    }
    store(mean + n, mu);
    store(m2 + n, squares);
  }
}

// [3, groups, channels] from those of the blocks: [blocks, 2, width]. A block has `rows` rows, of samples that share the
// statistics `stat_group`.
template <class Block>
void combine(const std::vector<Block>& blocks, const float* partial, int64_t width, int64_t channels, const Epilogue& f) {
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
