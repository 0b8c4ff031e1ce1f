// Floats of PTX, and their roundings, as the manual's section on floating point defines them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ptx {

enum class Rounding : uint8_t { nearest, zero, down, up, away };  // rn, rz, rm, rp; rna: to nearest, ties away from zero

// `x` as a whole number.
inline double whole(double x, Rounding r) {
  switch (r) {
    case Rounding::nearest: return std::nearbyint(x);
    case Rounding::zero: return std::trunc(x);
    case Rounding::down: return std::floor(x);
    case Rounding::up: return std::ceil(x);
    case Rounding::away: return std::round(x);
  }
  return x;
}

// The bits of the float with E bits of exponent and M of mantissa that `x` rounds to; every NaN becomes `nan`.
template <int E, int M>
uint32_t rounded(double x, Rounding r, uint32_t nan) {
  constexpr int bias = (1 << (E - 1)) - 1;
  const uint32_t sign = std::signbit(x) ? 1u << (E + M) : 0, infinity = ((1u << E) - 1) << M;
  if (std::isnan(x)) return nan;
  if (std::isinf(x)) return sign | infinity;
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const double steps = std::abs(whole(std::ldexp(x, M - exponent), r));  // of this exponent's spacing
  const double size = std::ldexp(steps, exponent - M), most = std::ldexp(2 - std::ldexp(1, -M), bias);
  if (size > most) {
    const bool inward = r == Rounding::zero || r == (sign ? Rounding::up : Rounding::down);
    return sign | (inward ? infinity - 1 : infinity);
  }
  if (steps < std::ldexp(1, M)) return sign | static_cast<uint32_t>(steps);  // subnormal, or zero
  const int top = std::ilogb(size);
  return sign | ((static_cast<uint32_t>(top + bias) << M) + static_cast<uint32_t>(std::ldexp(size, M - top)) - (1u << M));
}

template <int E, int M>
double widened(uint32_t bits) {
  constexpr int bias = (1 << (E - 1)) - 1;
  const int exponent = bits >> M & ((1 << E) - 1);
  const double mantissa = bits & ((1u << M) - 1), sign = bits >> (E + M) & 1 ? -1 : 1;
  if (exponent == (1 << E) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  return sign * (exponent ? std::ldexp(mantissa + (1 << M), exponent - bias - M) : std::ldexp(mantissa, 1 - bias - M));
}

// .f16 and .bf16
template <int E, int M>
struct Small {
  static constexpr uint32_t nan = 0x7fff;
  uint16_t bits = 0;

  Small() = default;
  explicit Small(double x, Rounding r = Rounding::nearest) : bits(rounded<E, M>(x, r, nan)) {}
  explicit operator double() const { return widened<E, M>(bits); }
};
using Half = Small<5, 10>;
using BFloat = Small<8, 7>;

// .f16x2 and .bf16x2
template <class T>
struct Pair {
  T low, high;
};

inline float single(double x, Rounding r) {
  if (r == Rounding::nearest) return static_cast<float>(x);
  return std::bit_cast<float>(rounded<8, 23>(x, r, 0x7fffffff));
}

// What tensor cores read of a 32-bit register as TF32: the lower 13 bits don't count.
inline double tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

// a*b + c in double, rounded to odd: rounding that again, to a format half as wide or less, is rounding once
// (Boldo and Melquiond, 2008). a*b has to be exact.
inline double fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double back = sum - product, error = (product - (sum - back)) + (c - back);
  if (error == 0 || (std::bit_cast<uint64_t>(sum) & 1)) return sum;
  return std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
}

}  // namespace ptx
