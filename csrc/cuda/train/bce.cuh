// Binary cross-entropy of logits against one label for each of several equal parts of them: losses, their gradient and
// the mean probabilities in one launch, one block for each part.
#pragma once

#include "cuda/device/vec.h"

namespace fastdcgan::cuda {

struct Bce {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMostParts = 64;  // of one launch

  struct Shared {
    double loss[kWarps], probability[kWarps];
  };
  struct Labels {
    float label[kMostParts];
  };
};

GPU_INLINE double sum_of_warp(double value) {
#pragma unroll
  for (int flip = 16; flip > 0; flip /= 2) value += __shfl_xor_sync(~0u, value, flip);
  return value;
}

// Of part i, `size` logits and label y: the means of (1 - y)*x + max(-x, 0) + log(1 + exp(-|x|)) and of sigmoid(x) to
// losses[i] and probabilities[i], and (sigmoid(x) - y) / size to `grad`, which may be null.
template <class T>
__global__ void __launch_bounds__(Bce::kThreads)
    bce(const T* __restrict__ logits, const __grid_constant__ Bce::Labels labels, int64_t size,
        float* __restrict__ losses, float* __restrict__ probabilities, float* __restrict__ grad) {
  auto& shared = gpu::shared_memory<Bce::Shared>();
  const float y = labels.label[blockIdx.x], other = 1.f - y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * size;
  double loss = 0, probability = 0;
  gpu::await_kernels_before();
  for (int64_t i = threadIdx.x; i < size; i += Bce::kThreads) {
    const float x = gpu::to_float(logits[first + i]), e = expf(-fabsf(x));
    loss += other * x + (x < 0 ? -x : 0.f) + log1pf(e);
    probability += (x < 0 ? e : 1.f) / (1.f + e);
    // sigmoid(x) - y, without its cancellation.
    if (grad != nullptr)
      grad[first + i] = (x < 0 ? other * e - y : other - y * e) / (1.f + e) / static_cast<float>(size);
  }
  loss = sum_of_warp(loss), probability = sum_of_warp(probability);
  if (threadIdx.x % 32 == 0) {
    shared.loss[threadIdx.x / 32] = loss;
    shared.probability[threadIdx.x / 32] = probability;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < Bce::kWarps; ++warp) loss += shared.loss[warp], probability += shared.probability[warp];
    losses[blockIdx.x] = static_cast<float>(loss / static_cast<double>(size));
    probabilities[blockIdx.x] = static_cast<float>(probability / static_cast<double>(size));
  }
}

// `labels` [parts] on the host; `logits` and `grad` [parts, size].
template <class T>
void bce_pass(const T* logits, const double* labels, int64_t parts, int64_t size, float* losses, float* probabilities,
              float* grad, gpu::Stream stream) {
  for (int64_t first = 0; first < parts; first += Bce::kMostParts) {
    const int now = static_cast<int>(parts - first < Bce::kMostParts ? parts - first : Bce::kMostParts);
    Bce::Labels some{};
    for (int i = 0; i < now; ++i) some.label[i] = static_cast<float>(labels[first + i]);
    gpu::launch_early(bce<T>, {"bce", dim3(now), Bce::kThreads, sizeof(Bce::Shared), stream}, logits + first * size,
                      some, size, losses + first, probabilities + first,
                      grad != nullptr ? grad + first * size : nullptr);
  }
}

}  // namespace fastdcgan::cuda
