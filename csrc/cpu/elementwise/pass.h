// One pass over a tensor [groups * samples, channels, height, width], channels_last or contiguous, with per-channel
// coefficients: elementwise (`map`) or down to per-channel sums (`reduce`). What is done to the elements is an
// `InnerLoop`.
//
// How work is cut into chunks depends on the shape alone and partial sums are combined in a fixed order, in double:
// the same input gives the same bits for any number of threads.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace fastdcgan::cpu {

struct Shape {
  int64_t groups, samples, channels, pixels;  // samples: of one group
  bool channels_last;

  int64_t group_size() const { return samples * channels * pixels; }
};

// A dense tensor of float, bfloat16 or half, the gradient that goes with it, and where the result goes.
struct Memory {
  const void* y;
  const void* da;
  void* out;
  bool non_temporal = false;  // store past the caches: whole vectors of `out`, each aligned to its size

  Memory at(int64_t bytes) const {
    return {static_cast<const char*>(y) + bytes, da ? static_cast<const char*>(da) + bytes : nullptr,
            out ? static_cast<char*>(out) + bytes : nullptr, non_temporal};
  }
};

constexpr int kMaxRows = 5, kMaxSums = 3, kMaxStep = 32;

// An inner loop over `rows` rows of `columns` elements, `stride` apart, that share coefficients and sums by column:
// rows of `columns` floats, rounded up to whole steps. `sums` are added to.
struct InnerLoop {
  const void* op;
  void (*run)(
      const void* op, Memory, const float* const* coef, float* const* sums, int64_t rows, int64_t columns,
      int64_t stride);
  int rows, sums;     // of coefficients; of results per column
  int64_t step;       // elements that are handled at once
  int64_t item_size;  // bytes of one element
};

// Takes the sums of one chunk.
struct Accumulator {
  virtual ~Accumulator() = default;
  // Coefficients by channel, and how far apart the rows of them are. They may change from block to block.
  virtual const float* coef() const = 0;
  virtual int64_t stride() const = 0;
  // Double sums [loop.sums, channels] of `count` values each, of `channels` channels from `first` on. Called for
  // consecutive blocks of the chunk.
  virtual void add(int64_t first, int64_t channels, const double* sums, double count) = 0;
  // The same of the chunk's first few values, before any `add`; only if `starts()`.
  virtual bool starts() const { return false; }
  virtual void start(int64_t, int64_t, const double*, double) {}
};

// `coef`: [loop.rows, groups, channels].
void map(const InnerLoop& loop, const Shape&, Memory, const float* coef);

// How many chunks each group is cut into; `accumulators[g * chunks + i]` takes the i-th of group g.
int64_t chunk_count(const InnerLoop&, const Shape&);
void reduce(const InnerLoop& loop, const Shape&, Memory, const std::vector<Accumulator*>& accumulators);

}  // namespace fastdcgan::cpu
