// The sides of `weight_grad` as pairs of pixels.
#pragma once

#include "cpu/bf16/vnni_pairs.h"
#include "cpu/gemm/split_bf16.h"
#include "cpu/gemm/weight_grad.h"

namespace fastdcgan::cpu {

// A [output channel][half][pixel], B [panel][half][pair of pixels][column]; zeros fill up whole vectors of pairs, and
// the depth to whole units of Products.
template <class T, class Products>
class PairPixels {
 public:
  using Element = typename Products::Element;
  using Session = typename Products::Session;
  static constexpr int64_t kTerms = Products::kTerms;

  static int64_t sum_rows(int64_t out_channels) { return (out_channels + kPairs - 1) / kPairs * kPairs; }
  static int64_t size(const Contraction& c, int64_t width) {
    const int64_t rows = sum_rows(c.out_channels);
    const int64_t packed = rows * Products::kRowStride + kTerms * (kDepth * width + kUnit * rows);
    const int64_t elements = packed + kRows * row_size(rows, width);
    return elements * int64_t{sizeof(Element)} / int64_t{sizeof(float)};
  }

  PairPixels(const Sides<T>& sides, int64_t width, float* memory)
      : s_(sides), rows_(sum_rows(sides.c.out_channels)), width_(width), a_(reinterpret_cast<Element*>(memory)),
        b_(a_ + rows_ * Products::kRowStride), pairs_(b_ + kTerms * kDepth * width),
        row_(pairs_ + kTerms * kUnit * rows_) {}

  void pack_linear(const RowClass& rows, int64_t low, int64_t high) {
    const int64_t channels = s_.c.out_channels;
    Place place(rows, low);
    Pixel pixels[2];
    for (int64_t begin = low; begin < high; begin += kUnit) {
      for (int64_t i = 0; i < kUnit; i += 2) {
        int64_t n[2] = {0, 0};
        for (int j = 0; j < 2 && begin + i + j < high; ++j, place.next(rows)) {
          pixels[j] = pixel(s_.linear_pixel(rows, place), channels, j);
          n[j] = channels;
        }
        for (int64_t h = 0; h < kTerms; ++h)
          interleave(pixels[0].half[h], n[0], pixels[1].half[h], n[1], rows_, pairs_ + (h * kUnit + i) * rows_);
      }
      for (int64_t h = 0; h < kTerms; ++h)
        for (int64_t row = 0; row < rows_; row += kPairs)
          transpose_vnni_pairs(
              pairs_ + h * kUnit * rows_ + 2 * row, 2 * rows_,
              a_ + row * Products::kRowStride + h * kDepth + begin - low, Products::kRowStride, kPairs, kPairs);
    }
  }

  void pack_gathered(
      const RowClass& rows, int64_t low, int64_t high, const std::vector<Segment>& parts, const Panels& panels) {
    const int64_t depth = whole_units<Products>(high - low);
    Place place(rows, low);
    Pixel pixels[2];
    for (int64_t k = 0; k < depth; k += 2) {
      int64_t n[2] = {0, 0};
      for (int j = 0; j < 2 && low + k + j < high; ++j, place.next(rows)) {
        const T* from;
        if (s_.exact) {
          from = s_.gathered_pixel(rows, place, parts.front());
        } else {
          T* row = reinterpret_cast<T*>(row_) + j * row_size(rows_, width_);
          gather_row(row, s_.gathered, rows, place, parts);
          from = row;
        }
        pixels[j] = pixel(from, panels.columns, j);
        n[j] = panels.columns;
      }
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = p * kPanel, width = panels.vectors(p) * kWidth;
        for (int64_t h = 0; h < kTerms; ++h)
          interleave(
              pixels[0].half[h] + first, n[0] - first, pixels[1].half[h] + first, n[1] - first, width,
              b_ + kTerms * first * depth + (h * depth + k) * width);
      }
    }
  }

  void multiply(int64_t pixels, const Panels& panels, float* c) const {
    const int64_t depth = whole_units<Products>(pixels);
    std::vector<Piece> pieces{{0, 0, depth}};
    if constexpr (kTerms == 2) pieces = three_products(pieces, kDepth, depth);
    for (int64_t p = 0; p < panels.count; ++p)
      Products::multiply(
          a_, s_.c.out_channels, b_ + kTerms * p * kPanel * depth, panels.vectors(p), c + p * kPanel, width_, pieces,
          true);
  }

 private:
  struct Pixel {
    const Element* half[kTerms] = {};
  };

  static constexpr int64_t kUnit = 2 * kPairs;  // pixels that are transposed together
  static_assert(kUnit % Products::kDepthUnit == 0 && kDepth % kUnit == 0);
  // Room for two pixels, as they are gathered and then split into terms: rows of Elements.
  static constexpr int64_t kRows = kTerms == 1 ? 2 : 2 * (int64_t{sizeof(T) / sizeof(Element)} + kTerms);
  static int64_t row_size(int64_t rows, int64_t width) { return std::max(rows, width) + kSpill; }

  // The `j`-th of two.
  Pixel pixel(const T* from, int64_t n, int64_t j) const {
    if constexpr (kTerms == 1) {
      return {{from}};
    } else {
      const int64_t row = row_size(rows_, width_);
      Element* high = row_ + (kRows / 2 + kTerms * j) * row;
      split(from, n, high, high + row);
      return {{high, high + row}};
    }
  }

  const Sides<T>& s_;
  int64_t rows_, width_;
  Element *a_, *b_, *pairs_, *row_;
};

}  // namespace fastdcgan::cpu
