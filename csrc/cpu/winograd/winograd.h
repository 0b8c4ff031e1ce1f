// Contractions whose kernel is two or three times their stride (DCGAN's 4x4 with stride 2, 3x3 with stride 1), by
// Winograd's minimal filtering: Winograd, Arithmetic Complexity of Computations (1980); Lavin and Gray, Fast Algorithms
// for Convolutional Neural Networks (2015).
//
// Along each axis such a `conv` is, for each phase of its input, a dense convolution of two or three taps, added up
// over phases; a `conv_transpose` is one for each phase of its output. Tiles of inputs and the taps are transformed
// (winograd_filters.h); for each of the points, tiles times channels are one dense product (gemm.h).
#pragma once

#include <array>
#include <vector>

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

constexpr int kMostTaps = 3;

// Outputs `first + i*out_step`, i < count, along an axis, that read the inputs `input + i*in_step` through taps[0] and
// the next ones, `in_step` further, through taps[1], and so on.
struct Phase {
  std::array<int64_t, kMostTaps> taps;
  int64_t first, out_step, count, input, in_step;

  int64_t tiles(int64_t outputs) const { return (count + outputs - 1) / outputs; }
};

// The phases of an axis whose kernel is a multiple of its stride.
std::vector<Phase> phases(const Axis&);

// With tiles of kOutputs x kOutputs outputs, 2 or 4. `can_winograd`: whether the others can run a contraction.
template <int kOutputs>
bool can_winograd(const Contraction&);

template <int kOutputs>
void winograd_contract(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);

template <int kOutputs>
void winograd_weight_grad(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);

// With tiles of 4x4 outputs: whether the result may be contiguous.
bool can_contiguous_winograd_grad(const Contraction&, c10::ScalarType);

}  // namespace fastdcgan::cpu
