// As much of a CUDA runtime as csrc/cuda and what nvcc generates call: an A100, which hands every launch to Python. And
// torch's memory on the CPU as that GPU's: Python hears of each allocation, so that the machine knows its bounds.
#undef TORCH_TARGET_VERSION  // this file is of the torch that is here
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string_view>

namespace {

using Launched = int (*)(const char* ptx, const char* kernel, const dim3* grid, const dim3* block, uint64_t shared, void** arguments);
using Allocated = void (*)(void* begin, uint64_t bytes);
Launched launched = nullptr;
Allocated allocated = nullptr;
int processors = 108;

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

// With null for both, memory is torch's own again.
void ptx_listen(Launched on_launch, Allocated on_allocation) {
  static Watched watched;
  c10::SetCPUAllocator(on_allocation ? &watched : watched.usual, 255);
  launched = on_launch, allocated = on_allocation;
}

// How many multiprocessors kernels find.
void ptx_processors(int count) { processors = count; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = 163 * 1024, cudaSuccess;
    case cudaDevAttrMultiProcessorCount: return *value = processors, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = 8, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = 0, cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* code, const void*) {
  *code = {}, code->ptxVersion = code->binaryVersion = 80;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end() || !launched) return cudaErrorInvalidDeviceFunction;
  const Kernel& k = found->second;
  return launched(k.ptx, k.name, &config->gridDim, &config->blockDim, config->dynamicSmemBytes, arguments) ? cudaErrorLaunchFailure
                                                                                                         : cudaSuccess;
}
cudaError_t cudaHostAlloc(void** at, size_t bytes, unsigned) { return *at = std::malloc(bytes), cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, unsigned long long, cudaDriverEntryPointQueryResult*) {
  return cudaErrorNotSupported;  // of tensor maps, which this GPU has not
}
const char* cudaGetErrorString(cudaError_t) { return "refused"; }

// What nvcc generates registers each source's code for several GPUs, with a header that has its length. The PTX of 8.0
// lies in it uncompressed.
void** __cudaRegisterFatBinary(void* wrapper) {
  const char* data = reinterpret_cast<const char*>(static_cast<void**>(wrapper)[1]);
  uint64_t bytes;
  std::memcpy(&bytes, data + 8, sizeof bytes);
  const std::string_view all(data, bytes + 16);
  const size_t target = all.find("\n.target sm_80");
  return new void*(target == all.npos ? nullptr : const_cast<char*>(data + all.rfind("\n.version", target) + 1));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** ptx, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = {static_cast<const char*>(*ptx), name};
}
// Named in what is generated, and not called.
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
void __cudaLaunchKernel() {}
void __cudaRegisterVar() {}  // no host code reads or writes a variable of the device
void __cudaPopCallConfiguration() {}
void __cudaInitModule() {}
void __cudaGetKernel() {}

// Of torch, for the launchers: there is one device, and one stream.
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
int aoti_torch_create_device_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int aoti_torch_delete_device_guard(void*) { return 0; }
}
