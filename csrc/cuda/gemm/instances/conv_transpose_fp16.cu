#include "cuda/gemm/contraction_tiles.cuh"

namespace fastdcgan::cuda {
template FASTDCGAN_RUN_TILE(conv_transpose, gpu::fp16);
}  // namespace fastdcgan::cuda
