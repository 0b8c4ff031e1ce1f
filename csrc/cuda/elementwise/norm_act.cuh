// Normalise and activate, and its backward: one read (or two) and one write of every value.
#pragma once

#include "cuda/elementwise/pass.cuh"

namespace fastdcgan::cuda {

// Of a multiprocessor at once: 64 registers a thread, and 80 with slopes of eight channels.
template <class Act>
constexpr int kNormActBlocks = kLearnsSlope<Act> ? 3 : 4;
template <class Act>  // which has eight numbers at once beside four coefficients of eight channels
constexpr int kBackwardBlocks = std::is_same_v<Act, RuntimeActivation> ? 3 : kNormActBlocks<Act>;

// out = act(s*x + t); `coef` is [rows, groups, C], of which s and t are the first two.
template <class T, int V, bool kPlanes, class Act>
__global__ void __launch_bounds__(kThreads, kNormActBlocks<Act>)
    norm_act(const T* __restrict__ x, const float* __restrict__ coef, Act act, Pass pass, T* __restrict__ out) {
  const Place<V, kPlanes> place(pass);
  gpu::await_kernels_before();
  const PerChannel<V, kPlanes> s(coef, 0, place), t(coef, 1, place);
  const PerValue<Act, V, kPlanes> acts(act, coef, place);
  place.template for_each<2>([&](auto n, const auto& at) {
    constexpr int kCount = decltype(n)::value;
    Vec<T, V> values[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) values[u] = gpu::load<V>(x + at(u));
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      constexpr int N = kAtOnce<Act, V>;
#pragma unroll
      for (int first = 0; first < V; first += N) {
        float z[N];
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] = s[first + i] * gpu::to_float(values[u][first + i]) + t[first + i];
        acts.activate(first, z);
#pragma unroll
        for (int i = 0; i < N; ++i) values[u][first + i] = gpu::from_float<T>(z[i]);
      }
      gpu::store(out + at(u), values[u]);
    }
  });
}

// dy = s*act'(s*y + t)*da, and + p*y + q where `grad_coef` [rows, groups, C] has (s, t, p, q).
template <class T, int V, bool kPlanes, class Act>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<Act>)
    norm_act_backward(const T* __restrict__ da, const T* __restrict__ y, const float* __restrict__ grad_coef, int rows,
                      Act act, Pass pass, T* __restrict__ dy) {
  const Place<V, kPlanes> place(pass);
  gpu::await_kernels_before();
  const bool centred = rows >= 4;
  const PerChannel<V, kPlanes> s(grad_coef, 0, place), t(grad_coef, 1, place);
  const PerValue<Act, V, kPlanes> acts(act, grad_coef, place);
  const PerChannel<V, kPlanes> p(grad_coef, centred ? 2 : 0, place), q(grad_coef, centred ? 3 : 0, place);
  place.template for_each<1>([&](auto, const auto& at) {  // of two tensors
    Vec<T, V> values = gpu::load<V>(y + at(0)), grads = gpu::load<V>(da + at(0));
    constexpr int N = kAtOnce<Act, V>;
#pragma unroll
    for (int first = 0; first < V; first += N) {
      float z[N];
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = s[first + i] * gpu::to_float(values[first + i]) + t[first + i];
      acts.differentiate(first, z);
#pragma unroll
      for (int i = first; i < first + N; ++i) {
        const float value = gpu::to_float(values[i]);
        float result = s[i] * (gpu::to_float(grads[i]) * z[i - first]);
        if (centred) result += p[i] * value + q[i];  // without them not even 0*value, which may be NaN
        values[i] = gpu::from_float<T>(result);
      }
    }
    gpu::store(dy + at(0), values);
  });
}

// --- callers: the same code on a GPU and on a CPU --------------------------------------------------------------------

template <class T, int V, bool kPlanes, class Act>
void launch_norm_act(const T* x, const float* coef, Act act, const Pass& pass, T* out, gpu::Stream stream) {
  gpu::launch_early(norm_act<T, V, kPlanes, Act>, {"norm_act", pass.grid, kThreads, 0, stream}, x, coef, act, pass,
                    out);
}

template <class T, int V, bool kPlanes, class Act>
void launch_norm_act_backward(
    const T* da, const T* y, const float* grad_coef, int rows, Act act, const Pass& pass, T* dy, gpu::Stream stream) {
  dim3 grid = pass.grid;
  grid.y = std::max(grid.y * kBackwardBlocks<Act> / kNormActBlocks<Act>, 1u);
  gpu::launch_early(norm_act_backward<T, V, kPlanes, Act>, {"norm_act_backward", grid, kThreads, 0, stream}, da, y,
                    grad_coef, rows, act, pass, dy);
}

// `act` is an Activation, a functor or a LearnedSlope.
template <class T, class Act>
void norm_act_pass(const Shape& shape, const T* x, const float* coef, Act act, T* out, gpu::Stream stream) {
  const Pass pass = make_pass<T>(shape, kNormActBlocks<Act>, x, out);
  with_layout<T>(pass, [&](auto v, auto planes) {
    with_functor_for(v, act, [&](auto functor) {
      launch_norm_act<T, decltype(v)::value, decltype(planes)::value>(x, coef, functor, pass, out, stream);
    });
  });
}

template <class T, class Act>
void norm_act_backward_pass(
    const Shape& shape, const T* da, const T* y, const float* grad_coef, int rows, Act act, T* dy, gpu::Stream stream) {
  const Pass pass = make_pass<T>(shape, kNormActBlocks<Act>, da, y, dy);
  with_layout<T>(pass, [&](auto v, auto planes) {
    with_functor_for(v, act, [&](auto functor) {
      launch_norm_act_backward<T, decltype(v)::value, decltype(planes)::value>(
          da, y, grad_coef, rows, functor, pass, dy, stream);
    });
  });
}

}  // namespace fastdcgan::cuda
