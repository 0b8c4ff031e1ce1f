// One contraction for sm_90a by itself, with a prologue.
#include "cuda/gemm_sm90/sm90_tiles.cuh"

namespace fastdcgan::cuda {
template void run_sm90<Sm90Contraction<Op::conv, gpu::bf16, Tile9, true>>(const Problem<gpu::bf16>&, float*, gpu::Stream);
}
