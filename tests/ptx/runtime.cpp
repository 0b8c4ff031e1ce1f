// As much of a CUDA runtime as csrc/cuda, CUTLASS and what nvcc generates call: an A100 or an H100, which hands every
// launch to Python. And torch's memory on the CPU as that GPU's: Python hears of each allocation, so that the machine knows its
// bounds.
#undef TORCH_TARGET_VERSION  // this file is of the torch that is here
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string_view>
#include <utility>

#include "machine/tensor_map.h"

namespace {

using Launched = int (*)(const char* ptx, const char* kernel, const dim3* grid, const dim3* block, uint64_t shared,
                         void** arguments, int early);
using Allocated = void (*)(void* begin, uint64_t bytes);
Launched launched = nullptr;
Allocated allocated = nullptr;
int processors = 0;  // 0: as many as a GPU of that capability has
int capability = 80;
cudaLaunchConfig_t called;  // as kernel<<<...>>> says
cudaError_t last = cudaSuccess;

struct Kernel {
  const char *ptx, *name;
};
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

// Memory that Python hears of is never given back: no address stands for two tensors. Who reads what nobody wrote finds
// NaNs in it.
struct Watched final : c10::Allocator {
  c10::Allocator* usual = c10::GetCPUAllocator();

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return usual->allocate(bytes);
    void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    std::memset(p, 0xff, bytes);
    allocated(p, bytes);
    return {p, p, [](void*) {}, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

extern "C" {

// With null for both, memory is torch's own again. on_gpu: its compute capability, 80 or 90
void ptx_listen(Launched on_launch, Allocated on_allocation, int on_gpu) {
  capability = on_gpu;
  static Watched watched;
  c10::SetCPUAllocator(on_allocation ? &watched : watched.usual, 255);
  launched = on_launch, allocated = on_allocation;
}

// How many multiprocessors kernels find.
void ptx_processors(int count) { processors = count; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = (capability == 90 ? 227 : 163) * 1024, cudaSuccess;
    case cudaDevAttrMultiProcessorCount: return *value = processors ? processors : capability == 90 ? 132 : 108, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = capability % 10, cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* code, const void* function) {
  const bool is_90 = std::string_view(kernels()[function].ptx).find(".target sm_90") != std::string_view::npos;
  *code = {}, code->ptxVersion = code->binaryVersion = is_90 ? 90 : 80;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end() || !launched) return cudaErrorInvalidDeviceFunction;
  const Kernel& k = found->second;
  const bool early = config->numAttrs && config->attrs[0].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  const int failed =
      launched(k.ptx, k.name, &config->gridDim, &config->blockDim, config->dynamicSmemBytes, arguments, early);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}
// kernel<<<grid, block, shared, stream>>>(...): what is between the brackets is put aside until the arguments are there.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t) {
  called = {}, called.gridDim = grid, called.blockDim = block, called.dynamicSmemBytes = shared;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void*) {
  return *grid = called.gridDim, *block = called.blockDim, *shared = called.dynamicSmemBytes, cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void** arguments, size_t, cudaStream_t) {
  return last = cudaLaunchKernelExC(&called, kernel, arguments);
}
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaHostAlloc(void** at, size_t bytes, unsigned) { return *at = std::malloc(bytes), cudaSuccess; }
CUresult tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(CUtensorMap) == 128);
  const auto* sizes_ = reinterpret_cast<const uint64_t*>(sizes);
  const auto* strides_ = reinterpret_cast<const uint64_t*>(strides);
  const bool refused = ptx::encode(map, type, rank, base, sizes_, strides_, box, steps, interleave, swizzle, fill);
  return refused ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  if (std::string_view(name) != "cuTensorMapEncodeTiled") return cudaErrorNotSupported;
  *found = reinterpret_cast<void*>(tensor_map), *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "refused"; }

// What nvcc generates registers each source's code for several GPUs, with a header that has its length. The PTX of 8.0
// lies in it uncompressed, and that of 9.0a, which has the kernels that multiply by warpgroup.
void** __cudaRegisterFatBinary(void* wrapper) {
  const char* data = reinterpret_cast<const char*>(static_cast<void**>(wrapper)[1]);
  uint64_t bytes;
  std::memcpy(&bytes, data + 8, sizeof bytes);
  const std::string_view all(data, bytes + 16);
  const auto text_for = [&](const char* target) -> const char* {
    const size_t at = all.find(target);
    return at == all.npos ? nullptr : data + all.rfind("\n.version", at) + 1;
  };
  const char* text = text_for("\n.target sm_90a");
  if (text == nullptr || std::string_view(text).find("wgmma") == std::string_view::npos) text = text_for("\n.target sm_80");
  return new void*(const_cast<char*>(text));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** ptx, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = {static_cast<const char*>(*ptx), name};
}
void __cudaRegisterVar() {}  // no host code reads or writes a variable of the device
char __cudaInitModule(void**) { return 1; }

// Of torch, for the launchers: there is one device, and one stream.
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
int aoti_torch_create_device_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int aoti_torch_delete_device_guard(void*) { return 0; }
}
