// Contractions whose kernel is twice their stride (DCGAN's 4x4 with stride 2), by Winograd's minimal filtering: Winograd, Arithmetic
// Complexity of Computations (1980); Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015).
//
// Along each axis such a `conv` is, for each phase of its input, a dense convolution of two taps, added up over phases; a
// `conv_transpose` is one for each phase of its output. Two outputs of two taps take three products instead of four,
//
//   y0 = d0*g0 + d1*g1 = (d0 - d1)*g0 + d1*(g0 + g1)
//   y1 = d1*g0 + d2*g1 = d1*(g0 + g1) + (d2 - d1)*g1
//
// and tiles of 2x2 outputs nine instead of sixteen, all with factors of 1: the rounding is about that of plain sums. For
// each of the nine points, tiles times channels are one dense product (gemm.h).
#pragma once

#include <array>
#include <vector>

#include "cpu/contraction/contraction.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

constexpr int kSide = 3;                  // inputs of a tile along an axis, and products
constexpr int kPoints = kSide * kSide;
constexpr int64_t kOutputs = 2;           // of a tile along an axis

// Outputs `first + i*out_step`, i < count, along an axis, that read the inputs `input + i*in_step` through taps[0] and
// the next ones, `in_step` further, through taps[1].
struct TwoTaps {
  std::array<int64_t, 2> taps;
  int64_t first, out_step, count, input, in_step;

  int64_t tiles() const { return (count + kOutputs - 1) / kOutputs; }
};

// The phases of an axis whose kernel is twice the stride.
std::vector<TwoTaps> two_taps(const Axis&);

// Whether the functions below can run a contraction.
bool can_winograd(const Contraction&);

void winograd_contract(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
void winograd_weight_grad(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);

}  // namespace fastdcgan::cpu
