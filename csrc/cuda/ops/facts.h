// The operator of torch.ops.fastdcgan_cuda that says what Python has to know of the kernels.
#pragma once

#include <string>

namespace fastdcgan::cuda {

// In JSON: facts.cu.
std::string facts_op();

}  // namespace fastdcgan::cuda
