// Float vectors of ATen, and tensors of float, bfloat16 or half read and written as pairs of them.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "common/activations.h"

namespace fastdcgan {

using V = at::vec::Vectorized<float>;

// A polynomial near 0 (a minimax fit of (tanh(x) - x)/x^3 in x^2), beyond it (1 - e)/(1 + e) with e = exp(-2|x|):
// within 2 units of the last place, several times as fast as the vector's own.
inline V tanh(V x) {
  const V size = x.abs(), square = x * x;
  V p = at::vec::fmadd(V(-5.6669681826e-3f), square, V(2.0606167683e-2f));
  p = at::vec::fmadd(p, square, V(-5.3730003999e-2f));
  p = at::vec::fmadd(p, square, V(1.3331330958e-1f));
  p = at::vec::fmadd(p, square, V(-3.3333278057e-1f));
  const V near = at::vec::fmadd(p * square, x, x);
  const V e = (V(-2.f) * size).exp();
  const V far = (V(1.f) - e) / (V(1.f) + e);
  const V with_sign = V::blendv(V(0.f) - far, far, x > V(0.f));
  return V::blendv(with_sign, near, size < V(.63f));
}

template <>
struct Math<V> {
  static V exp(V x) { return x.exp(); }
  static V expm1(V x) { return x.expm1(); }
  static V tanh(V x) { return fastdcgan::tanh(x); }
  static V erf(V x) { return x.erf(); }
  static V if_positive(V z, V then, V other) { return V::blendv(other, then, z > V(0.f)); }
  static V if_not_positive(V z, V then, V other) { return V::blendv(other, then, z <= V(0.f)); }
};

namespace cpu {

constexpr int64_t kWidth = V::size();
constexpr int64_t kStep = 2 * kWidth;  // elements that one step of a kernel handles: one vector of 16-bit ones

struct Lanes {
  V half[2];
};

template <class T>
inline Lanes read(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return {{V::loadu(p), V::loadu(p + kWidth)}};
  } else {
    auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p));
    return {{low, high}};
  }
}

template <class T>
inline void write(T* p, const Lanes& v) {
  if constexpr (std::is_same_v<T, float>) {
    v.half[0].store(p);
    v.half[1].store(p + kWidth);
  } else {
    at::vec::convert_from_float<T>(v.half[0], v.half[1]).store(p);
  }
}

// The same past the caches, where the vector width has that; `p` is aligned to whole vectors.
template <class T>
inline void write_non_temporal(T* p, const Lanes& v) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const auto store = [](void* to, auto x) {
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (std::is_same_v<decltype(x), V>) _mm512_stream_ps(static_cast<float*>(to), x);
    else _mm512_stream_si512(static_cast<__m512i*>(to), x);
#else
    if constexpr (std::is_same_v<decltype(x), V>) _mm256_stream_ps(static_cast<float*>(to), x);
    else _mm256_stream_si256(static_cast<__m256i*>(to), x);
#endif
  };
  if constexpr (std::is_same_v<T, float>) {
    store(p, v.half[0]);
    store(p + kWidth, v.half[1]);
  } else {
    store(p, at::vec::convert_from_float<T>(v.half[0], v.half[1]));
  }
#else
  write(p, v);
#endif
}

// As elements of T that are read again.
template <class T>
inline Lanes rounded(const Lanes& v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    auto [low, high] = at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(v.half[0], v.half[1]));
    return {{low, high}};
  }
}

template <class T>
inline V rounded(V x) {
  return rounded<T>(Lanes{{x, x}}).half[0];
}

// Non-temporal stores are seen by other threads after this.
inline void end_non_temporal() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

}  // namespace cpu
}  // namespace fastdcgan
