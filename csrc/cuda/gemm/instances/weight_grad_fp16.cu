#include "cuda/gemm/contraction_tiles.cuh"

namespace fastdcgan::cuda {
template FASTDCGAN_RUN_TILE(weight_grad, gpu::fp16);
}  // namespace fastdcgan::cuda
