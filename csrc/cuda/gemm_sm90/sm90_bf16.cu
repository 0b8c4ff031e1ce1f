#include "cuda/gemm_sm90/sm90_tiles.cuh"

namespace fastdcgan::cuda {
FASTDCGAN_RUN_SM90_TILES(template, gpu::bf16);
}  // namespace fastdcgan::cuda
