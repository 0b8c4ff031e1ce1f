// The two sums of a channel that the backward of batch normalisation needs: of g = da*act'(s*y + t) and of g*xhat, with
// xhat = (y - mean)*rstd; that of a learned slope; and, where it is wanted, g itself.
#pragma once

#include "cuda/elementwise/reduction.cuh"

namespace fastdcgan::cuda {

// 80 registers a thread: three coefficients and two sums of eight channels; 128 for four and three of them, and for an
// activation that is chosen at run time.
template <class Act>
constexpr int kGradSumsBlocks = kLearnsSlope<Act> || std::is_same_v<Act, RuntimeActivation> ? 2 : 3;

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

// Without and with sum(g*xhat); without and with that of the slope.
template <class Act, bool kNormalised>
constexpr int kSums = 1 + kNormalised + kLearnsSlope<Act>;

// `coef` is (s, t, mean, rstd), or (s, t) if not kNormalised, and then the slopes; `g_out` may be null.
template <class T, int V, bool kPlanes, class Act, bool kNormalised>
__global__ void __launch_bounds__(kThreads, kGradSumsBlocks<Act>)
    grad_sums(const T* __restrict__ da, const T* __restrict__ y, const float* __restrict__ coef, Act act, Pass pass,
              T* __restrict__ g_out, float* __restrict__ partials) {
  const Place<V, kPlanes> place(pass);
  gpu::await_kernels_before();
  const PerChannel<V, kPlanes> s(coef, 0, place), t(coef, 1, place);
  const PerChannel<V, kPlanes> mean(coef, kNormalised ? 2 : 0, place);
  const PerValue<Act, V, kPlanes> acts(act, coef, place);
  constexpr int kValues = kSums<Act, kNormalised>;
  SumsPart<kValues> sums[V];
  place.template for_each<1>([&](auto, const auto& at) {  // of two tensors
    Vec<T, V> values = gpu::load<V>(y + at(0)), grads = gpu::load<V>(da + at(0));
    constexpr int N = kAtOnce<Act, V>;
#pragma unroll
    for (int first = 0; first < V; first += N) {
      float z[N];
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = s[first + i] * gpu::to_float(values[first + i]) + t[first + i];
      if constexpr (kLearnsSlope<Act>)
        sums[first].sum[kValues - 1] += z[0] > 0.f ? 0.f : gpu::to_float(grads[first]) * z[0];
      acts.differentiate(first, z);
#pragma unroll
      for (int i = first; i < first + N; ++i) {
        float g = gpu::to_float(grads[i]) * z[i - first];
        if (g_out != nullptr) g = gpu::rounded<T>(g);  // what the next pass takes a difference to the mean of
        sums[i].sum[0] += g;
        if constexpr (kNormalised) sums[i].sum[1] += g * (gpu::to_float(values[i]) - mean[i]);
        grads[i] = gpu::from_float<T>(g);
      }
    }
    if (g_out != nullptr) gpu::store(g_out + at(0), grads);
  });
  join_block(sums, place, [&](int column, const SumsPart<kValues>& all) {
    *partial(partials, kValues, 0, pass, column) = all.sum[0];
    if constexpr (kLearnsSlope<Act>) *partial(partials, kValues, kValues - 1, pass, column) = all.sum[kValues - 1];
    if constexpr (kNormalised) {
      const float rstd = coef[(int64_t{3} * gridDim.z + blockIdx.z) * pass.channels + column % pass.channels];
      *partial(partials, kValues, 1, pass, column) = all.sum[1] * rstd;
    }
  });
}

template <class T, int V, bool kPlanes, bool kNormalised, class Act>
void launch_grad_sums(
    const T* da, const T* y, const float* coef, Act act, const Pass& pass, T* g_out, float* partials,
    gpu::Stream stream) {
  constexpr size_t kShared = sizeof(BlockShared<SumsPart<kSums<Act, kNormalised>>, V, kPlanes>);
  gpu::launch_early(grad_sums<T, V, kPlanes, Act, kNormalised>, {"grad_sums", pass.grid, kThreads, kShared, stream}, da,
                    y, coef, act, pass, g_out, partials);
}

// sums [(rows + 1) / 2, groups, C]; `act` is an Activation, a functor or a LearnedSlope. `allocate(n)` gives n floats
// that live until the stream has done this.
template <class T, class Act, class Allocate>
void grad_sums_pass(
    const Shape& shape, const T* da, const T* y, const float* coef, int rows, Act act, T* g_out, Allocate allocate,
    float* sums, gpu::Stream stream) {
  // Null is aligned.
  const Pass pass = make_pass<T>(shape, kGradSumsBlocks<Act>, da, y, g_out);
  float* partials = allocate(partials_size(pass, (rows + 1) / 2));
  with_layout<T>(pass, [&](auto v, auto planes) {
    with_functor_for(v, act, [&](auto functor) {
      constexpr int V = decltype(v)::value;
      constexpr bool kPlanes = decltype(planes)::value;
      if (rows >= 4)
        launch_grad_sums<T, V, kPlanes, true>(da, y, coef, functor, pass, g_out, partials, stream);
      else
        launch_grad_sums<T, V, kPlanes, false>(da, y, coef, functor, pass, g_out, partials, stream);
    });
  });
  if (rows >= 4)
    launch_combine<SumsPart<kSums<Act, true>>>("combine_sums", partials, slots_of(pass), sums, stream);
  else
    launch_combine<SumsPart<kSums<Act, false>>>("combine_sums", partials, slots_of(pass), sums, stream);
}

}  // namespace fastdcgan::cuda
