// One Adam step (Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1) over a list of
// tensors, with the roundings of torch.optim.Adam: coefficients in double, elements in float.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace fastdcgan::cpu {

// A parameter as raw memory. All of it is dense and in one order.
struct AdamTensor {
  float* weight;
  void* grad;  // float, bfloat16 or half
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;  // the new weight in bfloat16 or half goes here as well, where it is given
  int64_t size;
  c10::ScalarType grad_dtype, copy_dtype;
  int64_t step;  // counted from 1: the one that is done now
};

struct AdamSettings {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // weight decay shrinks the weight (AdamW), else it is added to the gradient
  bool maximize;
  bool masters;  // weights are masters of their copies: a copy that is another number was set, and is the weight
  double grad_scale;  // where not 1, gradients are divided by it, also where they lie
};

void adam_pass(const std::vector<AdamTensor>&, const AdamSettings&);

}  // namespace fastdcgan::cpu
