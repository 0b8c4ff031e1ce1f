#include <ATen/Parallel.h>

#include "cpu/elementwise/pass_rows.h"
#include "cpu/gemm/short_gemm.h"
#include "cpu/image/image_side.h"
#include "cpu/image/strip.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kBandFloats = 4096;   // of the linear side between two visits of the sums: 16 KiB
constexpr int64_t kSlicePixels = 512;  // of one task
constexpr int64_t kMostSlices = 32;

// Sums [tap along y, along x, input channel][output channel]: pixels are the depth, and the linear side is read as it
// lies.
template <class T>
class ImageSideGrad {
 public:
  ImageSideGrad(const Contraction& c, const T* gathered, const T* linear, T* out)
      : c_(c),
        strips_(c, gathered),
        stretches_(strips_.stretches()),
        columns_(c.out_channels),
        linear_(linear),
        linear_end_(linear + c.batch * c.y.out * c.x.out * c.out_channels),
        out_(out),
        bands_(c, kBandFloats / columns_.width) {}

  void run() const {
    const int64_t rows = c_.taps() * c_.in_channels, size = rows * columns_.width;
    const int64_t slices = std::clamp<int64_t>(c_.batch * c_.y.out * c_.x.out / kSlicePixels, 1, kMostSlices);
    static thread_local Scratch scratch;
    float* sums = scratch.floats(slices * size);  // of each slice
    at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        std::fill_n(sums + s * size, size, 0.f);
        for (int64_t i = bands_.count() * s / slices; i < bands_.count() * (s + 1) / slices; ++i)
          add(bands_[i], sums + s * size);
      }
    });
    for (int64_t s = 1; s < slices; ++s)
      for (int64_t i = 0; i < size; i += kWidth) store(sums + i, load(sums + i) + load(sums + s * size + i));
    for (int64_t n = 0; n < c_.out_channels; ++n)
      for (int64_t i = 0; i < rows; ++i) out_[n * rows + i] = static_cast<T>(sums[i * columns_.width + n]);
  }

 private:
  void add(const OutputRows& rows, float* sums) const {
    static thread_local Scratch scratch;
    const int64_t pixels = rows.count * c_.x.out, channels = c_.out_channels;
    const int64_t strip_size = strips_.size(bands_.most_rows());
    float* strip = scratch.floats(strip_size + bands_.most_rows() * c_.x.out * columns_.width + kSpill);
    strips_.fill(rows.n, rows.first, rows.count, strip);
    const T* from = linear_ + (rows.n * c_.y.out + rows.first) * c_.x.out * channels;
    const float* b;
    if constexpr (std::is_same_v<T, float>) b = from;
    if (!std::is_same_v<T, float> || channels != columns_.width) {
      float* to = strip + strip_size;
      b = to;
      for (int64_t p = 0; p < pixels; ++p) widen(to + p * columns_.width, from + p * channels, channels, linear_end_);
    }
    std::vector<Piece> pieces;
    for (int64_t r = 0; r < rows.count; ++r)
      pieces.push_back({r * strips_.y_step(), r * c_.x.out, c_.x.out});
    for (int64_t i = 0; i < columns_.vectors.count; ++i) {
      const int64_t vectors = columns_.vectors.size(i), column = columns_.begin(i);
      for (const Piece& s : stretches_) {
        const Parts tiles(s.depth, max_rows(vectors));
        for (int64_t t = 0; t < tiles.count; ++t)
          multiply_short<true>(
              tiles.size(t), vectors,
              {strip + s.a + tiles.begin(t), 1, strips_.x_step(), b + column, columns_.width,
               sums + (s.b + tiles.begin(t)) * columns_.width + column, columns_.width, pieces.data(), rows.count,
               true});
      }
    }
  }

  const Contraction& c_;
  Strips<T> strips_;
  std::vector<Piece> stretches_;
  WideColumns columns_;
  const T *linear_, *linear_end_;
  T* out_;
  Bands bands_;
};

}  // namespace

void image_side_weight_grad(
    const Contraction& c, c10::ScalarType dtype, const void* gathered, const void* linear, void* out) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    ImageSideGrad<T>(c, static_cast<const T*>(gathered), static_cast<const T*>(linear), static_cast<T*>(out)).run();
  });
}

}  // namespace fastdcgan::cpu
