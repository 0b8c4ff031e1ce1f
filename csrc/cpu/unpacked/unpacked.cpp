#include "cpu/unpacked/unpacked.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/contraction/block_stats.h"
#include "cpu/contraction/epilogue.h"
#include "cpu/elementwise/pass_rows.h"
#include "cpu/elementwise/widen.h"
#include "cpu/gemm/implicit_gemm.h"
#include "cpu/gemm/short_gemm.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kSumDepth = 256;  // before a sum is added to others: sums of short sums round less

// Where element (k, ky, kx) of a weight lies behind its slowest axis, by strides; and how much there is.
struct Order {
  int64_t k, y, x, size;
};

// What each output reads of `in`: rows [pixel][place in the weight's order].
template <class T>
void gather(const Contraction& c, const T* in, const Order& order, float* to) {
  std::vector<std::vector<Read>> ys, xs;
  for (int64_t o = 0; o < c.y.out; ++o) ys.push_back(reads(c.y, o, false));
  for (int64_t o = 0; o < c.x.out; ++o) xs.push_back(reads(c.x, o, false));
  at::parallel_for(0, c.batch * c.y.out * c.x.out, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = to + i * order.size;
      std::fill_n(row, order.size, 0.f);
      const int64_t x = i % c.x.out, y = i / c.x.out % c.y.out, n = i / c.x.out / c.y.out;
      for (const Read& ry : ys[y])
        for (const Read& rx : xs[x]) {
          const T* from = in + ((n * c.y.in + ry.input) * c.x.in + rx.input) * c.in_channels;
          float* at = row + ry.tap * order.y + rx.tap * order.x;
          if (order.k == 1) {
            std::copy_n(from, c.in_channels, at);
          } else {
            for (int64_t k = 0; k < c.in_channels; ++k) at[k * order.k] = from[k];
          }
        }
    }
  });
}

// [rows][columns] -> [columns][stride], filled up with zeros.
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t stride) {
  at::parallel_for(0, columns, 1 << 10, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t r = 0; r < rows; ++r) to[k * stride + r] = from[r * columns + k];
      std::fill_n(to + k * stride + rows, stride - rows, 0.f);
    }
  });
}

struct Rows {
  const float* data;
  int64_t stride;
};

// `rows` of `n` elements, whole vectors, of a weight that ends at `end`: as floats of which each is one of T. They lie
// where the weight does, or hold until this thread asks again.
template <class T, class W>
Rows floats_of(const W* from, int64_t stride, int64_t rows, int64_t n, const W* end) {
  if constexpr (std::is_same_v<T, float>) {
    return {from, stride};
  } else {
    static thread_local Scratch scratch;
    float* to = scratch.floats(rows * n + kSpill);
    for (int64_t r = 0; r < rows; ++r, from += stride) {
      float* row = to + r * n;
      if constexpr (std::is_same_v<W, T>) {
        widen(row, from, n, end);
      } else {
        int64_t i = 0;
        for (; i + kStep <= n; i += kStep) write(row + i, rounded<T>(read(from + i)));
        if (i < n) rounded<T>(V::loadu(from + i)).store(row + i);
      }
    }
    return {to, n};
  }
}

// c[m][n] = sum over k of a[m*a_row + k*a_step]*b[k*b_step + n] for some rows; columns are whole vectors.
void multiply_all(
    int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
    int64_t b_step, float* c, int64_t c_stride) {
  const Parts vectors(columns / kWidth, kMaxVectors);
  alignas(64) float more[max_rows(1) * kMaxVectors * kWidth];
  for (int64_t v = 0; v < vectors.count; ++v) {
    const int64_t n = vectors.begin(v) * kWidth, width = vectors.size(v) * kWidth;
    const Parts tiles(rows, max_rows(vectors.size(v)));
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t m = tiles.begin(t), height = tiles.size(t);
      for (int64_t k = 0; k < depth; k += kSumDepth) {
        const Piece piece{0, 0, std::min(kSumDepth, depth - k)};
        float* to = c + m * c_stride + n;
        multiply_short(
            height, vectors.size(v),
            {a + m * a_row + k * a_step, a_row, a_step, b + k * b_step + n, b_step, k ? more : to,
             k ? width : c_stride, &piece, 1, false});
        for (int64_t r = 0; k && r < height; ++r)
          for (int64_t i = 0; i < width; i += kWidth)
            store(to + r * c_stride + i, load(to + r * c_stride + i) + load(more + r * width + i));
      }
    }
  }
}

// By several threads, a few of a weight's slowest channels at a time: so much of it stays in the cache.
template <class Function>
void for_channels(int64_t channels, const Function& function) {
  constexpr int64_t kSome = max_rows(1);
  at::parallel_for(0, (channels + kSome - 1) / kSome, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i * kSome, std::min(kSome, channels - i * kSome));
  });
}

// Sums of whole pixels [pixels][width] to what is stored of them.
template <class T>
void finish(const Contraction& c, float* sums, int64_t width, T* out, const Epilogue& epilogue) {
  const int64_t pixels = c.batch * c.y.out * c.x.out;
  if (epilogue.stats) {
    struct Group {
      int64_t rows, stat_group;
    };
    std::vector<Group> groups;
    std::vector<float> partial(epilogue.stat_groups * 2 * width);
    const int64_t rows = pixels / epilogue.stat_groups;
    for (int64_t g = 0; g < epilogue.stat_groups; ++g) {
      float* mean = partial.data() + g * 2 * width;
      round_and_sum<T>([&](int64_t r) { return sums + (g * rows + r) * width; }, rows, width, mean, mean + width);
      groups.push_back({rows, g});
    }
    combine(groups, partial.data(), width, c.out_channels, epilogue);
  }
  const RowEpilogue row_epilogue(epilogue, c.out_channels);
  for (int64_t i = 0; i < pixels; ++i) {
    row_epilogue.run(sums + i * width, 0, (c.out_channels + kWidth - 1) / kWidth * kWidth);
    narrow(out + i * c.out_channels, sums + i * width, c.out_channels);
  }
}

