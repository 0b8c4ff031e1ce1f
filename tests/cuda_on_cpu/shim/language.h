// The words of the CUDA language for a host compiler, and what every part of the shim names.
#pragma once

#ifdef __CUDACC__
#error "the shim is for host compilers; nvcc has the real thing"
#endif

#include <cstring>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// No __shared__: kernels take shared memory through gpu::shared_memory, which is sized, poisoned and fenced.

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

namespace cuda_on_cpu {

enum class Order { forward, reverse, random };

struct Options {
  Order order = Order::forward;  // in which order blocks, warps and lanes run
  unsigned seed = 1;             // for Order::random
  int multiprocessors = 2;       // of the pretended device; few, so that persistent loops go round in small tests
  size_t shared_bytes = 99 << 10;  // that a block of it may have: of the GPUs that are supported the least
};
inline Options options;

struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Site {
  const char* file;
  int line;
  bool operator==(const Site& o) const { return line == o.line && std::strcmp(file, o.file) == 0; }
  // As a default argument, the place of the call.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

inline std::string to_string(uint3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

}  // namespace cuda_on_cpu
