// Products of bfloat16 rows on AMX tiles, summed in float. For libraries of AVX-512 vectors: every processor with AMX
// has them.
#pragma once

#include <c10/util/BFloat16.h>

#include <vector>

#include "cpu/amx/amx.h"
#include "cpu/bf16/pack_pairs.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

// Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 columns of B; all are whole. With two terms, a row of A has the low
// ones kDepth after the high ones.
template <int64_t kTerms_>
struct TileProductsOf {
  using Element = c10::BFloat16;
  static constexpr int64_t kTerms = kTerms_;
  static constexpr int64_t kBlockRows = 256;  // the weights are read once for so many
  static constexpr int64_t kDepthUnit = amx::kRowBytes / int64_t{sizeof(Element)};
  static constexpr int64_t kRowStride = kTerms * kDepth + kDepthUnit;  // no power of two
  static_assert(kPanel == 2 * kWidth && kWidth * int64_t{sizeof(float)} == amx::kRowBytes);

  class Session {
   public:
    Session() {
      amx::Config config;
      std::fill_n(config.rows, amx::kTiles, static_cast<uint8_t>(amx::kRows));
      std::fill_n(config.row_bytes, amx::kTiles, static_cast<uint16_t>(amx::kRowBytes));
      amx::configure(config);
    }
    ~Session() { amx::release(); }
    Session(const Session&) = delete;
  };

  static int64_t whole_rows(int64_t rows) { return (rows + amx::kRows - 1) / amx::kRows * amx::kRows; }
  static int64_t sum_stride(int64_t width) { return width + kWidth; }  // no power of two
  static int64_t place(int64_t k, int64_t n, int64_t width) { return place_of_pair(k, n, width); }

  static void multiply(
      const Element* a, int64_t rows, const Element* panel, int64_t vectors, float* c, int64_t c_stride,
      const std::vector<Piece>& pieces, bool add) {
    using Strip = void (*)(const Element*, const Element*, float*, int64_t, const std::vector<Piece>&, bool);
    static constexpr Strip strips[2][2] = {{strip<1, 1>, strip<1, 2>}, {strip<2, 1>, strip<2, 2>}};
    for (int64_t row = 0; row < rows; row += 2 * amx::kRows)
      strips[rows - row > amx::kRows][vectors - 1](
          a + row * kRowStride, panel, c + row * c_stride, c_stride, pieces, add);
  }

 private:
  // 16 or 32 rows by 16 or 32 columns.
  template <int kRowTiles, int kColumnTiles>
  static void strip(
      const Element* a, const Element* b, float* c, int64_t c_stride, const std::vector<Piece>& pieces, bool add) {
    constexpr bool kLower = kRowTiles == 2, kRight = kColumnTiles == 2;
    constexpr int64_t kARow = kRowStride * int64_t{sizeof(Element)}, kBRow = kColumnTiles * amx::kRowBytes;
    const int64_t c_row = c_stride * int64_t{sizeof(float)};
    float* lower = c + amx::kRows * c_stride;
    if (add) {
      amx::load<0>(c, c_row);
      if constexpr (kRight) amx::load<1>(c + kWidth, c_row);
      if constexpr (kLower) amx::load<2>(lower, c_row);
      if constexpr (kLower && kRight) amx::load<3>(lower + kWidth, c_row);
    } else {
      amx::zero<0>();
      if constexpr (kRight) amx::zero<1>();
      if constexpr (kLower) amx::zero<2>();
      if constexpr (kLower && kRight) amx::zero<3>();
    }
    for (const Piece& piece : pieces) {
      const Element* rows = a + piece.a;
      const Element* columns = b + piece.b * (kColumnTiles * kWidth);
      for (int64_t k = piece.depth; k > 0; k -= kDepthUnit) {
        amx::load<4>(rows, kARow);
        amx::load<6>(columns, kBRow);
        amx::multiply<0, 4, 6>();
        if constexpr (kRight) {
          amx::load<7>(columns + 2 * kWidth, kBRow);
          amx::multiply<1, 4, 7>();
        }
        if constexpr (kLower) {
          amx::load<5>(rows + amx::kRows * kRowStride, kARow);
          amx::multiply<2, 5, 6>();
        }
        if constexpr (kLower && kRight) amx::multiply<3, 5, 7>();
        rows += kDepthUnit;
        columns += kDepthUnit * (kColumnTiles * kWidth);
      }
    }
    amx::store<0>(c, c_row);
    if constexpr (kRight) amx::store<1>(c + kWidth, c_row);
    if constexpr (kLower) amx::store<2>(lower, c_row);
    if constexpr (kLower && kRight) amx::store<3>(lower + kWidth, c_row);
  }
};

using TileProducts = TileProductsOf<1>;
using SplitProducts = TileProductsOf<2>;

}  // namespace fastdcgan::cpu
