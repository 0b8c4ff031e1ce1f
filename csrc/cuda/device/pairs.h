// Pairs of 16-bit numbers as registers, the form in which tensor cores take them, and in which they are made from floats
// and made floats by the fewest instructions.
#pragma once

#include "cuda/device/vec.h"

namespace fastdcgan::gpu {

// 2N numbers, which begin at a multiple of their bytes.
template <int N, class T>
GPU_INLINE void load_pairs(unsigned (&to)[N], const T* from) {
  static_assert(sizeof(T) == 2, "two to a register");
#ifdef __CUDACC__
  const auto words = load<N>(reinterpret_cast<const unsigned*>(from));
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = words[i];
#else
  const auto numbers = load<2 * N>(from);
  for (int i = 0; i < N; ++i) to[i] = numbers[2 * i].bits | static_cast<unsigned>(numbers[2 * i + 1].bits) << 16;
#endif
}

#ifdef __CUDACC__
template <class T>
constexpr bool kInPairs = sizeof(T) == 2;
#else
template <class T>
constexpr bool kInPairs = false;
#endif

// N numbers from `from` on, which is a multiple of their bytes, as floats.
template <int N, class T>
GPU_INLINE void load_numbers(float (&to)[N], const T* from) {
  if constexpr (kInPairs<T>) {
    unsigned pairs[N / 2];
    load_pairs(pairs, from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(T{static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16)});
  } else {
    const auto numbers = load<N>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(numbers[i]);
  }
}

template <int N, class T>
GPU_INLINE void store_numbers(T* to, const float (&values)[N]) {
  const auto number = [&](int i) { return from_float<T>(values[i]); };
  if constexpr (kInPairs<T>) {
    Vec<unsigned, N / 2> pairs;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = number(2 * i).bits | static_cast<unsigned>(number(2 * i + 1).bits) << 16;
    store(reinterpret_cast<unsigned*>(to), pairs);
  } else {
    Vec<T, N> numbers;
#pragma unroll
    for (int i = 0; i < N; ++i) numbers[i] = number(i);
    store(to, numbers);
  }
}

}  // namespace fastdcgan::gpu
