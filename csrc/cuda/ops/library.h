// Where the operators are registered: torch.ops.fastdcgan_cuda. A host compiler makes a library for CPU tensors of the
// same sources: tests/cuda_on_cpu.
#pragma once

#include <torch/csrc/stable/library.h>

#ifdef FASTDCGAN_CUDA_ON_CPU
#define FASTDCGAN_NAMESPACE fastdcgan_cuda_on_cpu
#define FASTDCGAN_DISPATCH_KEY CPU
#else
#define FASTDCGAN_NAMESPACE fastdcgan_cuda
#define FASTDCGAN_DISPATCH_KEY CUDA
#endif
