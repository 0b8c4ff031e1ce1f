// The two sums of a channel that the backward of batch normalisation needs: of g = da*act'(s*y + t) and of g*xhat, with
// xhat = (y - mean)*rstd; and, where it is wanted, g itself.
#pragma once

#include "cuda/elementwise/reduction.cuh"

namespace fastdcgan::cuda {

constexpr int kGradSumsBlocks = 3;  // 80 registers a thread: three coefficients and two sums of eight channels

// kValues 1: sum(g) alone.
template <int kValues_>
struct SumsPart {
  static constexpr int kValues = kValues_;
  float sum[kValues] = {};

  GPU_INLINE void merge(const SumsPart& other) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum[i] += other.sum[i];
  }
  GPU_INLINE SumsPart down(int distance) const {
    SumsPart other;
#pragma unroll
    for (int i = 0; i < kValues; ++i) other.sum[i] = __shfl_down_sync(~0u, sum[i], distance);
    return other;
  }
  static GPU_INLINE SumsPart load(const float* partials, const Slots& s, int group, int slot, int channel) {
    SumsPart part;
#pragma unroll
    for (int i = 0; i < kValues; ++i) part.sum[i] = partials[s.at(group, slot, kValues, i, channel)];
    return part;
  }
  // sums [kValues, groups, C]
  GPU_INLINE void store(float* sums, const Slots& s, int group, int channel) const {
#pragma unroll
    for (int64_t i = 0; i < kValues; ++i) sums[(i * s.groups + group) * s.channels + channel] = sum[i];
  }
};

// `coef` is (s, t, mean, rstd), or (s, t) for kValues 1; `g_out` may be null.
template <class T, int V, bool kPlanes, class Act, int kValues>
__global__ void __launch_bounds__(kThreads, kGradSumsBlocks)
    grad_sums(const T* __restrict__ da, const T* __restrict__ y, const float* __restrict__ coef, Act act, Pass pass,
              T* __restrict__ g_out, float* __restrict__ partials) {
  const Place<V, kPlanes> place(pass);
  gpu::await_kernels_before();
  const PerChannel<V, kPlanes> s(coef, 0, place), t(coef, 1, place);
  const PerChannel<V, kPlanes> mean(coef, kValues == 2 ? 2 : 0, place);
  SumsPart<kValues> sums[V];
  place.template for_each<1>([&](auto, const auto& at) {  // of two tensors
    Vec<T, V> values = gpu::load<V>(y + at(0)), grads = gpu::load<V>(da + at(0));
    constexpr int N = kAtOnce<Act, V>;
#pragma unroll
    for (int first = 0; first < V; first += N) {
      float z[N];
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = s[first + i] * gpu::to_float(values[first + i]) + t[first + i];
      differentiate(act, z);
#pragma unroll
      for (int i = first; i < first + N; ++i) {
        float g = gpu::to_float(grads[i]) * z[i - first];
        if (g_out != nullptr) g = gpu::rounded<T>(g);  // what the next pass takes a difference to the mean of
        sums[i].sum[0] += g;
        if constexpr (kValues == 2) sums[i].sum[1] += g * (gpu::to_float(values[i]) - mean[i]);
        grads[i] = gpu::from_float<T>(g);
      }
    }
    if (g_out != nullptr) gpu::store(g_out + at(0), grads);
  });
  join_block(sums, place, [&](int column, const SumsPart<kValues>& all) {
    *partial(partials, kValues, 0, pass, column) = all.sum[0];
    if constexpr (kValues == 2) {
      const float rstd = coef[(int64_t{3} * gridDim.z + blockIdx.z) * pass.channels + column % pass.channels];
      *partial(partials, kValues, 1, pass, column) = all.sum[1] * rstd;
    }
  });
}

template <class T, int V, bool kPlanes, int kValues, class Act>
void launch_grad_sums(
    const T* da, const T* y, const float* coef, Act act, const Pass& pass, T* g_out, float* partials,
    gpu::Stream stream) {
  constexpr size_t kShared = sizeof(BlockShared<SumsPart<kValues>, V, kPlanes>);
  gpu::launch_early(grad_sums<T, V, kPlanes, Act, kValues>, {"grad_sums", pass.grid, kThreads, kShared, stream}, da, y,
                    coef, act, pass, g_out, partials);
}

// sums [rows / 2, groups, C]; `rows` of `coef` are 4 or 2, `act` is an Activation or a functor. `allocate(n)` gives n
// floats that live until the stream has done this.
template <class T, class Act, class Allocate>
void grad_sums_pass(
    const Shape& shape, const T* da, const T* y, const float* coef, int rows, Act act, T* g_out, Allocate allocate,
    float* sums, gpu::Stream stream) {
  // Null is aligned.
  const Pass pass = make_pass<T>(shape, kGradSumsBlocks, da, y, g_out);
  float* partials = allocate(partials_size(pass, rows / 2));
  with_layout<T>(pass, [&](auto v, auto planes) {
    with_functor_for(v, act, [&](auto functor) {
      constexpr int V = decltype(v)::value;
      constexpr bool kPlanes = decltype(planes)::value;
      if (rows == 4)
        launch_grad_sums<T, V, kPlanes, 2>(da, y, coef, functor, pass, g_out, partials, stream);
      else
        launch_grad_sums<T, V, kPlanes, 1>(da, y, coef, functor, pass, g_out, partials, stream);
    });
  });
  if (rows == 4)
    launch_combine<SumsPart<2>>("combine_sums", partials, slots_of(pass), sums, stream);
  else
    launch_combine<SumsPart<1>>("combine_sums", partials, slots_of(pass), sums, stream);
}

}  // namespace fastdcgan::cuda
