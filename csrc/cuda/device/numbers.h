// The storage types of tensors; arithmetic is float.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device/launch.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastdcgan::gpu {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

#ifndef __CUDACC__
namespace detail {
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
}  // namespace detail
#endif

GPU_INLINE float to_float(float x) { return x; }

GPU_INLINE float to_float(bf16 x) {
#ifdef __CUDACC__
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
#else
  return detail::float_of(static_cast<uint32_t>(x.bits) << 16);
#endif
}

GPU_INLINE float to_float(fp16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return detail::float_of(sign | 0x7F800000 | magnitude << 13);  // infinite or NaN
  // Half the exponents of float: a product with 2^112 moves them, subnormal numbers included.
  return detail::float_of(sign | detail::bits_of(detail::float_of(magnitude << 13) * 0x1p112f));
#endif
}

// Rounded to nearest, ties to even; NaN stays NaN.
template <class T>
GPU_INLINE T from_float(float x);

template <>
GPU_INLINE float from_float<float>(float x) {
  return x;
}

template <>
GPU_INLINE bf16 from_float<bf16>(float x) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  if (x != x) return {0x7FFF};
  const uint32_t bits = detail::bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
GPU_INLINE fp16 from_float<fp16>(float x) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  if (x != x) return {0x7FFF};
  const uint32_t sign = detail::bits_of(x) >> 16 & 0x8000, magnitude = detail::bits_of(x) & 0x7FFFFFFF;
  if (magnitude >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65520 and more: infinite
  // Below 2^-14 a half is a multiple of 2^-24: adding 1/2, whose last bit that is, rounds to one.
  if (magnitude < 0x38800000)
    return {static_cast<uint16_t>(sign | (detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3F000000))};
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13))};
#endif
}

// As a T that is read again.
template <class T>
GPU_INLINE float rounded(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace fastdcgan::gpu
