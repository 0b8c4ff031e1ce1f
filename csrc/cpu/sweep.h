// One pass over a tensor [groups * samples, channels, height, width], channels_last or contiguous, with per-channel
// coefficients: elementwise (`map`) or down to per-channel sums (`reduce`).
//
// Either layout is, piece by piece, a run of elements whose coefficients repeat after `columns` elements:
//   channels_last   columns = channels, repeated until they fill whole vectors
//   contiguous      columns = one step, all of one channel, plane by plane
// so both go through the same inner loop. An `Op` brings
//   rows                                   how many rows of coefficients it reads
//   sums                                   how many sums it accumulates
//   stores                                 whether it has a result for each element
//   reads_grad                             whether it reads a second tensor, `da`
//   Coef, load(rows, column)               its coefficients for one vector of columns
//   operator()(Coef, y, da, V* sums)       the result for one vector of elements; adds to the sums
//
// How work is cut into chunks depends on the shape alone and partial sums are combined in a fixed order, in double:
// the same input gives the same bits for any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace fastdcgan::cpu {

struct Shape {
  int64_t groups, samples, channels, pixels;  // samples: of one group
  bool channels_last;
};

template <class T>
struct Tensors {
  const T* y;
  const T* da;  // null where the op reads no gradient
  T* out;       // null where nothing is stored

  Tensors at(int64_t offset) const {
    return {y + offset, da ? da + offset : nullptr, out ? out + offset : nullptr};
  }
};

constexpr int64_t kMaxRows = 4;          // rows of coefficients that an op reads, at most
constexpr int64_t kFlushRows = 256;      // float sums are this long, then go on in double
constexpr int64_t kChunkElements = 1 << 16;
constexpr int64_t kMaxChunks = 64;       // of one statistics group
constexpr int64_t kMaxColumns = 2048;
constexpr int64_t kChannelBlock = 64;    // channels of a contiguous tensor that are reduced together

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// --- the inner loop --------------------------------------------------------------------------------------------------

// `kRows` consecutive rows of `columns` elements, of which the first `count` (whole steps) are handled.
template <int kRows, class Op, class T>
inline void sweep_rows(
    const Op& op, Tensors<T> t, const float* const* coef, float* const* sums, int64_t columns, int64_t count) {
  constexpr int kSums = Op::sums;
  for (int64_t column = 0; column < count; column += kStep) {
    const typename Op::Coef k[2] = {op.load(coef, column), op.load(coef, column + kWidth)};
    V total[2][kSums ? kSums : 1];
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < kSums; ++i) total[h][i] = V(0.f);
    // All rows are read before any is written: rows 4 KiB apart would wait for each other.
    Lanes y[kRows], da[kRows];
    for (int r = 0; r < kRows; ++r) {
      y[r] = read(t.y + r * columns + column);
      if constexpr (Op::reads_grad) da[r] = read(t.da + r * columns + column);
    }
    for (int r = 0; r < kRows; ++r) {
      Lanes result;
      for (int h = 0; h < 2; ++h) result.half[h] = op(k[h], y[r].half[h], da[r].half[h], total[h]);
      if constexpr (Op::stores) {
        if (t.out) write(t.out + r * columns + column, result);
      }
    }
    for (int i = 0; i < kSums; ++i) {
      const Lanes before = read(sums[i] + column);
      write(sums[i] + column, Lanes{{before.half[0] + total[0][i], before.half[1] + total[1][i]}});
    }
  }
}

// The last `n` < kStep elements of a row, in a copy that is a whole step long.
template <class Op, class T>
void sweep_tail(const Op& op, Tensors<T> t, const float* const* coef, float* const* sums, int64_t n) {
  alignas(64) T y[kStep] = {}, da[kStep] = {}, out[kStep];
  alignas(64) float sum[Op::sums + 1][kStep] = {};
  float* rows[Op::sums + 1];
  for (int i = 0; i < Op::sums; ++i) rows[i] = sum[i];
  std::copy_n(t.y, n, y);
  if constexpr (Op::reads_grad) std::copy_n(t.da, n, da);
  sweep_rows<1>(op, Tensors<T>{y, da, t.out ? out : nullptr}, coef, rows, kStep, kStep);
  if (t.out) std::copy_n(out, n, t.out);
  for (int i = 0; i < Op::sums; ++i)
    for (int64_t j = 0; j < n; ++j) sums[i][j] += sum[i][j];
}

// `n` consecutive elements. `coef` and `sums` are arrays of `columns` floats, rounded up to whole steps.
template <class Op, class T>
void sweep(const Op& op, Tensors<T> t, const float* const* coef, float* const* sums, int64_t n, int64_t columns) {
  int64_t i = 0;
  if constexpr (Op::sums > 0) {
    // Several rows at a time, for which the sums and the coefficients are then read once.
    if (columns % kStep == 0)
      for (; i + 4 * columns <= n; i += 4 * columns) sweep_rows<4>(op, t.at(i), coef, sums, columns, columns);
  }
  for (; i < n; i += columns) {
    const int64_t count = std::min(columns, n - i), whole = count - count % kStep;
    sweep_rows<1>(op, t.at(i), coef, sums, columns, whole);
    if (whole == count) continue;
    const float* tail_coef[kMaxRows];
    float* tail_sums[Op::sums + 1];
    for (int64_t k = 0; k < Op::rows; ++k) tail_coef[k] = coef[k] + whole;
    for (int k = 0; k < Op::sums; ++k) tail_sums[k] = sums[k] + whole;
    sweep_tail(op, t.at(i + whole), tail_coef, tail_sums, count - whole);
  }
}

