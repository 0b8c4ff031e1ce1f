// As much of a CUDA runtime as csrc/cuda/device and what nvcc generates call: a GPU of 9.0 with code that is
// said to be loaded. The linker takes these functions, with nvcc's --cudart none.
#include <cuda_runtime_api.h>

#include <cstdlib>

namespace fake {
int ptx_version, device, asked, early;
}

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = fake::device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024 : 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool right = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value == 227 * 1024;
  return right ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* code, const void*) {
  *code = {}, code->ptxVersion = fake::ptx_version, code->binaryVersion = 90;
  return ++fake::asked, cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  for (unsigned i = 0; i < config->numAttrs; ++i)
    fake::early += config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** at, size_t bytes, unsigned) { return *at = std::malloc(bytes), cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "refused"; }

// What nvcc generates names these; only the first four are called.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
void __cudaLaunchKernel() {}
void __cudaPopCallConfiguration() {}
void __cudaInitModule() {}
void __cudaGetKernel() {}
}
