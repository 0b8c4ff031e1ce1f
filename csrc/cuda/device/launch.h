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
#include <map>
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

#ifdef __CUDACC__
// Code for architectures from this one on (90 for 9.0) has the wait of await_kernels_before.
constexpr int kFirstThatWaits = 90;

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Readies a kernel for launches on the current device, once: it may have all of a block's shared memory. Returns whether
// a launch may be early: FASTDCGAN_EARLY_LAUNCH is not 0, and the code that was loaded waits for the kernels before it.
// What the driver compiles from PTX of 8.0 doesn't, on any GPU.
inline bool readied(const void* kernel, const char* name) {
  thread_local std::map<std::pair<const void*, int>, bool> known;
  int device = 0;
  check(cudaGetDevice(&device), name);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return found->second;
  const int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, kernel), name);
  const char* allowed = std::getenv("FASTDCGAN_EARLY_LAUNCH");
  const bool early = code.ptxVersion >= kFirstThatWaits && (allowed == nullptr || std::string(allowed) != "0");
  return known[{kernel, device}] = early;
}
#endif

// Runs `kernel`; throws std::runtime_error with its name where CUDA refuses. Allowed while a stream is captured.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Launch& l, Args&&... args) {
#ifdef __CUDACC__
  const bool may_be_early = readied(reinterpret_cast<const void*>(kernel), l.name);
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = l.stream;
  cudaLaunchAttribute attribute{};
  if (l.early && may_be_early) {
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
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // kFirstThatWaits
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// `p`, through which nothing is loaded before this: what is const and __restrict__ may otherwise be loaded before
// await_kernels_before().
template <class T>
GPU_INLINE const T* from_here_on(const T* p) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(p));
#endif
  return p;
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
  return device_attribute(cudaDevAttrMultiProcessorCount);
#else
  return cuda_on_cpu::options.multiprocessors;
#endif
}

// Bytes of shared memory that a block may have on the current device: 99 KiB on consumers' GPUs, 163 or 227 on others.
inline size_t most_shared_bytes() {
#ifdef __CUDACC__
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
#else
  return cuda_on_cpu::options.shared_bytes;
#endif
}

// The compute capability of the current device, 90 for 9.0.
inline int compute_capability() {
#ifdef __CUDACC__
  return device_attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
#else
  return 90;
#endif
}

}  // namespace fastdcgan::gpu
