#include "cuda/gemm/contraction_tiles.cuh"

namespace fastdcgan::cuda {
template FASTDCGAN_RUN_TILE(conv_transpose, gpu::bf16);
}  // namespace fastdcgan::cuda
