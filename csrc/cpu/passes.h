// The passes over raw memory. Shapes and formulas: fastdcgan/backends/base.py.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace fastdcgan::cpu {

struct Shape;

struct Activation {
  int id;
  float slope;
};

// A dense tensor [N, C, H, W] of float, bfloat16 or half.
struct Memory {
  const void* y;
  const void* da;
  void* out;
  c10::ScalarType dtype;
};

// All return false for an unknown activation. `coef` is [rows, groups, channels].
bool norm_act_pass(const Shape&, Memory, const float* coef, Activation);
bool norm_act_backward_pass(const Shape&, Memory, const float* coef, int64_t rows, Activation);
// sums [rows / 2, groups, channels]; stores g where `out` is given (it may be `da`).
bool grad_sums_pass(const Shape&, Memory, const float* coef, int64_t rows, Activation, float* sums);
// stats [3, groups, channels].
void batch_stats_pass(const Shape&, Memory, float* stats);

}  // namespace fastdcgan::cpu
