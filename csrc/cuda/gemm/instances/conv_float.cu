#include "cuda/gemm/contraction_tiles.cuh"

namespace fastdcgan::cuda {
template FASTDCGAN_RUN_TILE(conv, float);
}  // namespace fastdcgan::cuda