// --- coefficients and sums by column ---------------------------------------------------------------------------------

// Channels repeated until they fill whole steps (or one period of them, where that would be long).
struct Columns {
  int64_t channels, repeats;

  explicit Columns(int64_t c) : channels(c), repeats(1) {
    while ((c * repeats) % kStep && repeats < kStep) ++repeats;
    if (c * repeats > kMaxColumns) repeats = 1;
  }
  int64_t size() const { return channels * repeats; }
  int64_t padded() const { return round_up(size(), kStep); }
  bool as_it_lies() const { return channels % kStep == 0; }
};

// Pointers to rows of coefficients by column, from rows by channel.
class CoefRows {
 public:
  // `rows` rows of `columns.channels` floats, each `stride` floats after the one before.
  void set(const Columns& columns, const float* coef, int64_t rows, int64_t stride) {
    if (columns.as_it_lies()) {
      for (int64_t i = 0; i < rows; ++i) rows_[i] = coef + i * stride;
      return;
    }
    storage_.resize(rows * columns.padded());
    for (int64_t i = 0; i < rows; ++i) {
      float* row = storage_.data() + i * columns.padded();
      for (int64_t r = 0; r < columns.repeats; ++r)
        std::copy_n(coef + i * stride, columns.channels, row + r * columns.channels);
      rows_[i] = row;
    }
  }
  // One channel in every column of a step.
  void set_channel(const float* coef, int64_t rows, int64_t stride) {
    storage_.resize(rows * kStep);
    for (int64_t i = 0; i < rows; ++i) {
      std::fill_n(storage_.data() + i * kStep, kStep, coef[i * stride]);
      rows_[i] = storage_.data() + i * kStep;
    }
  }
  const float* const* get() const { return rows_; }

 private:
  const float* rows_[kMaxRows] = {};
  std::vector<float> storage_;
};

// --- elementwise -----------------------------------------------------------------------------------------------------

// `coef`: [Op::rows, groups, channels].
template <class Op, class T>
void map(const Op& op, const Shape& s, Tensors<T> t, const float* coef) {
  const int64_t stride = s.groups * s.channels;
  if (s.channels_last) {
    const Columns columns(s.channels);
    const int64_t group = s.samples * s.pixels * s.channels;
    const int64_t chunk = round_up(std::max<int64_t>(kChunkElements / 2, columns.size()), columns.size());
    const int64_t chunks = divide_up(group, chunk);
    at::parallel_for(0, s.groups * chunks, 1, [&](int64_t begin, int64_t end) {
      CoefRows table;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i / chunks, first = (i % chunks) * chunk;
        if (i == begin || first == 0) table.set(columns, coef + g * s.channels, Op::rows, stride);
        sweep(op, t.at(g * group + first), table.get(), nullptr, std::min(chunk, group - first), columns.size());
      }
    });
  } else {
    const int64_t grain = std::max<int64_t>(1, kChunkElements / 2 / s.pixels);
    at::parallel_for(0, s.groups * s.samples * s.channels, grain, [&](int64_t begin, int64_t end) {
      CoefRows table;
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t g = plane / (s.samples * s.channels);
        table.set_channel(coef + g * s.channels + plane % s.channels, Op::rows, stride);
        sweep(op, t.at(plane * s.pixels), table.get(), nullptr, s.pixels, kStep);
      }
    });
  }
}

// --- reductions ------------------------------------------------------------------------------------------------------
//
// A `Sink` takes the sums of one chunk. It has
//   coef(), stride()                       the coefficients by channel, and from one row of them to the next
//   start(channel, sums, count)            called with the sums of the chunk's first few elements, if `starts`
//   add(channel, sums, count)              called with double sums[Op::sums] of `count` values, for consecutive blocks

// Columns of float sums, swept over, then handed on by channel.
template <class Op>
class Accumulator {
 public:
  explicit Accumulator(int64_t width) : width_(width), storage_(Op::sums * width) {
    for (int i = 0; i < Op::sums; ++i) sums_[i] = storage_.data() + i * width;
  }
  void clear() { std::fill(storage_.begin(), storage_.end(), 0.f); }
  float* const* get() { return sums_; }
  // The sums of `many` columns from `first` on, `stride` apart.
  void total(int64_t first, int64_t many, int64_t stride, double* out) const {
    for (int i = 0; i < Op::sums; ++i) {
      out[i] = 0;
      for (int64_t j = 0; j < many; ++j) out[i] += sums_[i][first + j * stride];
    }
  }

 private:
  int64_t width_;
  std::vector<float> storage_;
  float* sums_[Op::sums];
};

