#include "scatter.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "finish.h"
#include "gemm.h"
#include "sweep.h"
#include "widen.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kBlockRows = 8 * kKernelRows;
constexpr int64_t kBandFloats = 1 << 17;  // products of one band

// Panels of B, [panel][input channel][column]; a column is (ky, kx, output channel).
template <class T>
void pack(const Contraction& c, const Weight& w, const Panels& panels, float* to) {
  std::fill_n(to, panels.width * c.in_channels, 0.f);
  int64_t column = 0;
  for (int64_t ky = 0; ky < c.y.kernel; ++ky)
    for (int64_t kx = 0; kx < c.x.kernel; ++kx)
      for (int64_t n = 0; n < c.out_channels; ++n, ++column) {
        const T* from = static_cast<const T*>(w.data) + ky * w.y + kx * w.x + n * w.n;
        const int64_t panel = column / kPanel, width = panels.vectors(panel) * kWidth;
        float* at = to + panel * kPanel * c.in_channels + column % kPanel;
        for (int64_t k = 0; k < c.in_channels; ++k) at[k * width] = static_cast<float>(from[k * w.k]);
      }
}

// Rows of outputs.
struct Band {
  int64_t n, first, last;
};

template <class T>
class Scatter {
 public:
  Scatter(const Contraction& c, const T* in, const float* weight, T* out, const Finish& finish)
      : c_(c), in_(in), end_(in + c.batch * c.y.in * c.x.in * c.in_channels), weight_(weight), out_(out),
        panels_(c.taps() * c.out_channels), finisher_(finish, c.out_channels, c.x.out), starts_{0} {
    for (int64_t o = 0; o < c.y.out; ++o) rows_.push_back(reads(c.y, o, false));
    for (int64_t o = 0; o < c.x.out; ++o) {
      for (const Read& r : reads(c.x, o, false)) offsets_.push_back(r.input * panels_.width + r.tap * c.out_channels);
      starts_.push_back(static_cast<int64_t>(offsets_.size()));
    }
  }

  void run() {
    const int64_t fit = std::max<int64_t>(1, kBandFloats / (c_.x.in * panels_.width));  // rows of inputs
    const int64_t by_size = (c_.y.in + fit - 1) / fit, threads = at::get_num_threads();
    const int64_t by_threads = (threads + c_.batch - 1) / c_.batch;
    const int64_t bands = std::clamp<int64_t>(std::max(by_size, by_threads), 1, c_.y.out);
    at::parallel_for(0, c_.batch * bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i % bands;
        band({i / bands, c_.y.out * b / bands, c_.y.out * (b + 1) / bands});
      }
    });
  }

 private:
  void band(const Band& b) const {
    int64_t low = c_.y.in, high = 0;  // rows of inputs
    for (int64_t o = b.first; o < b.last; ++o)
      for (const Read& r : rows_[o]) {
        low = std::min(low, r.input);
        high = std::max(high, r.input + 1);
      }
    static thread_local Scratch scratch;
    const int64_t pixels = std::max<int64_t>(high - low, 0) * c_.x.in;
    const int64_t row = (c_.x.out * c_.out_channels + kPanel) / kPanel * kPanel;
    float* a = scratch.floats(kBlockRows * kDepthStride + pixels * panels_.width + row);
    float *products = a + kBlockRows * kDepthStride, *sums = products + pixels * panels_.width;
    const T* from = in_ + (b.n * c_.y.in + low) * c_.x.in * c_.in_channels;
    for (int64_t p = 0; p < pixels; p += kBlockRows)
      multiply_pixels(from + p * c_.in_channels, std::min(kBlockRows, pixels - p), a, products + p * panels_.width);
    for (int64_t o = b.first; o < b.last; ++o) {
      switch (c_.out_channels) {
        case 1: add_row<1>(o, low, products, sums); break;
        case 3: add_row<3>(o, low, products, sums); break;
        default: add_row<0>(o, low, products, sums);
      }
      finisher_.run(sums, 0, Panels(c_.x.out * c_.out_channels).width);
      narrow(out_ + (b.n * c_.y.out + o) * c_.x.out * c_.out_channels, sums, c_.x.out * c_.out_channels);
    }
  }

  void multiply_pixels(const T* from, int64_t rows, float* a, float* products) const {
    const Tiles tiles(rows);
    for (int64_t k = 0; k < c_.in_channels; k += kDepth) {
      const int64_t depth = std::min(kDepth, c_.in_channels - k);
      for (int64_t r = 0; r < rows; ++r)
        widen(a + r * kDepthStride, from + r * c_.in_channels + k, depth, end_);
      const Piece piece{0, k, depth};
      for (int64_t p = 0; p < panels_.count; ++p)
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t row = tiles.begin(t);
          multiply<kDepthStride>(
              tiles.height(t), panels_.vectors(p),
              {a + row * kDepthStride, 1, weight_ + p * kPanel * c_.in_channels,
               products + row * panels_.width + p * kPanel, panels_.width, &piece, 1, k > 0});
        }
    }
  }

  // One row of outputs; kChannels 0: any number of them.
  template <int kChannels>
  void add_row(int64_t o, int64_t low, const float* products, float* sums) const {
    const int64_t channels = kChannels ? kChannels : c_.out_channels;
    std::fill_n(sums, c_.x.out * channels, 0.f);
    for (const Read& r : rows_[o]) {
      const float* row = products + (r.input - low) * c_.x.in * panels_.width + r.tap * c_.x.kernel * channels;
      for (int64_t x = 0; x < c_.x.out; ++x)
        for (int64_t i = starts_[x]; i < starts_[x + 1]; ++i)
          for (int64_t n = 0; n < channels; ++n) sums[x * channels + n] += row[offsets_[i] + n];
    }
  }

  const Contraction& c_;
  const T *in_, *end_;
  const float* weight_;
  T* out_;
  Panels panels_;
  Finisher finisher_;
  std::vector<std::vector<Read>> rows_;
  std::vector<int64_t> offsets_, starts_;  // of the products that the outputs of a row read, in a row of inputs
};

}  // namespace

bool scatters(const Contraction& c) {
  const int64_t by_gathering = Panels(c.out_channels).width * c.taps();  // columns for each input pixel
  return c.y.transposed && 2 * Panels(c.taps() * c.out_channels).width <= by_gathering;
}

void scatter(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out, const Finish& finish) {
  const Panels panels(c.taps() * c.out_channels);
  static thread_local Scratch scratch;
  float* packed = scratch.floats(panels.width * c.in_channels);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    pack<T>(c, weight, panels, packed);
    Scatter<T>(c, static_cast<const T*>(in), packed, static_cast<T*>(out), finish).run();
  });
}

}  // namespace fastdcgan::cpu
