// What a kernel and its caller may not spell themselves: a launch, shared memory, the size of the device. nvcc maps
// these wrappers to CUDA, a host compiler to the shim in tests/cuda_on_cpu, so every kernel runs on a CPU too. For that
//   - kernel files (.cuh) include these wrappers, csrc/common and each other, and nothing of CUDA or torch;
//   - blocks are whole warps, and every thread reaches every barrier and full-mask collective: mask work, never return;
//   - neither kernels nor wrappers copy or fill a constant size by memcpy or memset, which g++ inlines where the thread
//     sanitizer does not see it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#else
#include "cuda_on_cpu.h"
#endif

#define GPU_INLINE __device__ __forceinline__
#define GPU_HOST_INLINE __host__ __device__ __forceinline__

namespace fastdcgan::gpu {

#ifdef __CUDACC__
using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#else
using Stream = void*;
#endif

struct Launch {
  const char* name;  // of the kernel, for errors
  dim3 grid, block;
  size_t shared_bytes = 0;
  Stream stream = nullptr;
  bool early = false;  // see launch_early
};

// Whether launch_early is early: from compute capability 9.0 on, unless FASTDCGAN_EARLY_LAUNCH is 0.
inline bool launches_early();

// Runs `kernel`; throws std::runtime_error with its name where CUDA refuses. Allowed while a stream is captured.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Launch& l, Args&&... args) {
#ifdef __CUDACC__
  if (l.shared_bytes > 48 * 1024) {
    const int bytes = static_cast<int>(l.shared_bytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), l.name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = l.stream;
  cudaLaunchAttribute attribute{};
  if (l.early && launches_early()) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...), l.name);
#else
  cuda_on_cpu::launch(kernel, {l.grid, l.block, l.shared_bytes, l.name, l.early}, std::forward<Args>(args)...);
#endif
}

// The same for a kernel whose blocks may begin while the kernels before it end (programmatic dependent launch), since
// every thread of them calls await_kernels_before() before it touches global memory.
template <class... Params, class... Args>
void launch_early(void (*kernel)(Params...), Launch l, Args&&... args) {
  l.early = true;
  launch(kernel, l, std::forward<Args>(args)...);
}

// Lets the blocks of the next kernel begin where this one leaves room, and waits until the kernels before this one have
// ended and what they wrote is there.
GPU_INLINE void await_kernels_before() {
#ifndef __CUDACC__
  cuda_on_cpu::engine.await_kernels_before();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The block's shared memory as a T. Launch with shared_bytes = sizeof(T).
template <class T>
GPU_INLINE T& shared_memory() {
  static_assert(alignof(T) <= 1024, "dynamic shared memory is aligned to 1024 bytes");
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
#else
  return *static_cast<T*>(cuda_on_cpu::engine.shared_bytes(sizeof(T)));
#endif
}

// Where shared memory lies in its own address space. On the CPU its first byte is at 0.
GPU_INLINE unsigned shared_address(const void* p) {
#ifdef __CUDACC__
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
#else
  return cuda_on_cpu::engine.shared_address(p);
#endif
}

// Ends the launch with an error.
GPU_INLINE void trap() {
#ifdef __CUDACC__
  __trap();
#else
  cuda_on_cpu::engine.fail("trap");
#endif
}

// The multiprocessors of the current device.
inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
#else
  return cuda_on_cpu::options.multiprocessors;
#endif
}

// Bytes of shared memory that a block may have on the current device: 99 KiB on consumers' GPUs, 163 or 227 on others.
inline size_t most_shared_bytes() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
#else
  return cuda_on_cpu::options.shared_bytes;
#endif
}

// The compute capability of the current device, 90 for 9.0.
inline int compute_capability() {
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return major * 10 + minor;
#else
  return 90;
#endif
}

inline bool launches_early() {
#ifdef __CUDACC__
  static const bool wanted = [] {
    const char* value = std::getenv("FASTDCGAN_EARLY_LAUNCH");
    return value == nullptr || std::string(value) != "0";
  }();
  return wanted && compute_capability() >= 90;
#else
  return true;
#endif
}

}  // namespace fastdcgan::gpu
