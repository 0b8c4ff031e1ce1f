// An operand of a contraction, and what is computed where it is loaded: the prologue. See `Operand` in
// fastdcgan/backends/base.py.
#pragma once

#include "cuda/device/activation.h"
#include "cuda/device/pairs.h"
#include "cuda/device/tensor_core.h"

namespace fastdcgan::cuda {

using gpu::kVec;
using gpu::Vec;

enum class Prologue : int { none = 0, activate = 1, bn_backward = 2 };

// Rows of `channels` numbers, one for each pixel of a tensor in NHWC.
template <class T>
struct Operand {
  const T* x = nullptr;
  const T* y = nullptr;         // bn_backward
  const float* coef = nullptr;  // rows [groups, channels]
  int groups = 1;               // of the coefficients: 1, or those of the batch
  int channels = 0;
  Prologue prologue = Prologue::none;
  RuntimeActivation act;
  bool affine = false;   // bn_backward with p and q
  bool vectors = false;  // all rows begin at multiples of 16 bytes

  GPU_INLINE const float* coef_of(int group) const {
    return coef + static_cast<int64_t>(min(group, groups - 1)) * channels;
  }
};

// N floats of which the first `count` are there, the rest 0. `vectors`: all are, at a multiple of 16 bytes.
template <int N>
GPU_INLINE void load_floats(float (&to)[N], const float* from, bool vectors, int count) {
  if (vectors) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const Vec<float, 4> four = gpu::load<4>(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = four[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? from[i] : 0.f;
  }
}

// Begins to copy 16 bytes of a row to shared memory, zeros where `count`, which may be negative, has none left.
template <class T>
GPU_INLINE void load_chunk(T* to, const T* from, int count, bool vectors) {
  if (vectors) {
    gpu::copy_async(to, from, count > 0);
  } else {
    Vec<T, kVec<T>> values;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) values[i] = i < count ? from[i] : gpu::from_float<T>(0.f);
    gpu::store(to, values);
  }
}

// Applies the prologue in place to a chunk from `channel` on of a pixel of the tensor; `y` is the same chunk of
// operand.y. Both are 0 beyond the last channel, and so are coefficients there and what comes of them.
template <class T>
GPU_INLINE void apply_prologue(const Operand<T>& operand, T* x, const T* y, int group, int channel) {
  const int count = operand.channels - channel;
  const int64_t row = static_cast<int64_t>(operand.groups) * operand.channels;
  const float* coef = operand.coef_of(group) + channel;
  const bool backward = operand.prologue == Prologue::bn_backward;
  if (operand.act.linear) {
    constexpr int N = 4;  // at a time, beside all the sums that a thread holds
#pragma unroll
    for (int first = 0; first < kVec<T>; first += N) {
      float s[N], t[N], values[N], raw[N];
      load_floats(s, coef + first, operand.vectors, count - first);
      load_floats(t, coef + row + first, operand.vectors, count - first);
      gpu::load_numbers(values, x + first);
      if (!backward) {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = operand.act.linear_forward(values[i] * s[i] + t[i]);
      } else {
        gpu::load_numbers(raw, y + first);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] *= s[i] * operand.act.linear_derivative(raw[i] * s[i] + t[i]);
        if (operand.affine) {
          load_floats(s, coef + 2 * row + first, operand.vectors, count - first);
          load_floats(t, coef + 3 * row + first, operand.vectors, count - first);
#pragma unroll
          for (int i = 0; i < N; ++i) values[i] += s[i] * raw[i] + t[i];
        }
      }
      gpu::store_numbers(x + first, values);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < min(count, kVec<T>); ++i) {
      const float s = coef[i], t = coef[row + i], value = gpu::to_float(gpu::load<1>(x + i)[0]);
      float result;
      if (!backward) {
        result = operand.act.other_forward(value * s + t);
      } else {
        const float raw = gpu::to_float(gpu::load<1>(y + i)[0]);
        result = s * operand.act.other_derivative(raw * s + t) * value;
        if (operand.affine) result += coef[2 * row + i] * raw + coef[3 * row + i];
      }
      gpu::store(x + i, Vec<T, 1>{{gpu::from_float<T>(result)}});
    }
  }
}

}  // namespace fastdcgan::cuda
