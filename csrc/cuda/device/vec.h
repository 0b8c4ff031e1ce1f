// Vectors of numbers that move in one instruction.
#pragma once

#include "cuda/device/numbers.h"

namespace fastdcgan::gpu {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
  GPU_INLINE T& operator[](int i) { return v[i]; }
  GPU_INLINE const T& operator[](int i) const { return v[i]; }
};

// How many T one access of 16 bytes, the widest, moves.
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

GPU_HOST_INLINE bool aligned(const void* p, size_t bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

namespace detail {
GPU_INLINE void require_aligned([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifndef __CUDACC__
  if (!aligned(p, bytes)) cuda_on_cpu::engine.fail("misaligned access of " + std::to_string(bytes) + " bytes");
#endif
}
// An access by the thread itself, which the shim watches.
GPU_INLINE void access([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool written) {
#ifndef __CUDACC__
  require_aligned(p, bytes);
  cuda_on_cpu::engine.access(p, bytes, written);
#endif
}
}  // namespace detail

template <int N, class T>
GPU_INLINE Vec<T, N> load(const T* from) {
  detail::access(from, sizeof(Vec<T, N>), false);
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <class T, int N>
GPU_INLINE void store(T* to, const Vec<T, N>& value) {
  detail::access(to, sizeof value, true);
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

}  // namespace fastdcgan::gpu
