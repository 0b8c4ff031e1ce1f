// Each layout becomes rows of columns that share their coefficients:
//   channels_last           a row is a pixel, or several, so that its channels fill whole steps
//   contiguous, few pixels  a row is a sample: all pixels of one channel, then of the next
//   contiguous              each plane by itself: a row is one step of it
#include "cpu/elementwise/pass.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kFlushRows = 256;  // float sums are this long, then go on in double
constexpr int64_t kStartRows = 8;    // what a chunk starts with
constexpr int64_t kChunkElements = 1 << 16;
constexpr int64_t kMaxChunks = 64;     // of one statistics group
constexpr int64_t kMaxColumns = 2048;  // coefficients and sums of a row stay in the first-level cache
constexpr int64_t kPlaneSteps = 8;     // planes of fewer steps are put together into rows

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// What the columns of a row are: `repeats` times all `channels`, `pixels` columns each.
struct Columns {
  int64_t channels, pixels = 1, repeats = 1;

  int64_t size() const { return channels * pixels * repeats; }
};

Columns channels_last_columns(int64_t channels, int64_t step) {
  int64_t repeats = 1;
  while ((channels * repeats) % step) ++repeats;
  return {channels, 1, channels * repeats > kMaxColumns ? 1 : repeats};
}

// Rows of coefficients by column, from rows by channel.
class CoefRows {
 public:
  // `coef`: rows of `columns.channels` floats, each `stride` floats after the one before.
  const float* const* expand(const Columns& columns, int64_t step, const float* coef, int rows, int64_t stride) {
    const int64_t padded = round_up(columns.size(), step);
    const bool as_it_lies = padded == columns.channels;
    if (!as_it_lies) storage_.resize(rows * padded);
    for (int i = 0; i < rows; ++i) {
      const float* from = coef + i * stride;
      rows_[i] = as_it_lies ? from : storage_.data() + i * padded;
      if (as_it_lies) continue;
      float* to = storage_.data() + i * padded;
      for (int64_t r = 0; r < columns.repeats; ++r)
        for (int64_t c = 0; c < columns.channels; ++c) to = std::fill_n(to, columns.pixels, from[c]);
    }
    return rows_;
  }

 private:
  const float* rows_[kMaxRows] = {};
  std::vector<float> storage_;
};

// Float sums by column, and from them double ones by channel.
class ColumnSums {
 public:
  ColumnSums(int sums, const Columns& columns, int64_t step)
      : columns_(columns), sums_(sums), width_(round_up(columns.size(), step)), storage_(sums * width_),
        totals_(sums * columns.channels) {
    for (int i = 0; i < sums_; ++i) rows_[i] = storage_.data() + i * width_;
  }
  void clear() { std::fill(storage_.begin(), storage_.end(), 0.f); }
  float* const* rows() { return rows_; }
  // [sums, channels]
  const double* by_channel() {
    std::fill(totals_.begin(), totals_.end(), 0.);
    const int64_t channels = columns_.channels, pixels = columns_.pixels;
    for (int i = 0; i < sums_; ++i) {
      double* total = totals_.data() + i * channels;
      for (int64_t r = 0; r < columns_.repeats; ++r) {
        const float* row = rows_[i] + r * channels * pixels;
        if (pixels == 1) {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) total[c] += row[c];
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < pixels; ++p) sum += row[c * pixels + p];
            total[c] += sum;
          }
        }
      }
    }
    return totals_.data();
  }

 private:
  Columns columns_;
  int sums_;
  int64_t width_;
  std::vector<float> storage_;
  std::vector<double> totals_;
  float* rows_[kMaxSums] = {};
};

// Elements that are swept together: `rows` rows and `rest` elements of one more; the same again `repeat` times.
struct Tile {
  int64_t first;  // element of the group
  int64_t rows, rest, stride;
  int64_t repeat = 1, repeat_stride = 0;
};

constexpr int64_t kAllRows = int64_t{1} << 40;

// How one group of the tensor is cut: into chunks (of pixels in channels_last, else of samples) and, if contiguous, into
// blocks of channels. It is the same for any number of threads.
class Cut {
 public:
  Cut(const Shape& s, int64_t step) : s_(s), step_(step) {
    if (s.group_size() == 0) return;
    planes_ = !s.channels_last && s.pixels >= kPlaneSteps * step;
    if (s.channels_last) {
      columns_ = channels_last_columns(s.channels, step);
    } else if (planes_) {
      columns_ = {1, step};
    } else {
      columns_ = {std::clamp<int64_t>(kMaxColumns / 2 / s.pixels, 1, s.channels), s.pixels};
    }
    blocks_ = divide_up(s.channels, columns_.channels);
    units_ = s.channels_last ? divide_up(s.samples * s.pixels, columns_.repeats) : s.samples;
    const int64_t unit_size = planes_ ? s.pixels : columns_.size();
    chunk_ = std::max({int64_t{1}, kChunkElements / unit_size, divide_up(units_, kMaxChunks)});
    chunks_ = divide_up(units_, chunk_);
  }
  int64_t chunks() const { return chunks_; }
  int64_t blocks() const { return blocks_; }
  int64_t first_channel(int64_t block) const { return block * columns_.channels; }
  Columns columns(int64_t block) const {
    return {std::min(columns_.channels, s_.channels - first_channel(block)), columns_.pixels, columns_.repeats};
  }

