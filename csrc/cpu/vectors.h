// Float vectors of ATen, and tensors of float, bfloat16 or half read and written as pairs of them.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

#include "../common/activations.h"

namespace fastdcgan {

using V = at::vec::Vectorized<float>;

template <>
struct Math<V> {
  static V exp(V x) { return x.exp(); }
  static V expm1(V x) { return x.expm1(); }
  static V tanh(V x) { return x.tanh(); }
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

}  // namespace cpu
}  // namespace fastdcgan
