// Rows of outputs from the products of every input pixel with all taps: along x, what falls on an output comes from a
// few neighbours, each of which has the values of its taps side by side.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/contraction/contraction.h"
#include "cpu/contraction/taps.h"

namespace fastdcgan::cpu {

typedef float EightFloats __attribute__((vector_size(32)));
typedef float UnalignedEightFloats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t EightInts __attribute__((vector_size(32)));

// A row of outputs lies in a frame that begins `padding` outputs before it: group g of the frame, of as many outputs as
// the stride, adds up group m of the taps of input g - m.
class Overlap {
 public:
  static constexpr int64_t kSpill = 8;  // floats that are read beyond the products, and written beyond the frame

  // `pixel`: floats from the products of one input to those of the next; kernel rows of taps lie one after the other.
  Overlap(const Contraction& c, int64_t pixel)
      : pixel_(pixel), inputs_(c.x.in), group_(c.x.stride * c.out_channels), run_(c.x.kernel * c.out_channels),
        tap_groups_((c.x.kernel + c.x.stride - 1) / c.x.stride),
        groups_((c.x.padding + c.x.out + c.x.stride - 1) / c.x.stride), first_(c.x.padding * c.out_channels) {}

  static bool covers(const Contraction& c) { return c.x.dilation == 1; }
  int64_t frame() const { return groups_ * group_ + kSpill; }  // floats
  int64_t first() const { return first_; }                     // of the row in its frame

  // `rows`: for each kernel row that falls on the outputs, its taps of the first input.
  void add(const std::vector<const float*>& rows, float* frame) const {
    const int64_t whole = std::min(tap_groups_ - 1, groups_), end = std::clamp(inputs_, whole, groups_);
    for (int64_t g = 0; g < whole; ++g) add_group(rows, g, frame);
    switch (rows.size() * tap_groups_) {
      case 2: add_whole<2>(rows, whole, end, frame); break;
      case 4: add_whole<4>(rows, whole, end, frame); break;
      default: add_whole<0>(rows, whole, end, frame);
    }
    for (int64_t g = end; g < groups_; ++g) add_group(rows, g, frame);
  }

 private:
  // Some of its inputs may be outside.
  void add_group(const std::vector<const float*>& rows, int64_t g, float* frame) const {
    float* to = frame + g * group_;
    std::fill_n(to, group_, 0.f);
    for (const float* row : rows)
      for (int64_t m = std::max<int64_t>(0, g - inputs_ + 1); m < std::min(tap_groups_, g + 1); ++m) {
        const float* from = row + (g - m) * pixel_ + m * group_;
        for (int64_t i = 0; i < std::min(group_, run_ - m * group_); ++i) to[i] += from[i];
      }
  }

  // Groups [begin, end), all inputs of which are inside; what is written beyond a group belongs to the next one. kTerms
  // 0: any number of them.
  template <int kTerms>
  void add_whole(const std::vector<const float*>& rows, int64_t begin, int64_t end, float* frame) const {
    if (begin >= end) return;
    struct Term {
      const float* from;
      int64_t columns;
    };
    std::array<Term, kTerms ? kTerms : 1> some;
    std::vector<Term> any(kTerms ? 0 : rows.size() * tap_groups_);
    Term* terms = kTerms ? some.data() : any.data();
    const int64_t count = kTerms ? kTerms : static_cast<int64_t>(any.size());
    for (size_t r = 0; r < rows.size(); ++r)
      for (int64_t m = 0; m < tap_groups_; ++m)
        terms[r * tap_groups_ + m] = {rows[r] + m * group_ - m * pixel_, std::min(group_, run_ - m * group_)};
    const bool masked = run_ % group_;
    for (int64_t g = begin; g < end; ++g)
      for (int64_t i = 0; i < group_; i += 8) {
        EightFloats sum{};
#pragma GCC unroll 4
        for (int64_t t = 0; t < count; ++t) {
          const EightFloats x = *reinterpret_cast<const UnalignedEightFloats*>(terms[t].from + g * pixel_ + i);
          if (masked) {
            const EightInts column{0, 1, 2, 3, 4, 5, 6, 7};
            const EightInts inside = column < static_cast<int32_t>(terms[t].columns - i);
            sum += reinterpret_cast<EightFloats>(reinterpret_cast<EightInts>(x) & inside);
          } else {
            sum += x;
          }
        }
        *reinterpret_cast<UnalignedEightFloats*>(frame + g * group_ + i) = sum;
      }
  }

  int64_t pixel_, inputs_, group_, run_;  // floats: one input, group of outputs, taps of a kernel row
  int64_t tap_groups_, groups_, first_;
};

}  // namespace fastdcgan::cpu
