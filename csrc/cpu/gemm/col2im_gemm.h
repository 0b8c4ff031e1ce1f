// `conv_transpose` to few channels, such as those of an image: every input pixel is multiplied by the weights of all taps
// at once, and the outputs add up what falls on them. The products of a band of rows stay in the cache. `Products` says
// how rows are multiplied.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/contraction/epilogue.h"
#include "cpu/contraction/round_weight.h"
#include "cpu/elementwise/widen.h"
#include "cpu/gemm/overlap.h"
#include "cpu/gemm/short_gemm.h"
#include "cpu/gemm/split_bf16.h"

namespace fastdcgan::cpu {

constexpr int64_t kBandFloats = 1 << 17;  // products of one band
static_assert(Overlap::kSpill <= kPanel);

// Panels of B, [panel][half][input channel][column]; a column is (ky, kx, output channel).
template <class T, class Products>
void pack_taps(const Contraction& c, const Weight& w, const Panels& panels, typename Products::Element* to) {
  const int64_t depth = whole_units<Products>(c.in_channels);
  std::fill_n(to, Products::kTerms * panels.width * depth, typename Products::Element(0.f));
  int64_t column = 0;
  for (int64_t ky = 0; ky < c.y.kernel; ++ky)
    for (int64_t kx = 0; kx < c.x.kernel; ++kx)
      for (int64_t n = 0; n < c.out_channels; ++n, ++column) {
        const T* from = static_cast<const T*>(w.data) + ky * w.y + kx * w.x + n * w.n;
        const int64_t panel = column / kPanel, width = panels.vectors(panel) * kWidth;
        typename Products::Element* at = to + Products::kTerms * panel * kPanel * depth;
        for (int64_t k = 0; k < c.in_channels; ++k) {
          const int64_t place = Products::place(k, column % kPanel, width);
          if constexpr (Products::kTerms == 2) {
            split(from[k * w.k], at[place], at[width * depth + place]);
          } else {
            at[place] = static_cast<typename Products::Element>(from[k * w.k]);
          }
        }
      }
}

// Rows of outputs.
struct Band {
  int64_t n, first, last;
};

template <class T, class Products>
class Col2Im {
  using Element = typename Products::Element;

 public:
  Col2Im(const Contraction& c, const T* in, const Element* weight, T* out, const Epilogue& epilogue)
      : c_(c), in_(in), end_(in + c.batch * c.y.in * c.x.in * c.in_channels), weight_(weight), out_(out),
        panels_(c.taps() * c.out_channels), overlap_(c, panels_.width), overlaps_(Overlap::covers(c)),
        row_epilogue_(epilogue, c.out_channels, c.x.out), starts_{0} {
    for (int64_t o = 0; o < c.y.out; ++o) rows_.push_back(reads(c.y, o, false));
    for (int64_t o = 0; o < c.x.out && !overlaps_; ++o) {
      for (const Read& r : reads(c.x, o, false)) offsets_.push_back(r.input * panels_.width + r.tap * c.out_channels);
      starts_.push_back(static_cast<int64_t>(offsets_.size()));
    }
  }

