// What the test programs share: numbers for buffers, thread orders, the comparison with float64.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device/vec.h"
#include "guarded_buffer.h"

namespace test {

using cuda_on_cpu::Flush;
using cuda_on_cpu::GuardedBuffer;
using cuda_on_cpu::Order;
template <class T>
using Buffer = GuardedBuffer<T>;

// The alignment of a buffer of which only what follows `offset` elements is used: that begins between vectors, if any
// elements come before it.
template <class T>
constexpr size_t alignment(size_t offset) {
  return offset != 0 ? 16 : alignof(T);
}

inline void require(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error(what);
}

// Normal numbers; kernels can't write them.
template <class T>
void fill(Buffer<T>& b, unsigned seed, float mean = 0, float deviation = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < b.size(); ++i) b[i] = fastdcgan::gpu::from_float<T>(mean + deviation * normal(random));
  b.read_only();
}

// |got - want(i)| <= tolerance * (|want(i)| + scale), and not NaN, for each number.
template <class T, class Want>
void compare(const char* name, const Buffer<T>& got, Want want, double tolerance, double scale = 1) {
  for (size_t i = 0; i < got.size(); ++i) {
    double g = fastdcgan::gpu::to_float(got[i]), w = want(i);
    if (std::abs(g - w) <= tolerance * (std::abs(w) + scale)) continue;
    throw std::runtime_error(
        std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(g) + ", not " + std::to_string(w));
  }
}

template <class T>
std::string bytes(const Buffer<T>& b) {
  return std::string(reinterpret_cast<const char*>(b.data()), b.size() * sizeof(T));
}

struct Plan {
  Order order;
  unsigned seed;
};

// Every order that this build checks. The thread sanitizer finds races by what orders accesses, not by luck: one will
// do. Addresses hardly depend on it, and a mutation run has many programs to run: two.
inline std::vector<Plan> plans() {
#if defined(__SANITIZE_THREAD__)
  return {{Order::random, 2}};
#elif defined(__SANITIZE_ADDRESS__) || defined(FASTDCGAN_MUTANTS)
  return {{Order::forward, 0}, {Order::random, 1}};
#else
  return {{Order::forward, 0}, {Order::reverse, 0}, {Order::random, 1}, {Order::random, 2}};
#endif
}

// Runs a test in each order of threads and blocks: it compares with float64 itself, and returns the bytes that every
// order must give alike. Prints and returns whether it passed.
inline bool run(const std::string& name, const std::function<std::string()>& once) {
#ifdef FASTDCGAN_MUTANTS
  static int runs = 0;
  const int number = runs++;
  if (!mutant::selected(number)) return true;
#endif
  std::string first;
  const auto start = std::chrono::steady_clock::now();
  try {
    bool again = false;
    for (const Plan& plan : plans()) {
      cuda_on_cpu::options.order = plan.order, cuda_on_cpu::options.seed = plan.seed;
      const std::string bytes = once();
      require(!again || bytes == first, "the result depends on the order of the threads: a race");
      first = bytes, again = true;
    }
  } catch (const std::exception& e) {
    std::printf("FAIL %s\n  %s\n", name.c_str(), e.what());
#ifdef FASTDCGAN_MUTANTS
    std::exit(1);
#endif
    return false;
  }
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  std::printf("ok   %-60s %7.1f ms\n", name.c_str(), took.count());
#ifdef FASTDCGAN_MUTANTS
  mutant::report(number, took.count());
#endif
  return true;
}

}  // namespace test
