#include "cpu/image/image_side.h"

#include <ATen/Parallel.h>

#include "cpu/contraction/block_stats.h"
#include "cpu/contraction/epilogue.h"
#include "cpu/contraction/round_weight.h"
#include "cpu/elementwise/pass_rows.h"
#include "cpu/gemm/short_gemm.h"
#include "cpu/image/strip.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kMostChannels = 4;
constexpr int64_t kBandPixels = 128;

// [part of the columns][tap along y, along x, input channel][column]
template <class T>
void pack(const Contraction& c, const Weight& w, const WideColumns& columns, float* to) {
  for (int64_t i = 0; i < columns.vectors.count; ++i) {
    const int64_t begin = columns.begin(i), width = columns.begin(i + 1) - begin;
    const int64_t some = std::min(width, c.out_channels - begin);
    for (int64_t ky = 0; ky < c.y.kernel; ++ky)
      for (int64_t kx = 0; kx < c.x.kernel; ++kx)
        for (int64_t k = 0; k < c.in_channels; ++k, to += width) {
          const T* from = static_cast<const T*>(w.data) + ky * w.y + kx * w.x + k * w.k + begin * w.n;
          for (int64_t n = 0; n < some; ++n) to[n] = static_cast<float>(from[n * w.n]);
          std::fill(to + some, to + width, 0.f);
        }
  }
}

struct Rows {
  int64_t rows, stat_group;
};

template <class T>
class ImageSideConv {
 public:
  ImageSideConv(const Contraction& c, const T* in, const Weight& weight, T* out, const Epilogue& epilogue)
      : c_(c), strips_(c, in), pieces_(strips_.stretches()), columns_(c.out_channels), out_(out), epilogue_(epilogue),
        row_epilogue_(epilogue, c.out_channels), depth_(c.taps() * c.in_channels),
        in_place_(std::is_same_v<T, float> && c.out_channels == columns_.width) {
    static thread_local Scratch scratch;
    float* packed = scratch.floats(depth_ * columns_.width);
    pack<T>(c, Rounded(weight, c10::CppTypeToScalarType<T>::value).get(), columns_, packed);
    weight_ = packed;
  }

  void run() {
    const Bands bands(c_, kBandPixels);
    std::vector<float> partial(epilogue_.stats ? bands.count() * 2 * columns_.width : 0);
    at::parallel_for(0, bands.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        band(bands[i], bands.most_rows(), epilogue_.stats ? partial.data() + i * 2 * columns_.width : nullptr);
    });
    if (!epilogue_.stats) return;
    std::vector<Rows> blocks;
    for (int64_t i = 0; i < bands.count(); ++i)
      blocks.push_back({bands[i].count * c_.x.out, bands[i].n / (c_.batch / epilogue_.stat_groups)});
    combine(blocks, partial.data(), columns_.width, c_.out_channels, epilogue_);
  }

 private:
  void band(const OutputRows& rows, int64_t most_rows, float* partial) const {
    static thread_local Scratch scratch;
    const int64_t row = c_.x.out * columns_.width, strip_size = strips_.size(most_rows);
    float* strip = scratch.floats(strip_size + (partial ? most_rows : 1) * row);
    strips_.fill(rows.n, rows.first, rows.count, strip);
    const auto sums = [&](int64_t r) {
      if constexpr (std::is_same_v<T, float>) {
        if (in_place_) return out_ + (rows.n * c_.y.out + rows.first + r) * row;
      }
      return strip + strip_size + (partial ? r * row : 0);
    };
    for (int64_t r = 0; r < rows.count; ++r) {
      multiply(strip + r * strips_.y_step(), sums(r));
      if (!partial) store_row(rows.n, rows.first + r, sums(r));
    }
    if (!partial) return;
    const auto pixel = [&](int64_t i) { return sums(0) + i * columns_.width; };
    round_and_sum<T>(pixel, rows.count * c_.x.out, columns_.width, partial, partial + columns_.width);
    for (int64_t r = 0; r < rows.count; ++r) store_row(rows.n, rows.first + r, sums(r));
  }

  // One row of outputs, [pixel][column].
  void multiply(const float* strip, float* sums) const {
    for (int64_t i = 0; i < columns_.vectors.count; ++i) {
      const int64_t vectors = columns_.vectors.size(i);
      const Parts tiles(c_.x.out, max_rows(vectors));
      for (int64_t t = 0; t < tiles.count; ++t)
        multiply_short(
            tiles.size(t), vectors,
            {strip + tiles.begin(t) * strips_.x_step(), strips_.x_step(), 1, weight_ + columns_.begin(i) * depth_,
             vectors * kWidth, sums + tiles.begin(t) * columns_.width + columns_.begin(i), columns_.width,
             pieces_.data(), static_cast<int64_t>(pieces_.size()), false});
    }
  }

  void store_row(int64_t n, int64_t y, float* sums) const {
    const int64_t width = columns_.width, channels = c_.out_channels;
    for (int64_t x = 0; x < c_.x.out; ++x) row_epilogue_.run(sums + x * width, 0, width);
    if (in_place_) return;
    T* to = out_ + (n * c_.y.out + y) * c_.x.out * channels;
    if (width == channels) return narrow(to, sums, c_.x.out * channels);
    for (int64_t x = 0; x < c_.x.out; ++x) narrow(to + x * channels, sums + x * width, channels);
  }

  const Contraction& c_;
  Strips<T> strips_;
  std::vector<Piece> pieces_;
  WideColumns columns_;
  const float* weight_;
  T* out_;
  const Epilogue& epilogue_;
  RowEpilogue row_epilogue_;
  int64_t depth_;
  bool in_place_;  // rows of sums are rows of the output
};

}  // namespace

bool can_image_side(const Contraction& c) {
  return !c.y.transposed && c.in_channels <= kMostChannels && c.taps() * c.in_channels <= kDepth;
}

void image_side_contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out,
    const Epilogue& epilogue) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    ImageSideConv<T>(c, static_cast<const T*>(in), weight, static_cast<T*>(out), epilogue).run();
  });
}

}  // namespace fastdcgan::cpu
