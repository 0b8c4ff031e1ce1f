// Pairs of 16-bit numbers as registers, the form in which tensor cores take them.
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

}  // namespace fastdcgan::gpu
