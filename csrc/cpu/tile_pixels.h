// The sides of `weight_grad` for tiles.
#pragma once

#include "pairs.h"
#include "tiles.h"
#include "weight_grad.h"

namespace fastdcgan::cpu {

// A [output channel][pixel], B [panel][pair of pixels][column]; zeros fill up whole tiles.
class TilePixels {
 public:
  using Element = TileProducts::Element;
  using Session = TileProducts::Session;

  static int64_t sum_rows(int64_t out_channels) { return TileProducts::whole_rows(out_channels); }
  static int64_t size(const Contraction& c, int64_t width) {
    const int64_t rows = sum_rows(c.out_channels);
    const int64_t elements = rows * TileProducts::kRowStride + kDepth * width + kUnit * rows + 2 * row_size(width);
    return elements * int64_t{sizeof(Element)} / int64_t{sizeof(float)};
  }

  TilePixels(const Sides<Element>& sides, int64_t width, float* memory)
      : s_(sides), rows_(sum_rows(sides.c.out_channels)), width_(width), a_(reinterpret_cast<Element*>(memory)),
        b_(a_ + rows_ * TileProducts::kRowStride), pairs_(b_ + kDepth * width), row_(pairs_ + kUnit * rows_) {}

  void pack_linear(const RowClass& rows, int64_t low, int64_t high) {
    const int64_t channels = s_.c.out_channels;
    Place place(rows, low);
    const Element* pixels[2] = {};
    for (int64_t begin = low; begin < high; begin += kUnit) {
      for (int64_t i = 0; i < kUnit; i += 2) {
        int64_t n[2] = {0, 0};
        for (int j = 0; j < 2 && begin + i + j < high; ++j, place.next(rows)) {
          pixels[j] = s_.linear_pixel(rows, place);
          n[j] = channels;
        }
        interleave(pixels[0], n[0], pixels[1], n[1], rows_, pairs_ + i * rows_);
      }
      for (int64_t row = 0; row < rows_; row += amx::kRows)
        transpose_pairs(
            pairs_ + 2 * row, 2 * rows_, a_ + row * TileProducts::kRowStride + begin - low, TileProducts::kRowStride,
            amx::kRows, amx::kRows);
    }
  }

  void pack_gathered(
      const RowClass& rows, int64_t low, int64_t high, const std::vector<Segment>& parts, const Panels& panels) {
    const int64_t depth = whole_units<TileProducts>(high - low);
    Place place(rows, low);
    const Element* pixels[2] = {};
    for (int64_t k = 0; k < depth; k += 2) {
      int64_t n[2] = {0, 0};
      for (int j = 0; j < 2 && low + k + j < high; ++j, place.next(rows)) {
        if (s_.exact) {
          pixels[j] = s_.gathered_pixel(rows, place, parts.front());
        } else {
          Element* row = row_ + j * row_size(width_);
          gather_row(row, s_.gathered, rows, place, parts);
          pixels[j] = row;
        }
        n[j] = panels.columns;
      }
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = p * kPanel, width = panels.vectors(p) * kWidth;
        interleave(
            pixels[0] + first, n[0] - first, pixels[1] + first, n[1] - first, width, b_ + first * depth + k * width);
      }
    }
  }

  void multiply(int64_t pixels, const Panels& panels, float* c) const {
    const std::vector<Piece> piece{{0, 0, whole_units<TileProducts>(pixels)}};
    for (int64_t p = 0; p < panels.count; ++p)
      TileProducts::multiply(
          a_, rows_, b_ + p * kPanel * piece[0].depth, panels.vectors(p), c + p * kPanel, width_, piece, true);
  }

 private:
  static constexpr int64_t kUnit = TileProducts::kDepthUnit;
  static_assert(kUnit == 2 * amx::kRows && kDepth % kUnit == 0);
  static int64_t row_size(int64_t width) { return width + kSpill; }

  const Sides<Element>& s_;
  int64_t rows_, width_;
  Element *a_, *b_, *pairs_, *row_;
};

}  // namespace fastdcgan::cpu
