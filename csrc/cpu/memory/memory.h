// Memory of results. What large tensors leave behind is kept for the next ones of about that size: at each step of
// training the system would take back the pages of all activations, and clearing fresh ones costs more than most passes.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastdcgan::cpu {

// As at::empty and at::empty_like.
at::Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format);
at::Tensor new_tensor_like(const at::Tensor& x);

struct MemoryCache {
  int64_t blocks, bytes;
};
MemoryCache cached_memory();  // free, and not given back to the system
void release_memory();     // all of that

}  // namespace fastdcgan::cpu
