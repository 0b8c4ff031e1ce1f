// CUDA's built-in functions that kernels call by name.
#pragma once

#include <cmath>
#include <string>
#include <type_traits>

#include "engine.h"

namespace cuda_on_cpu {

template <class T, class Source>
T shuffle(const char* call, unsigned mask, T value, Source source, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles 4 and 8 byte numbers");
  return engine.warp_call<T>(
      call, mask, value,
      [&](auto& in, auto& out) {
        for (int lane = 0; lane < warpSize; ++lane) {
          if (!out[lane]) continue;
          int from = source(lane);
          if (!in[from]) engine.fail(std::string(call) + " reads a lane that is not in the mask");
          *out[lane] = *in[from];
        }
      },
      site);
}

}  // namespace cuda_on_cpu

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) { cuda_on_cpu::engine.barrier(site); }
inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::engine.warp_barrier(mask, site);
}

template <class T>
T __shfl_sync(
    unsigned mask, T value, int from, int width = warpSize, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  auto source = [=](int lane) { return (lane & -width) + (from & (width - 1)); };
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, source, site);
}
template <class T>
T __shfl_xor_sync(
    unsigned mask, T value, int flip, int width = warpSize, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  auto source = [=](int lane) { return (lane ^ flip) < (lane & -width) + width ? lane ^ flip : lane; };
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, source, site);
}
template <class T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = warpSize, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  auto source = [=](int lane) { return lane + int(delta) < (lane & -width) + width ? lane + int(delta) : lane; };
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, source, site);
}
template <class T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned delta, int width = warpSize, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  auto source = [=](int lane) { return lane - int(delta) >= (lane & -width) ? lane - int(delta) : lane; };
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, source, site);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::engine.warp_call<unsigned>(
      "__ballot_sync", mask, predicate,
      [](auto& in, auto& out) {
        unsigned votes = 0;
        for (int lane = 0; lane < warpSize; ++lane) votes |= unsigned(in[lane] && *in[lane]) << lane;
        for (unsigned* o : out)
          if (o) *o = votes;
      },
      site);
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

// --- arithmetic that a compiler may not contract to a fused multiply-add ---

inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float __fsub_rn(float a, float b) { return __fadd_rn(a, -b); }
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}
inline double __dadd_rn(double a, double b) {
  volatile double sum = a + b;
  return sum;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
