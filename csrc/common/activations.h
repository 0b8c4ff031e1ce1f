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

enum class ActId : int {
  identity = 0,
  relu = 1,
  leaky_relu = 2,
  tanh = 3,
  sigmoid = 4,
  silu = 5,
  gelu = 6,
  elu = 7,
  relu6 = 8,
  hardtanh = 9,
  hardswish = 10,
  mish = 11,
  softplus = 12,
  logsigmoid = 13
};

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

template <class V, int kLow, int kHigh>
struct Clamp {
  FASTDCGAN_INLINE V forward(V z) const {
    const V not_above = Math<V>::if_not_positive(V(kHigh) - z, V(kHigh), z);
    return Math<V>::if_not_positive(z - V(kLow), V(kLow), not_above);
  }
  FASTDCGAN_INLINE V derivative(V z) const {
    const V below = Math<V>::if_not_positive(V(kHigh) - z, V(0.f), V(1.f));
    return Math<V>::if_not_positive(z - V(kLow), V(0.f), below);
  }
};

template <class V>
struct ReLU6 : Clamp<V, 0, 6> {
  static constexpr ActId id = ActId::relu6;
  FASTDCGAN_INLINE explicit ReLU6(float) {}
};

template <class V>
struct Hardtanh : Clamp<V, -1, 1> {
  static constexpr ActId id = ActId::hardtanh;
  FASTDCGAN_INLINE explicit Hardtanh(float) {}
};

template <class V>
struct Hardswish {
  static constexpr ActId id = ActId::hardswish;
  FASTDCGAN_INLINE explicit Hardswish(float) {}
  FASTDCGAN_INLINE V forward(V z) const { return z * (Clamp<V, 0, 6>().forward(z + V(3.f)) * V(1 / 6.f)); }
  FASTDCGAN_INLINE V derivative(V z) const {
    const V inner = Math<V>::if_positive(V(3.f) - z, z * V(1 / 3.f) + V(.5f), V(1.f));
    return Math<V>::if_not_positive(z + V(3.f), V(0.f), inner);
  }
};

// z*u with u = tanh(log(1 + e)) = e(e + 2)/(e(e + 2) + 2) and e = exp(z), which is 1 where exp(z) would overflow.
template <class V>
struct Mish {
  static constexpr ActId id = ActId::mish;
  FASTDCGAN_INLINE explicit Mish(float) {}
  static FASTDCGAN_INLINE V exp(V z) { return Math<V>::exp(Math<V>::if_positive(z - V(20.f), V(20.f), z)); }
  static FASTDCGAN_INLINE V u(V e) {
    const V n = e * (e + V(2.f));
    return n / (n + V(2.f));
  }
  FASTDCGAN_INLINE V forward(V z) const { return z * u(exp(z)); }
  FASTDCGAN_INLINE V derivative(V z) const {
    const V e = exp(z), a = u(e);
    return a + z * (e / (V(1.f) + e) * (V(1.f) - a * a));
  }
};

// With beta 1. Beyond PyTorch's threshold of 20 it is z in float anyway.
template <class V>
struct Softplus {
  static constexpr ActId id = ActId::softplus;
  FASTDCGAN_INLINE explicit Softplus(float) {}
  // max(z, 0) + log(1 + e) with e = exp(-|z|) <= 1: log(1 + e) = 2*artanh(q), q = e/(2 + e) <= 1/3, and that over q is
  // a polynomial in q^2 (a minimax fit), so that small values keep all their digits.
  FASTDCGAN_INLINE V forward(V z) const {
    const V e = Math<V>::exp(Math<V>::if_positive(z, V(0.f) - z, z));
    const V q = e / (V(2.f) + e), square = q * q;
    V p = V(2.8178335e-1f) * square + V(2.7960603e-1f);
    p = p * square + V(4.0024910e-1f);
    p = p * square + V(6.6666315e-1f);
    p = p * square + V(2.f);
    return Math<V>::if_positive(z, z, V(0.f)) + p * q;
  }
  FASTDCGAN_INLINE V derivative(V z) const { return Sigmoid<V>(0.f).forward(z); }
};

template <class V>
struct LogSigmoid {
  static constexpr ActId id = ActId::logsigmoid;
  FASTDCGAN_INLINE explicit LogSigmoid(float) {}
  FASTDCGAN_INLINE V forward(V z) const { return V(0.f) - Softplus<V>(0.f).forward(V(0.f) - z); }
  FASTDCGAN_INLINE V derivative(V z) const { return Sigmoid<V>(0.f).forward(V(0.f) - z); }
};

// Calls `f` with the functor of `id`. False if there is no such activation.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // `f` may be of the device alone
#endif
template <class V, class F>
FASTDCGAN_INLINE bool with_activation(int id, float slope, F&& f) {
  switch (static_cast<ActId>(id)) {
    case ActId::identity: f(Identity<V>(slope)); return true;
    case ActId::relu: f(ReLU<V>(slope)); return true;
    case ActId::leaky_relu: f(LeakyReLU<V>(slope)); return true;
    case ActId::tanh: f(Tanh<V>(slope)); return true;
    case ActId::sigmoid: f(Sigmoid<V>(slope)); return true;
    case ActId::silu: f(SiLU<V>(slope)); return true;
    case ActId::gelu: f(GELU<V>(slope)); return true;
    case ActId::elu: f(ELU<V>(slope)); return true;
    case ActId::relu6: f(ReLU6<V>(slope)); return true;
    case ActId::hardtanh: f(Hardtanh<V>(slope)); return true;
    case ActId::hardswish: f(Hardswish<V>(slope)); return true;
    case ActId::mish: f(Mish<V>(slope)); return true;
    case ActId::softplus: f(Softplus<V>(slope)); return true;
    case ActId::logsigmoid: f(LogSigmoid<V>(slope)); return true;
  }
  return false;
}

}  // namespace fastdcgan