template <class Op, class T, class Sink>
void reduce_channels_last(const Op& op, const Shape& s, Tensors<T> t, int64_t elements, Sink& sink) {
  const Columns columns(s.channels);
  Accumulator<Op> sums(columns.padded());
  CoefRows table;
  const auto block = [&](int64_t first, int64_t n, auto&& consume) {
    table.set(columns, sink.coef(), Op::rows, sink.stride());
    sums.clear();
    sweep(op, t.at(first), table.get(), sums.get(), n, columns.size());
    double total[Op::sums];
    for (int64_t c = 0; c < s.channels; ++c) {
      sums.total(c, columns.repeats, s.channels, total);
      consume(c, total, static_cast<double>(n / s.channels));
    }
  };
  if constexpr (Sink::starts) {
    block(0, std::min(elements, 8 * columns.size()), [&](int64_t c, double* x, double n) { sink.start(c, x, n); });
  }
  const int64_t size = kFlushRows * columns.size();
  for (int64_t i = 0; i < elements; i += size) {
    block(i, std::min(size, elements - i), [&](int64_t c, double* x, double n) { sink.add(c, x, n); });
  }
}

// Channels [c0, c1) of samples [n0, n1); `t` is at the group's first sample.
template <class Op, class T, class Sink>
void reduce_contiguous(
    const Op& op, const Shape& s, Tensors<T> t, int64_t n0, int64_t n1, int64_t c0, int64_t c1, Sink& sink) {
  const int64_t segment = std::min(s.pixels, kFlushRows * kStep);
  const int64_t together = std::max<int64_t>(1, kFlushRows * kStep / s.pixels);  // samples between two flushes
  Accumulator<Op> sums((c1 - c0) * kStep);
  CoefRows table;
  const auto block = [&](int64_t from, int64_t to, int64_t pixel, int64_t n, auto&& consume) {
    sums.clear();
    for (int64_t sample = from; sample < to; ++sample) {
      for (int64_t c = c0; c < c1; ++c) {
        float* own[Op::sums];
        for (int i = 0; i < Op::sums; ++i) own[i] = sums.get()[i] + (c - c0) * kStep;
        table.set_channel(sink.coef() + c, Op::rows, sink.stride());
        sweep(op, t.at((sample * s.channels + c) * s.pixels + pixel), table.get(), own, n, kStep);
      }
    }
    double total[Op::sums];
    for (int64_t c = c0; c < c1; ++c) {
      sums.total((c - c0) * kStep, kStep, 1, total);
      consume(c, total, static_cast<double>((to - from) * n));
    }
  };
  if constexpr (Sink::starts) {
    block(n0, n0 + 1, 0, std::min(s.pixels, 8 * kStep), [&](int64_t c, double* x, double n) { sink.start(c, x, n); });
  }
  for (int64_t sample = n0; sample < n1; sample += together) {
    for (int64_t pixel = 0; pixel < s.pixels; pixel += segment) {
      block(sample, std::min(n1, sample + together), pixel, std::min(segment, s.pixels - pixel),
            [&](int64_t c, double* x, double n) { sink.add(c, x, n); });
    }
  }
}

// How many chunks each group is cut into. Sink number g * chunks + i takes the i-th chunk of group g.
inline int64_t chunk_size(int64_t units, int64_t elements_per_unit) {
  return std::max(divide_up(units, kMaxChunks), std::max<int64_t>(1, kChunkElements / elements_per_unit));
}

inline int64_t chunk_count(const Shape& s) {
  const int64_t units = s.channels_last ? s.samples * s.pixels : s.samples;
  const int64_t each = s.channels_last ? s.channels : std::min(s.channels, kChannelBlock) * s.pixels;
  return units == 0 || each == 0 ? 0 : divide_up(units, chunk_size(units, each));
}

template <class Op, class T, class Sink>
void reduce(const Op& op, const Shape& s, Tensors<T> t, std::vector<Sink>& sinks) {
  const int64_t chunks = chunk_count(s);
  const int64_t group = s.samples * s.channels * s.pixels;
  if (s.channels_last) {
    const int64_t rows = s.samples * s.pixels;
    const int64_t size = chunks ? chunk_size(rows, s.channels) : 0;
    at::parallel_for(0, s.groups * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i / chunks, first = (i % chunks) * size;
        reduce_channels_last(
            op, s, t.at(g * group + first * s.channels), std::min(size, rows - first) * s.channels, sinks[i]);
      }
    });
  } else {
    const int64_t blocks = divide_up(s.channels, kChannelBlock);
    const int64_t size = chunks ? chunk_size(s.samples, std::min(s.channels, kChannelBlock) * s.pixels) : 0;
    at::parallel_for(0, s.groups * chunks * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t chunk = i / blocks, c0 = (i % blocks) * kChannelBlock;
        const int64_t g = chunk / chunks, n0 = (chunk % chunks) * size;
        reduce_contiguous(op, s, t.at(g * group), n0, std::min(s.samples, n0 + size), c0,
                          std::min(s.channels, c0 + kChannelBlock), sinks[chunk]);
      }
    });
  }
}

}  // namespace fastdcgan::cpu
