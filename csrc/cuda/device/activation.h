// An activation whose id is known at run time.
#pragma once

#include <type_traits>

#include "common/activations.h"
#include "cuda/device/launch.h"

namespace fastdcgan::cuda {

// Identity, ReLU and leaky ReLU are one formula, written out for every number. The others go through a switch, number by
// number in a loop that is not unrolled: they are rare, and their code is long.
struct RuntimeActivation {
  int id = 0;
  float slope = 0;
  float negative = 1;  // the factor of what is not positive
  bool relu = false;   // which is 0 there, and has the derivative 1 at NaN
  bool linear = true;  // in two pieces

  RuntimeActivation() = default;
  RuntimeActivation(int id_, float slope_) : id(id_), slope(slope_) {
    const auto is = [&](ActId other) { return id == static_cast<int>(other); };
    relu = is(ActId::relu);
    linear = relu || is(ActId::identity) || is(ActId::leaky_relu);
    negative = relu ? 0.f : is(ActId::identity) ? 1.f : slope;
  }

  GPU_INLINE float linear_forward(float z) const { return z <= 0.f ? (relu ? 0.f : z * negative) : z; }
  GPU_INLINE float linear_derivative(float z) const {
    const bool positive = relu ? !(z <= 0.f) : z > 0.f;
    return positive ? 1.f : negative;
  }
  GPU_INLINE float other_forward(float z) const {
    with_activation<float>(id, slope, [&](const auto& act) { z = act.forward(z); });
    return z;
  }
  GPU_INLINE float other_derivative(float z) const {
    with_activation<float>(id, slope, [&](const auto& act) { z = act.derivative(z); });
    return z;
  }
};

// f of each number in its place, by code that is there once. The numbers rotate: registers have no index.
template <int N, class F>
GPU_INLINE void one_by_one(float (&z)[N], F f) {
#pragma unroll 1
  for (int k = 0; k < N; ++k) {
    const float first = f(z[0]);
#pragma unroll
    for (int i = 1; i < N; ++i) z[i - 1] = z[i];
    z[N - 1] = first;
  }
}

// How many of N numbers a kernel has ready for `Act` at a time: each takes a register.
template <class Act, int N>
constexpr int kAtOnce = std::is_same_v<Act, RuntimeActivation> && N > 1 ? 4 : 1;

// The activation of several numbers, in their place. `Act` is a functor of common/activations.h or a RuntimeActivation.
template <class Act, int N>
GPU_INLINE void activate(const Act& act, float (&z)[N]) {
  if constexpr (std::is_same_v<Act, RuntimeActivation>) {
    if (!act.linear) return one_by_one(z, [&](float one) { return act.other_forward(one); });
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = act.linear_forward(z[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = act.forward(z[i]);
  }
}

// The derivatives at z, in its place.
template <class Act, int N>
GPU_INLINE void differentiate(const Act& act, float (&z)[N]) {
  if constexpr (std::is_same_v<Act, RuntimeActivation>) {
    if (!act.linear) return one_by_one(z, [&](float one) { return act.other_derivative(one); });
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = act.linear_derivative(z[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = act.derivative(z[i]);
  }
}

}  // namespace fastdcgan::cuda
