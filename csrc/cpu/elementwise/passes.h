// The passes over raw memory. Shapes and formulas: fastdcgan/backends/base.py.
#pragma once

#include "cpu/elementwise/pass.h"

namespace fastdcgan::cpu {

struct Activation {
  int id;
  float slope;
};

// The passes with an activation return false if it is unknown. `coef` is [rows, groups, channels]; where `rows` is odd,
// the last one is the slope of LeakyReLU for each channel (PReLU).
bool norm_act_pass(const Shape&, Memory, c10::ScalarType, const float* coef, int64_t rows, Activation);
bool norm_act_backward_pass(const Shape&, Memory, c10::ScalarType, const float* coef, int64_t rows, Activation);
// sums [(rows + 1) / 2, groups, channels]; stores g where `out` is given (it may be `da`).
bool grad_sums_pass(
    const Shape&, Memory, c10::ScalarType, const float* coef, int64_t rows, Activation, float* sums);
// stats [3, groups, channels].
void batch_stats_pass(const Shape&, Memory, c10::ScalarType, float* stats);

}  // namespace fastdcgan::cpu