  // False if a sum of split floats is not finite: then `out` is not the result.
  bool run() {
    const int64_t fit = std::max<int64_t>(1, kBandFloats / (c_.x.in * panels_.width));  // rows of inputs
    const int64_t by_size = (c_.y.in + fit - 1) / fit, threads = at::get_num_threads();
    const int64_t by_threads = (threads + c_.batch - 1) / c_.batch;
    const int64_t bands = std::clamp<int64_t>(std::max(by_size, by_threads), 1, c_.y.out);
    at::parallel_for(0, c_.batch * bands, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Products::Session session;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i % bands;
        band({i / bands, c_.y.out * b / bands, c_.y.out * (b + 1) / bands});
      }
    });
    return finite_;
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
    const int64_t row = c_.x.out * c_.out_channels, whole_row = Panels(row).width;
    const int64_t size = Products::whole_rows(pixels) * panels_.width + kPanel;
    const int64_t sums_size = (std::max(overlap_.frame(), overlap_.first() + whole_row) + kPanel) / kPanel * kPanel;
    float* products = scratch.floats(size + sums_size + rows_size<Products>());
    float* sums = products + size;
    auto* a = reinterpret_cast<Element*>(sums + sums_size);
    const T* from = in_ + (b.n * c_.y.in + low) * c_.x.in * c_.in_channels;
    for (int64_t p = 0; p < pixels; p += Products::kBlockRows) {
      const int64_t some = std::min(Products::kBlockRows, pixels - p);
      multiply_pixels(from + p * c_.in_channels, some, a, products + p * panels_.width);
    }
    if constexpr (Products::kTerms == 2)
      if (!all_finite(products, pixels * panels_.width)) finite_ = false;
    std::vector<const float*> taps;  // that fall on a row of outputs
    for (int64_t o = b.first; o < b.last; ++o) {
      taps.clear();
      for (const Read& r : rows_[o])
        taps.push_back(products + (r.input - low) * c_.x.in * panels_.width + r.tap * c_.x.kernel * c_.out_channels);
      float* outputs = sums;
      if (overlaps_) {
        overlap_.add(taps, sums);
        outputs += overlap_.first();
      } else {
        add_row(taps, sums);
      }
      row_epilogue_.run(outputs, 0, whole_row);
      narrow(out_ + (b.n * c_.y.out + o) * row, outputs, row);
    }
  }

  void multiply_pixels(const T* from, int64_t rows, Element* a, float* products) const {
    if constexpr (std::is_same_v<Element, float> && std::is_same_v<T, float>)
      return multiply_in_place(from, rows, products);
    const int64_t all_depth = whole_units<Products>(c_.in_channels);
    for (int64_t k = 0; k < c_.in_channels; k += kDepth) {
      const int64_t depth = std::min(kDepth, c_.in_channels - k);
      const int64_t whole = whole_units<Products>(depth);
      std::vector<Piece> pieces{{0, k, whole}};
      if constexpr (Products::kTerms == 2) pieces = three_products(pieces, kDepth, all_depth);
      for (int64_t r = 0; r < rows; ++r) {
        Element* row = a + r * Products::kRowStride;
        if constexpr (Products::kTerms == 2) {
          alignas(64) float wide[kDepth + kSpill];
          widen(wide, from + r * c_.in_channels + k, depth, end_);
          std::fill_n(wide + depth, whole - depth, 0.f);
          split(wide, whole, row, row + kDepth);
        } else {
          widen(row, from + r * c_.in_channels + k, depth, end_);
          std::fill_n(row + depth, whole - depth, Element(0.f));
        }
      }
      clear_rows<Products>(a, rows);
      for (int64_t p = 0; p < panels_.count; ++p)
        Products::multiply(
            a, rows, weight_ + Products::kTerms * p * kPanel * all_depth, panels_.vectors(p), products + p * kPanel,
            panels_.width, pieces, k > 0);
    }
  }

  void multiply_in_place(const float* from, int64_t rows, float* products) const {
    for (int64_t k = 0; k < c_.in_channels; k += kDepth) {
      for (int64_t p = 0; p < panels_.count; ++p) {
        const int64_t vectors = panels_.vectors(p), width = vectors * kWidth;
        const Piece piece{k, k, std::min(kDepth, c_.in_channels - k)};
        const float* panel = weight_ + p * kPanel * c_.in_channels;
        for (int64_t r = 0; r < rows; r += kKernelRows)
          multiply_short(
              std::min<int64_t>(kKernelRows, rows - r), vectors,
              {from + r * c_.in_channels, c_.in_channels, 1, panel, width, products + r * panels_.width + p * kPanel,
               panels_.width, &piece, 1, k > 0});
      }
    }
  }

  // Where the taps of an input are not neighbours among the outputs.
  void add_row(const std::vector<const float*>& taps, float* sums) const {
    std::fill_n(sums, c_.x.out * c_.out_channels, 0.f);
    for (const float* row : taps)
      for (int64_t x = 0; x < c_.x.out; ++x)
        for (int64_t i = starts_[x]; i < starts_[x + 1]; ++i)
          for (int64_t n = 0; n < c_.out_channels; ++n) sums[x * c_.out_channels + n] += row[offsets_[i] + n];
  }

  const Contraction& c_;
  const T *in_, *end_;
  const Element* weight_;
  T* out_;
  Panels panels_;
  Overlap overlap_;
  bool overlaps_;
  RowEpilogue row_epilogue_;
  std::vector<std::vector<Read>> rows_;
  mutable std::atomic<bool> finite_{true};
  std::vector<int64_t> offsets_, starts_;  // of the products that the outputs of a row read, in a row of inputs
};

template <class T, class Products>
bool col2im_with(const Contraction& c, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  using Element = typename Products::Element;
  const Panels panels(c.taps() * c.out_channels);
  static thread_local Scratch scratch;
  Element* packed = scratch.get<Element>(Products::kTerms * panels.width * whole_units<Products>(c.in_channels));
  pack_taps<T, Products>(c, Rounded(weight, c10::CppTypeToScalarType<T>::value).get(), panels, packed);
  return Col2Im<T, Products>(c, static_cast<const T*>(in), packed, static_cast<T*>(out), epilogue).run();
}

}  // namespace fastdcgan::cpu
