// Binary cross-entropy of logits against one label for each of several equal parts of them.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace fastdcgan::cpu {

// For part i of `parts`, `size` logits each, and label y_i: the means of (1 - y)*x + max(-x, 0) + log(1 + exp(-|x|))
// and of sigmoid(x) to losses[i] and probabilities[i], and (sigmoid(x) - y) / size, the gradient of losses[i], to
// `grad` (which may be null). Elements in float, sums in double.
void bce_pass(
    const void* logits, c10::ScalarType dtype, int64_t parts, int64_t size, const float* labels, float* losses,
    float* probabilities, float* grad);

}  // namespace fastdcgan::cpu
