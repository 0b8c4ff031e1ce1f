// Arithmetic on vectors per channel, one thread for each value: in double where PyTorch's CPU kernels have double.
#pragma once

#include "cuda/elementwise/pass.cuh"

namespace fastdcgan::cuda {

constexpr int kVectorThreads = 128;

inline dim3 vector_grid(int64_t values) { return dim3(static_cast<unsigned>(ceil_div(values, kVectorThreads))); }

GPU_INLINE int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * kVectorThreads + threadIdx.x; }

// coef [4, groups, C] (s, t, mean, rstd) of mean and biased variance [groups, C]; the vectors [C] may be null, for 1, 0
// and 0. `shift` is a bias that the raw output lacks.
template <class = void>
__global__ void __launch_bounds__(kVectorThreads)
    coefficients(const float* __restrict__ mean, const float* __restrict__ var, const float* __restrict__ weight,
                 const float* __restrict__ bias, const float* __restrict__ shift, double eps, int64_t groups,
                 int64_t channels, float* __restrict__ coef) {
  const int64_t i = thread_number(), row = groups * channels;
  gpu::await_kernels_before();
  if (i >= row) return;
  const int64_t channel = i % channels;
  const double m = static_cast<double>(mean[i]) - (shift != nullptr ? shift[channel] : 0.f);
  const double rstd = 1 / sqrt(static_cast<double>(var[i]) + eps);
  const double s = (weight != nullptr ? weight[channel] : 1.f) * rstd;
  coef[i] = static_cast<float>(s);
  coef[row + i] = static_cast<float>((bias != nullptr ? bias[channel] : 0.f) - m * s);
  coef[2 * row + i] = static_cast<float>(m);
  coef[3 * row + i] = static_cast<float>(rstd);
}

// grad_coef [4, groups, C] (s, t, p, q) of sums [2, groups, C] over `count` values.
template <class = void>
__global__ void __launch_bounds__(kVectorThreads)
    grad_coefficients(const float* __restrict__ sums, const float* __restrict__ coef, double count, int64_t row,
                      float* __restrict__ grad_coef) {
  const int64_t i = thread_number();
  gpu::await_kernels_before();
  if (i >= row) return;
  const float s = coef[i], mean = coef[2 * row + i], rstd = coef[3 * row + i];
  const double scale = -static_cast<double>(s) / count;
  const double p = scale * rstd * sums[row + i];
  grad_coef[i] = s;
  grad_coef[row + i] = coef[row + i];
  grad_coef[2 * row + i] = static_cast<float>(p);
  grad_coef[3 * row + i] = static_cast<float>(scale * sums[i] - p * mean);
}

// For each group in order: running = w*batch + (1 - w)*running, with w from `factor` [groups] or `momentum`. Rounded as
// in PyTorch's CPU kernel, after each operation: the mean in float, the batch's variance in double.
template <class = void>
__global__ void __launch_bounds__(kVectorThreads)
    update_running(float* __restrict__ mean, float* __restrict__ var, const float* __restrict__ stats,
                   const float* __restrict__ shift, const float* __restrict__ factor, float momentum, int64_t groups,
                   int64_t channels) {
  const int64_t c = thread_number();
  gpu::await_kernels_before();
  if (c >= channels) return;
  const float moved = shift != nullptr ? shift[c] : 0.f;
  float running_mean = mean[c], running_var = var[c];
  for (int64_t g = 0; g < groups; ++g) {
    const float weight = factor != nullptr ? factor[g] : momentum;
    const float keep = static_cast<float>(1 - static_cast<double>(weight));
    const float batch_mean = __fadd_rn(stats[g * channels + c], moved);
    running_mean = __fadd_rn(__fmul_rn(weight, batch_mean), __fmul_rn(keep, running_mean));
    const double unbiased = stats[(2 * groups + g) * channels + c];
    running_var = static_cast<float>(__dadd_rn(__dmul_rn(weight, unbiased), __fmul_rn(keep, running_var)));
  }
  mean[c] = running_mean;
  var[c] = running_var;
}

}  // namespace fastdcgan::cuda