// Of `conv`: the weight's rows, each of an output channel, by columns of pixels.
template <class T, class W>
void convolve(const Contraction& c, const T* in, const Weight& w, float* sums, int64_t width) {
  static thread_local Scratch scratch;
  const Order order{w.k, w.y, w.x, c.taps() * c.in_channels};
  const int64_t pixels = c.batch * c.y.out * c.x.out, columns = (pixels + kWidth - 1) / kWidth * kWidth;
  float* rows = scratch.floats((pixels + columns) * order.size + c.out_channels * columns);
  float *panel = rows + pixels * order.size, *found = panel + columns * order.size;
  gather(c, in, order, rows);
  transpose(rows, pixels, order.size, panel, columns);
  const W *weight = static_cast<const W*>(w.data), *end = weight + c.out_channels * order.size;
  for_channels(c.out_channels, [&](int64_t n, int64_t some) {
    const Rows a = floats_of<T>(weight + n * w.n, w.n, some, order.size, end);
    multiply_all(
        some, columns, order.size, a.data, a.stride, 1, panel, columns, found + n * columns, columns);
  });
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t n = 0; n < c.out_channels; ++n) sums[i * width + n] = found[n * columns + i];
}

// Of `conv_transpose`: pixels by the weight's columns, and what falls on each output of these products.
template <class T, class W>
void convolve_transposed(const Contraction& c, const T* in, const Weight& w, float* sums, int64_t width) {
  static thread_local Scratch scratch;
  const int64_t columns = c.taps() * c.out_channels, all = c.batch * c.y.in * c.x.in;
  float *products = scratch.floats(all * (columns + c.in_channels)), *pixels = products + all * columns;
  std::copy_n(in, all * c.in_channels, pixels);
  const W *weight = static_cast<const W*>(w.data), *end = weight + columns * c.in_channels;
  const Parts strips(columns / kWidth, kMaxVectors);
  at::parallel_for(0, strips.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t n = strips.begin(i) * kWidth, some = strips.size(i) * kWidth;
      const Rows b = floats_of<T>(weight + n, w.k, c.in_channels, some, end);
      multiply_all(
          all, some, c.in_channels, pixels, c.in_channels, 1, b.data, b.stride, products + n, columns);
    }
  });
  at::parallel_for(0, c.batch * c.y.out * c.x.out, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = sums + i * width;
      std::fill_n(to, c.out_channels, 0.f);
      const int64_t n = i / c.x.out / c.y.out;
      for (const Read& ry : reads(c.y, i / c.x.out % c.y.out, false))
        for (const Read& rx : reads(c.x, i % c.x.out, false)) {
          const float* from = products + ((n * c.y.in + ry.input) * c.x.in + rx.input) * columns;
          from += ry.tap * w.y + rx.tap * w.x;
          for (int64_t k = 0; k < c.out_channels; ++k) to[k] += from[k * w.n];
        }
    }
  });
}

}  // namespace

bool can_unpacked(const Contraction& c) {
  return c.taps() * (c.y.transposed ? c.out_channels : c.in_channels) % kWidth == 0;
}

void unpacked_contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out,
    const Epilogue& epilogue) {
  const bool transposed = c.y.transposed;
  const int64_t behind = c.taps() * (transposed ? c.out_channels : c.in_channels);
  if (!weight.bytes || (transposed ? weight.k : weight.n) != behind)  // it has gaps, or another axis is the slowest
    return gemm_contract(c, dtype, in, weight, out, epilogue);
  static thread_local Scratch scratch;
  const int64_t width = Panels(c.out_channels).width;
  float* sums = scratch.floats(c.batch * c.y.out * c.x.out * width);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto multiply = [&](auto element) {
      using W = decltype(element);
      (transposed ? convolve_transposed<T, W> : convolve<T, W>)(c, static_cast<const T*>(in), weight, sums, width);
    };
    weight.wide ? multiply(0.f) : multiply(zero);
    finish(c, sums, width, static_cast<T*>(out), epilogue);
  });
}

void unpacked_weight_grad(
    const Contraction& c, c10::ScalarType dtype, const void* gathered, const void* linear, void* out) {
  static thread_local Scratch scratch;
  const int64_t k = c.contiguous ? c.taps() : 1, x = c.contiguous ? 1 : c.in_channels;
  const Order order{k, c.x.kernel * x, x, c.taps() * c.in_channels};
  const int64_t all = c.batch * c.y.out * c.x.out;
  float *rows = scratch.floats(all * (order.size + c.out_channels)), *dy = rows + all * order.size;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    gather(c, static_cast<const T*>(gathered), order, rows);
    std::copy_n(static_cast<const T*>(linear), all * c.out_channels, dy);
    for_channels(c.out_channels, [&](int64_t n, int64_t some) {
      static thread_local Scratch some_sums;
      T* to = static_cast<T*>(out) + n * order.size;
      float* sums = std::is_same_v<T, float> ? reinterpret_cast<float*>(to) : some_sums.floats(some * order.size);
      multiply_all(some, order.size, all, dy + n, 1, c.out_channels, rows, order.size, sums, order.size);
      if constexpr (!std::is_same_v<T, float>) narrow(to, sums, some * order.size);
    });
  });
}

}  // namespace fastdcgan::cpu
