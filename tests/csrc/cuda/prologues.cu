// The prologues of contractions on 16-bit numbers by themselves: on a fragment in registers (conv, conv_transpose) and
// on a chunk in shared memory (weight_grad), of eight numbers each. kWhich: 0 none, 1 activate, 2 bn_backward.
#include "cuda/gemm_sm90/sm90_tiles.cuh"

namespace fastdcgan::cuda {

using T = gpu::bf16;

// As a contraction has it that knows its prologue: leaky ReLU, and the gradient of affine batch normalization.
template <int kWhich>
__device__ Operand<T> known(Operand<T> operand) {
  operand.prologue = kWhich == 1 ? Prologue::activate : Prologue::bn_backward;
  operand.affine = operand.vectors = operand.act.linear = true, operand.act.relu = false;
  return operand;
}

template <int kWhich>
__global__ void in_registers(const Operand<T> o, const uint4* x, const uint4* y, uint4* out, bool above, bool below) {
  const uint4 from = x[threadIdx.x], second = y[threadIdx.x];
  unsigned numbers[4] = {from.x, from.y, from.z, from.w}, raw[4] = {second.x, second.y, second.z, second.w};
  if (kWhich > 0) apply_prologue(known<kWhich>(o), numbers, raw, o.coef, threadIdx.x * 2, above, below);
  out[threadIdx.x] = {numbers[0], numbers[1], numbers[2], numbers[3]};
}

template <int kWhich>
__global__ void in_shared_memory(const Operand<T> o, int group) {
  T* x = &gpu::shared_memory<T>() + threadIdx.x * 8;
  if (kWhich > 0) apply_prologue(known<kWhich>(o), x, x + 2048, group, threadIdx.x * 8);
}

#define FASTDCGAN_PROLOGUES(which)                                                                               \
  template __global__ void in_registers<which>(const Operand<T>, const uint4*, const uint4*, uint4*, bool, bool); \
  template __global__ void in_shared_memory<which>(const Operand<T>, int);
FASTDCGAN_PROLOGUES(0)
FASTDCGAN_PROLOGUES(1)
FASTDCGAN_PROLOGUES(2)

}  // namespace fastdcgan::cuda
