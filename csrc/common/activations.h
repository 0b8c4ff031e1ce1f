// The activations: forward, and derivative from the pre-activation z. Ids and conventions at 0 and NaN as in
// fastdcgan/activations.py. `V` is float or a vector of floats; what it has to bring is in Math<V>. Needs no torch.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FASTDCGAN_INLINE __host__ __device__ __forceinline__
#else
#define FASTDCGAN_INLINE inline
#endif

namespace fastdcgan {

enum class ActId : int { identity = 0, relu = 1, leaky_relu = 2, tanh = 3, sigmoid = 4, silu = 5, gelu = 6, elu = 7 };

template <class V>
struct Math;

template <>
struct Math<float> {
  static FASTDCGAN_INLINE float exp(float x) { return ::expf(x); }
  static FASTDCGAN_INLINE float expm1(float x) { return ::expm1f(x); }
  static FASTDCGAN_INLINE float tanh(float x) { return ::tanhf(x); }
  static FASTDCGAN_INLINE float erf(float x) { return ::erff(x); }
  // NaN chooses `other`.
  static FASTDCGAN_INLINE float if_positive(float z, float then, float other) { return z > 0.f ? then : other; }
  static FASTDCGAN_INLINE float if_not_positive(float z, float then, float other) { return z <= 0.f ? then : other; }
};

template <class V>
struct Identity {
  static constexpr ActId id = ActId::identity;
  FASTDCGAN_INLINE explicit Identity(float) {}
  FASTDCGAN_INLINE V forward(V z) const { return z; }
  FASTDCGAN_INLINE V derivative(V) const { return V(1.f); }
};

template <class V>
struct ReLU {
  static constexpr ActId id = ActId::relu;
  FASTDCGAN_INLINE explicit ReLU(float) {}
  FASTDCGAN_INLINE V forward(V z) const { return Math<V>::if_not_positive(z, V(0.f), z); }
  FASTDCGAN_INLINE V derivative(V z) const { return Math<V>::if_not_positive(z, V(0.f), V(1.f)); }
};

template <class V>
struct LeakyReLU {
  static constexpr ActId id = ActId::leaky_relu;
  V slope;
  FASTDCGAN_INLINE explicit LeakyReLU(float s) : slope(s) {}
  FASTDCGAN_INLINE V forward(V z) const { return Math<V>::if_positive(z, z, z * slope); }
  FASTDCGAN_INLINE V derivative(V z) const { return Math<V>::if_positive(z, V(1.f), slope); }
};

template <class V>
struct Tanh {
  static constexpr ActId id = ActId::tanh;
  FASTDCGAN_INLINE explicit Tanh(float) {}
  FASTDCGAN_INLINE V forward(V z) const { return Math<V>::tanh(z); }
  FASTDCGAN_INLINE V derivative(V z) const {
    const V a = Math<V>::tanh(z);
    return V(1.f) - a * a;
  }
};

template <class V>
struct Sigmoid {
  static constexpr ActId id = ActId::sigmoid;
  FASTDCGAN_INLINE explicit Sigmoid(float) {}
  FASTDCGAN_INLINE V forward(V z) const { return V(1.f) / (V(1.f) + Math<V>::exp(V(0.f) - z)); }
  FASTDCGAN_INLINE V derivative(V z) const {
    const V a = forward(z);
    return a * (V(1.f) - a);
  }
};

template <class V>
struct SiLU {
  static constexpr ActId id = ActId::silu;
  FASTDCGAN_INLINE explicit SiLU(float) {}
  FASTDCGAN_INLINE V forward(V z) const { return z / (V(1.f) + Math<V>::exp(V(0.f) - z)); }
  FASTDCGAN_INLINE V derivative(V z) const {
    const V a = V(1.f) / (V(1.f) + Math<V>::exp(V(0.f) - z));
    return a * (V(1.f) + z * (V(1.f) - a));
  }
};

// The exact form, by erf.
template <class V>
struct GELU {
  static constexpr ActId id = ActId::gelu;
  FASTDCGAN_INLINE explicit GELU(float) {}
  FASTDCGAN_INLINE V cdf(V z) const { return V(.5f) * (V(1.f) + Math<V>::erf(z * V(0.70710678118654752f))); }
  FASTDCGAN_INLINE V forward(V z) const { return z * cdf(z); }
  FASTDCGAN_INLINE V derivative(V z) const {
    return cdf(z) + z * Math<V>::exp(V(-.5f) * z * z) * V(0.39894228040143268f);
  }
};

template <class V>
struct ELU {
  static constexpr ActId id = ActId::elu;
  V alpha;
  FASTDCGAN_INLINE explicit ELU(float a) : alpha(a) {}
  FASTDCGAN_INLINE V forward(V z) const { return Math<V>::if_positive(z, z, alpha * Math<V>::expm1(z)); }
  FASTDCGAN_INLINE V derivative(V z) const { return Math<V>::if_not_positive(z, alpha * Math<V>::exp(z), V(1.f)); }
};

// Calls `f` with the functor of `id`. False if there is no such activation.
template <class V, class F>
inline bool with_activation(int id, float slope, F&& f) {
  switch (static_cast<ActId>(id)) {
    case ActId::identity: f(Identity<V>(slope)); return true;
    case ActId::relu: f(ReLU<V>(slope)); return true;
    case ActId::leaky_relu: f(LeakyReLU<V>(slope)); return true;
    case ActId::tanh: f(Tanh<V>(slope)); return true;
    case ActId::sigmoid: f(Sigmoid<V>(slope)); return true;
    case ActId::silu: f(SiLU<V>(slope)); return true;
    case ActId::gelu: f(GELU<V>(slope)); return true;
    case ActId::elu: f(ELU<V>(slope)); return true;
  }
  return false;
}

}  // namespace fastdcgan
