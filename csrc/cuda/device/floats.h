// Runs of numbers as floats, moved 16 bytes at a time.
#pragma once

#include "cuda/device/vec.h"

namespace fastdcgan::gpu {

// `from` is a multiple of the run's bytes, or of 16.
template <int N, class T>
GPU_INLINE void read_floats(const T* from, float (&to)[N]) {
  constexpr int kAtOnce = N < kVec<T> ? N : kVec<T>;
#pragma unroll
  for (int j = 0; j < N; j += kAtOnce) {
    const auto values = load<kAtOnce>(from + j);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) to[j + i] = to_float(values[i]);
  }
}

template <int N, class T>
GPU_INLINE void write_floats(T* to, const float (&from)[N]) {
  constexpr int kAtOnce = N < kVec<T> ? N : kVec<T>;
#pragma unroll
  for (int j = 0; j < N; j += kAtOnce) {
    Vec<T, kAtOnce> values;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = from_float<T>(from[j + i]);
    store(to + j, values);
  }
}

}  // namespace fastdcgan::gpu