  // Calls `f(tile)` for the tiles of one chunk and block, each of about `max_rows` rows at most.
  template <class F>
  void tiles(int64_t chunk, int64_t block, int64_t max_rows, F&& f) const {
    const int64_t begin = chunk * chunk_, end = std::min(units_, begin + chunk_);
    const int64_t sample = s_.channels * s_.pixels, start = first_channel(block) * s_.pixels;
    if (planes_) {
      const int64_t together = std::clamp<int64_t>(max_rows * step_ / s_.pixels, 1, end - begin);
      const int64_t segment = std::min(max_rows * step_, s_.pixels);
      for (int64_t n = begin; n < end; n += together) {
        for (int64_t p = 0; p < s_.pixels; p += segment) {
          const int64_t size = std::min(segment, s_.pixels - p);
          f(Tile{n * sample + start + p, size / step_, size % step_, step_, std::min(together, end - n), sample});
        }
      }
      return;
    }
    const int64_t stride = s_.channels_last ? columns_.size() : sample;
    for (int64_t u = begin; u < end; u += max_rows) {
      const int64_t rows = std::min(max_rows, end - u);
      if (s_.channels_last) {
        const int64_t size = std::min(rows * stride, s_.group_size() - u * stride);
        f(Tile{u * stride, size / stride, size % stride, stride});
      } else {
        f(Tile{u * stride + start, rows, 0, stride});
      }
    }
  }

 private:
  Shape s_;
  int64_t step_;
  Columns columns_{0};
  int64_t units_ = 0, chunk_ = 1, chunks_ = 0, blocks_ = 0;
  bool planes_ = false;
};

void pass_tile(
    const InnerLoop& loop, Memory m, const Tile& t, int64_t columns, const float* const* coef, float* const* sums) {
  for (int64_t i = 0; i < t.repeat; ++i) {
    const int64_t first = t.first + i * t.repeat_stride;
    if (t.rows) loop.run(loop.op, m.at(first * loop.item_size), coef, sums, t.rows, columns, t.stride);
    const int64_t rest = first + t.rows * t.stride;
    if (t.rest) loop.run(loop.op, m.at(rest * loop.item_size), coef, sums, 1, t.rest, t.stride);
  }
}

void reduce_chunk(const InnerLoop& loop, const Cut& cut, Memory m, int64_t chunk, int64_t block, Accumulator& accumulator) {
  const Columns columns = cut.columns(block);
  const int64_t channel = cut.first_channel(block);
  ColumnSums sums(loop.sums, columns, loop.step);
  CoefRows table;
  const auto run = [&](const Tile& t, auto&& consume) {
    sums.clear();
    const float* const* rows =
        table.expand(columns, loop.step, accumulator.coef() + channel, loop.rows, accumulator.stride());
    pass_tile(loop, m, t, columns.size(), rows, sums.rows());
    const auto count = static_cast<double>(t.repeat * (t.rows * columns.size() + t.rest) / columns.channels);
    consume(channel, columns.channels, sums.by_channel(), count);
  };
  bool begins = accumulator.starts();
  cut.tiles(chunk, block, kFlushRows, [&](const Tile& t) {
    if (begins) {
      const Tile few{t.first, std::min(t.rows, kStartRows), t.rows ? 0 : t.rest, t.stride};
      run(few, [&](auto... args) { accumulator.start(args...); });
      begins = false;
    }
    run(t, [&](auto... args) { accumulator.add(args...); });
  });
}

}  // namespace

void map(const InnerLoop& loop, const Shape& s, Memory m, const float* coef) {
  const Cut cut(s, loop.step);
  const int64_t chunks = cut.chunks(), blocks = cut.blocks(), group_bytes = s.group_size() * loop.item_size;
  at::parallel_for(0, s.groups * blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    CoefRows table;
    const float* const* rows = nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / (blocks * chunks), block = i / chunks % blocks, chunk = i % chunks;
      const Columns columns = cut.columns(block);
      if (i == begin || chunk == 0) {
        const float* first = coef + g * s.channels + cut.first_channel(block);
        rows = table.expand(columns, loop.step, first, loop.rows, s.groups * s.channels);
      }
      cut.tiles(chunk, block, kAllRows, [&](const Tile& t) {
        pass_tile(loop, m.at(g * group_bytes), t, columns.size(), rows, nullptr);
      });
    }
  });
}

int64_t chunk_count(const InnerLoop& loop, const Shape& s) { return Cut(s, loop.step).chunks(); }

void reduce(const InnerLoop& loop, const Shape& s, Memory m, const std::vector<Accumulator*>& accumulators) {
  const Cut cut(s, loop.step);
  const int64_t chunks = cut.chunks(), blocks = cut.blocks(), group_bytes = s.group_size() * loop.item_size;
  at::parallel_for(0, s.groups * chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t number = i / blocks, g = number / chunks;
      reduce_chunk(loop, cut, m.at(g * group_bytes), number % chunks, i % blocks, *accumulators[number]);
    }
  });
}

}  // namespace fastdcgan::cpu
